"""The command line: its commands and options, what it hands to the stages, and its exit codes."""

from __future__ import annotations

import errno
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest
import typer

from ldm_deploy import errors
from ldm_deploy.cli import app

Cli = Callable[..., Any]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

# The contract: positional arguments, and the options besides the four that every command takes.
CONTRACT = {
    "train": (["config"], {"--data", "--out", "--resume"}),
    "export": (["source"], {"--out", "--precision", "--target", "--component"}),
    "quantize": (["directory"], {"--out", "--target", "--budget", "--calibration", "--component"}),
    "distill": (["reference"], {"--recipe", "--out"}),
    "eval": (["directory"], {"--budget", "--against", "--out"}),
    "optimize": (["source"], {"--out", "--target", "--budget"}),
    "sample": (["bundle", "prompt"], {"--out", "--steps", "--guidance-scale", "--engine", "--size"}),
    "verify": (["bundle"], set()),
    "inspect": (["bundle"], set()),
    "bench": (["bundle"], set()),
    "analyze": (["reference"], set()),
    "cache": ([], {"--clear"}),
}
COMMON = {"--json", "--seed", "--threads", "--quiet"}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MagicMock]:
    """Replace a stage's function by a stand-in that keeps its signature, so that a wrong call still fails."""

    def replace(module: str, name: str, result: Any = None, raises: BaseException | None = None) -> MagicMock:
        target = importlib.import_module(module)
        stand_in: MagicMock = create_autospec(getattr(target, name), return_value=result, side_effect=raises)
        monkeypatch.setattr(target, name, stand_in)
        return stand_in

    return replace


@pytest.mark.parametrize("name", CONTRACT)
def test_commands_are_those_of_the_contract(name: str) -> None:
    positional, options = CONTRACT[name]
    parameters = COMMANDS[name].params
    found = {option for parameter in parameters for option in parameter.opts if option.startswith("--")}
    assert found >= options | COMMON
    assert [p.name for p in parameters if p.param_type_name == "argument"] == positional


def test_there_is_no_command_outside_the_contract() -> None:
    assert set(COMMANDS) == set(CONTRACT)


@pytest.mark.parametrize("arguments", [[], ["--help"], *[[name, "-h"] for name in CONTRACT]])
def test_help_exits_0(ldm_deploy_cli: Cli, arguments: list[str]) -> None:
    done = ldm_deploy_cli(*arguments)
    assert done.code == 0
    assert done.out.startswith("Usage: ldm-deploy")


def test_version(ldm_deploy_cli: Cli) -> None:
    import ldm_deploy

    assert ldm_deploy_cli("--version") == (0, ldm_deploy.__version__ + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimise"], "No such command 'optimise'"),
        (["optimize"], "Missing argument 'SOURCE'; see `ldm-deploy optimize --help`"),
        (["optimize", "reference"], "Missing option '--out'; see `ldm-deploy optimize --help`"),
        (["verify", "b", "--thread", "2"], "No such option: --thread"),
        (["verify", "b", "--threads", "0"], "Invalid value for '--threads'"),
        (["verify", "b", "--seed", "-1"], "Invalid value for '--seed'"),
        (["sample", "b", "sun", "--out", "x.png", "--steps", "many"], "Invalid value for '--steps'"),
        (["sample", "b", "sun", "--out", "x.png", "--size", "64"], "--size is '64'; give height and width"),
        (["sample", "b", "sun", "--out", "x.jpeg"], "--out is 'x.jpeg'; write to a file that ends in .png or .bmp"),
        (["optimize", "reference", "--out", "b", "--target", "onnxruntime"], "did you mean 'onnxruntime-cpu'?"),
        (["export", "reference", "--out", "b", "--component", "u"], "component 'u' is unknown; allowed: text_encoder"),
        (["export", "reference", "--out", "b", "--precision", "int7"], "precision 'int7' is unknown"),
        (["distill", "reference", "--recipe", "stepz", "--out", "d"], "did you mean 'steps'"),
        (["distill", "reference", "--recipe", "prune", "--out", "d", "--method", "consistency"], "for --recipe steps"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(ldm_deploy_cli: Cli, arguments: list[str], message: str) -> None:
    done = ldm_deploy_cli(*arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimize", "reference", "--out", "b", "--target", "tensorrt-cuda"], "there is: onnxruntime-cpu"),
        (
            ["quantize", "b", "--out", "c", "--target", "tensorrt-cuda"],
            "for 'tensorrt-cuda' is not built yet",
        ),
        (["export", "reference", "--out", "b", "--precision", "bf16"], "not built for onnxruntime-cpu; there is: fp32"),
    ],
)
def test_what_is_not_built_is_one_line_and_exit_1(ldm_deploy_cli: Cli, arguments: list[str], message: str) -> None:
    done = ldm_deploy_cli(*arguments)
    assert done.code == 1
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimize", "models.mine:make", "--out", "b"], "optimize needs a whole model; use export --component"),
        (["export", "models.mine:make", "--out", "b"], "say with --component which it is: text_encoder, unet"),
    ],
)
def test_a_function_makes_one_component(ldm_deploy_cli: Cli, arguments: list[str], message: str) -> None:
    done = ldm_deploy_cli(*arguments)
    assert (done.code, message in done.err) == (2, True)


@pytest.mark.parametrize("code", [0, 3, 4])
def test_optimize_hands_on_the_gates_exit_code(ldm_deploy_cli: Cli, stage: Any, tmp_path: Path, code: int) -> None:
    optimize = stage("ldm_deploy.optimize", "optimize", {"chosen": "x"})
    stage("ldm_deploy.eval.report", "print_table")
    stage("ldm_deploy.eval.report", "exit_code", code)
    result = tmp_path / "result.json"
    done = ldm_deploy_cli("optimize", "reference", "--out", "b", "--seed", 3, "--threads", 1, "--json", result)
    assert done.code == code
    assert json.loads(result.read_text()) == {"chosen": "x"}
    arguments = {"targets": ["onnxruntime-cpu"], "budget": None, "builds": 0, "ray": None, "seed": 3, "threads": 1}
    optimize.assert_called_once_with("reference", Path("b"), **arguments)


@pytest.mark.parametrize("code", [0, 3, 4])
def test_eval_hands_on_the_gates_exit_code(ldm_deploy_cli: Cli, stage: Any, tmp_path: Path, code: int) -> None:
    evaluate = stage("ldm_deploy.eval.compare", "evaluate_bundle", {"variants": []})
    write = stage("ldm_deploy.eval.report", "write_report")
    stage("ldm_deploy.eval.report", "print_table")
    stage("ldm_deploy.eval.report", "exit_code", code)
    done = ldm_deploy_cli("eval", tmp_path / "bundle", "--threads", 1)
    assert done.code == code
    assert evaluate.call_args.args == (tmp_path / "bundle",)
    assert write.call_args.args[1] == tmp_path / "bundle.report"


def test_eval_hands_on_the_stored_result(ldm_deploy_cli: Cli, stage: Any, tmp_path: Path) -> None:
    read = stage("ldm_deploy.eval.regression", "read_stored", "what was stored")
    evaluate = stage("ldm_deploy.eval.compare", "evaluate_bundle", {"variants": []})
    for name, result in (("write_report", None), ("print_table", None), ("exit_code", 0)):
        stage("ldm_deploy.eval.report", name, result)
    assert ldm_deploy_cli("eval", tmp_path / "bundle", "--against", "stored.json").code == 0
    read.assert_called_once_with(Path("stored.json"))
    assert evaluate.call_args.kwargs["against"] == "what was stored"


def test_a_reference_has_no_stored_result(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    done = ldm_deploy_cli("eval", tmp_path, "--against", "stored.json")
    assert (done.code, "is a reference, and --against compares bundles" in done.err) == (2, True)


def test_eval_scores_a_reference(
    ldm_deploy_cli: Cli, stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = stage("ldm_deploy.eval.reference", "score_reference", {})
    (tmp_path / "model.json").write_text("{}")
    monkeypatch.delenv("LDM_DEPLOY_DATA", raising=False)
    done = ldm_deploy_cli("eval", tmp_path)
    assert (done.code, "give --data PATH" in done.err) == (2, True)
    assert ldm_deploy_cli("eval", tmp_path, "--data", "images.zip").code == 0
    score.assert_called_once_with(tmp_path, "images.zip")


def test_export_quantize_train_call_their_stages(ldm_deploy_cli: Cli, stage: Any, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"format": 1}')
    export = stage("ldm_deploy.export.export", "export_source")
    quantize = stage("ldm_deploy.quantize.quantize", "quantize_bundle")
    train = stage("ldm_deploy.training.train", "train", {})
    result = tmp_path / "result.json"
    assert ldm_deploy_cli("export", "reference", "--out", tmp_path, "--component", "unet", "--json", result).code == 0
    assert export.call_args.kwargs["components"] == ["unet"]
    assert json.loads(result.read_text()) == {"format": 1}
    engine = {
        "id": "unet-int8-onnxruntime-cpu", "precision_found": {"int8": 3}, "comparisons": [],
        "speedup": None, "size_bytes": 10**6,
        "parity": {"relative_error": 0.01, "limit": 0.1}, "recipe": {"name": "conv"},
        "recipes_refused": {"all": "slow"},
    }  # fmt: skip
    (tmp_path / "bundle.json").write_text(json.dumps({"engines": [engine]}))
    done = ldm_deploy_cli("quantize", "a", "--out", tmp_path, "--target", "onnxruntime-cpu")
    assert done.code == 0
    assert "unet-int8-onnxruntime-cpu (conv): " in done.out
    assert "refused: all: slow" in done.out
    assert quantize.call_args.kwargs["components"] is None
    refused = [{"name": "unet-int8-onnxruntime-cpu (conv)", "reason": "not faster"}]
    (tmp_path / "bundle.json").write_text(json.dumps({"engines": [], "refused": refused}))
    done = ldm_deploy_cli("quantize", "a", "--out", tmp_path, "--target", "onnxruntime-cpu")
    assert done.code == 3
    assert "refused: unet-int8-onnxruntime-cpu (conv): not faster" in done.out
    assert ldm_deploy_cli("train", "tiny", "--out", tmp_path, "--resume").code == 0
    assert (train.call_args.args[:2], train.call_args.kwargs["seed"]) == (("tiny", "photos"), None)


KNOWN = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LdmDeployError)]


@pytest.mark.parametrize("kind", KNOWN)
def test_an_error_is_one_line_with_its_exit_code(ldm_deploy_cli: Cli, stage: Any, kind: type[Any]) -> None:
    stage("ldm_deploy.runtime.bundle", "verify_bundle", raises=kind("first\nsecond"))
    assert ldm_deploy_cli("verify", "b") == (kind.exit_code, "", "error: first second\n")
    assert kind.exit_code in (1, 2)


def full() -> Exception:
    return OSError(errno.ENOSPC, "No space left on device", "build/x")


def wrapped() -> Exception:
    error = RuntimeError("cannot write")
    error.__cause__ = full()
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (full(), "error: the disk is full (writing build/x); free some space and run the same command again\n"),
        (wrapped(), "error: the disk is full (writing build/x); free some space and run the same command again\n"),
        (RuntimeError("IoError: No space left on device"), "error: the disk is full; free some space and run the"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: Permission denied: /x; check the path"),
        (MemoryError(), "error: out of memory; "),
        (ModuleNotFoundError("no", name="torch"), "error: the package 'torch' is not installed; install"),
        (ModuleNotFoundError("no", name="skimage.data"), "the package 'skimage' is not installed; install what is"),
    ],
)
def test_what_the_machine_lacks_is_one_line(ldm_deploy_cli: Cli, stage: Any, error: Exception, message: str) -> None:
    stage("ldm_deploy.runtime.bundle", "verify_bundle", raises=error)
    done = ldm_deploy_cli("verify", "b")
    assert done.code == 1
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("x"), ModuleNotFoundError("no", name="ldm_deploy.runtime.x")])
def test_a_bug_keeps_its_traceback(stage: Any, error: Exception) -> None:
    from ldm_deploy.cli import main

    stage("ldm_deploy.runtime.bundle", "verify_bundle", raises=error)
    with pytest.raises(type(error)):
        main(["verify", "b"])


@pytest.mark.parametrize(
    ("module", "name", "arguments", "message"),
    [
        ("ldm_deploy.runtime.bundle", "verify_bundle", ["verify", "b"], "run the same command again"),
        ("ldm_deploy.optimize", "optimize", ["optimize", "reference", "--out", "b"], "same command again to resume"),
        ("ldm_deploy.training.train", "train", ["train", "tiny", "--out", "b"], "run it again with --resume"),
    ],
)
def test_ctrl_c_is_one_line_and_130(
    ldm_deploy_cli: Cli, stage: Any, module: str, name: str, arguments: list[str], message: str
) -> None:
    stage(module, name, raises=KeyboardInterrupt())
    done = ldm_deploy_cli(*arguments)
    assert done.code == 130
    assert done.err.startswith("interrupted; ")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_closed_pipe_is_no_traceback(root: Path) -> None:
    """`ldm-deploy inspect … | head -1`: the reader goes away first."""
    code = (
        "import os, sys; from ldm_deploy import cli, commands\n"
        "def show(bundle):\n    print('x' * 10**6, flush=True)\n    raise AssertionError\n"
        "commands.show_bundle = show; cli.main(['inspect', 'b'])"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.close()
    assert child.wait(60) == 1
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.stderr.close()


def test_python_m_is_the_same_program(root: Path) -> None:
    command = [sys.executable, "-m", "ldm_deploy", "verify", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
