"""The pytest plugin, run by pytest itself on toy bundles: planted regressions fail with their reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lpips
import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
import torch

from ldm_deploy.eval import compare, lpips_distance
from ldm_deploy.eval.grid import Grid
from tests.tiny_bundle import write_tiny_bundle

pytest_plugins = ["pytester"]

# pytester forgets what is imported during a test, and these cannot be imported twice.
ONCE = (lpips, onnx, onnxruntime, tokenizers, torch)

FP32 = "fp32-onnxruntime-cpu"
MEASURED: list[str] = []
# In a checkout that was installed before the plugin was there, it has to be named.
NAMED = () if entry_points(group="pytest11", name="ldm_deploy") else ("-p", "ldm_deploy.eval.pytest_plugin")
LIMITS = """format = 1
[default]
psnr_db_min = 30.0
ssim_min = 0.9
required = ["psnr_db_min"]
[regression]
psnr_db_drop_max = 0.5
colour_change_max = 0.2
image_change_max = 0.05
size_rise_max = 0.02
"""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two prompts instead of 24, and no LPIPS."""
    monkeypatch.setattr(lpips_distance, "_weights_file", lambda _: tmp_path / "none.pth")
    monkeypatch.setattr(compare, "load_grid", lambda *_: Grid(("red apple", "sun"), (0, 1)))


@pytest.fixture
def bundle(tmp_path: Path, few: None, stand_in_baseline: Callable[[Path], None]) -> Path:
    path = write_tiny_bundle(tmp_path / "bundle")
    stand_in_baseline(path)
    return path


@pytest.fixture
def run(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    (pytester.path / "limits.toml").write_text(LIMITS)

    def pytest_(bundle: Path | None, *arguments: object) -> pytest.RunResult:
        given = [] if bundle is None else ["--ldm-bundle", str(bundle)]
        return pytester.runpytest_inprocess(*NAMED, "-rA", *given, *map(str, arguments))

    return pytest_


def tamper(bundle: Path, component: str, change: Callable[[Any], None]) -> None:
    """Change an engine as an export that went wrong would: bundle.json fits the new file."""
    from ldm_deploy.runtime.bundle import write_bundle

    file = bundle / "engines" / f"{component}-fp32.onnx"
    model = onnx.load(file)
    change(model)
    file.write_bytes(model.SerializeToString())
    write_bundle(bundle, json.loads((bundle / "bundle.json").read_text()))


def scale_kernel(model: Any, factor: Any) -> None:
    from onnx import numpy_helper

    (kernel,) = [entry for entry in model.graph.initializer if entry.name == "kernel"]
    kernel.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(kernel) * np.float32(factor), "kernel"))


def swap_channels(model: Any) -> None:
    from onnx import numpy_helper

    (kernel,) = [entry for entry in model.graph.initializer if entry.name == "kernel"]
    kernel.CopyFrom(
        numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(kernel)[[1, 0, 2, 3]]), "kernel")
    )


def shift_colours(model: Any) -> None:
    from onnx import helper, numpy_helper

    node = next(node for node in model.graph.node if node.output[0] == "image")
    node.output[0] = "unshifted"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5 / 127.5), "shift"))
    model.graph.node.append(helper.make_node("Add", ["unshifted", "shift"], ["image"]))


@pytest.fixture
def stored(bundle: Path, tmp_path: Path) -> Path:
    """What the toy bundle gave, measured once."""
    if not MEASURED:
        MEASURED.append(json.dumps(dict(compare.evaluate_bundle(bundle))))
    path = tmp_path / "stored.json"
    path.write_text(MEASURED[0], encoding="utf-8")
    return path


def edit(stored: Path, change: Callable[[Any], object]) -> None:
    report = json.loads(stored.read_text())
    change(report)
    stored.write_text(json.dumps(report))


def test_every_gate_of_a_good_bundle_is_a_test_that_passes(bundle: Path, stored: Path, run: Any) -> None:
    result = run(bundle, "--ldm-budget", "limits.toml", "--ldm-against", stored, "--junitxml", "out.xml")
    names = (
        "runs", "psnr_db_min", "ssim_min", "still_runs", "psnr_db_drop_max", "colour_change_max", "image_change_max",
        "size_rise_max",
    )  # fmt: skip
    result.assert_outcomes(passed=len(names))
    result.stdout.fnmatch_lines_random([f"PASSED *{FP32}::{name}" for name in names])
    cases = list(ElementTree.parse("out.xml").getroot().iter("testcase"))
    assert [(case.get("classname"), case.get("name")) for case in cases] == [(FP32, name) for name in names]


@pytest.mark.parametrize(
    ("component", "change", "failed"),
    [
        ("unet", lambda model: scale_kernel(model, 1.1), "image_change_max"),
        ("unet", swap_channels, "image_change_max"),
        ("vae_decoder", shift_colours, "colour_change_max"),
    ],
    ids=["a scale off by a tenth", "two channels swapped", "half a grey level"],
)
def test_a_planted_regression_fails_with_its_reason(
    bundle: Path, stored: Path, run: Any, component: str, change: Callable[[Any], None], failed: str
) -> None:
    tamper(bundle, component, change)
    result = run(bundle, "--ldm-budget", "limits.toml", "--ldm-against", stored)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            f"FAILED *{FP32}::{failed}*",
        ]
    )
    result.stdout.re_match_lines([rf"{FP32}: {failed} 0\.\d+: \d+\.\d+ is above the limit 0\.\d+ \("])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_what_was_not_measured_is_skipped_and_fails_if_it_is_required(bundle: Path, stored: Path, run: Any) -> None:
    edit(stored, lambda report: report["machine"]["versions"].update(onnxruntime="1.0"))
    Path("limits.toml").write_text(
        """format = 1
[default]
lpips_max = 0.1
[regression]
image_change_max = 0.05
required = ["image_change_max"]
"""
    )
    result = run(bundle, "--ldm-budget", "limits.toml", "--ldm-against", stored)
    result.assert_outcomes(passed=2, skipped=1, failed=1)
    result.stdout.fnmatch_lines(["SKIPPED*not measured: *lpips_max 0.1: no weights of the LPIPS backbone*"])
    result.stdout.fnmatch_lines([f"not measured and required: {FP32}: image_change_max 0.05: the images differ by 0 *"])


def test_an_engine_that_breaks_and_a_variant_that_is_gone_fail(bundle: Path, stored: Path, run: Any) -> None:
    gone = "int8-onnxruntime-cpu"
    edit(stored, lambda report: report["variants"].append({**report["variants"][0], "name": gone}))
    tamper(bundle, "unet", lambda model: scale_kernel(model, np.nan))
    result = run(bundle, "--ldm-budget", "limits.toml", "--ldm-against", stored, "-k", "runs")
    result.assert_outcomes(failed=3, deselected=6)
    result.stdout.fnmatch_lines([f"{FP32}: *unet returned values that are not finite at step 1*"])
    result.stdout.fnmatch_lines([f"{FP32}: still_runs as stored: it drew when the result was stored:*"])
    result.stdout.fnmatch_lines([f"{gone}: still_runs as stored: *it is not in this bundle; if that is meant*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ldm-budget", "limits.toml"], "--ldm-budget says how to judge a bundle; give one with --ldm-bundle DIR"),
        (["--ldm-bundle", "none"], "none is no bundle: there is no none/bundle.json"),
        (
            ["--ldm-bundle", "BUNDLE", "--ldm-budget", "wrong.toml"],
            "unknown key 'psnr_min'; did you mean 'psnr_db_min'",
        ),
        (["--ldm-bundle", "BUNDLE", "--ldm-against", "wrong.toml"], "stored result wrong.toml is damaged"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_measured(
    tmp_path: Path, run: Any, pytester: pytest.Pytester, arguments: list[str], message: str
) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    (pytester.path / "wrong.toml").write_text("format = 1\n[default]\npsnr_min = 1\n")
    result = run(None, *[str(tmp_path / "bundle") if word == "BUNDLE" else word for word in arguments])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = result.stderr.str() + result.stdout.str()
    assert f"ERROR: {message}" in text or message in text
    assert "Traceback" not in text


def test_a_stored_result_of_another_protocol_is_an_error_with_one_line(bundle: Path, stored: Path, run: Any) -> None:
    edit(stored, lambda report: report["protocol"].update(steps=7))
    result = run(bundle, "--ldm-budget", "limits.toml", "--ldm-against", stored)
    result.assert_outcomes(errors=8)
    result.stdout.fnmatch_lines(["*was drawn with steps 7, and this run with 3; store a new result*"])
    result.stdout.no_fnmatch_line("*Traceback*")


FIXTURES = """
import numpy as np
import lpips
import onnx
import onnxruntime
import pytest
import tokenizers
import torch

PROMPTS = ["red apple", "sun"]

def test_the_pipeline(ldm_bundle, ldm_pipeline):
    assert (ldm_bundle / "bundle.json").is_file()
    assert ldm_pipeline("sun", seed=0, steps=2).shape == (1, 32, 32, 3)

def test_a_pipeline_of_ones_own(ldm_pipeline, ldm_compare):
    same = ldm_compare(ldm_pipeline, prompts=PROMPTS, seeds=[0, 1], steps=2)
    assert same["psnr_db"]["identical"] == same["psnr_db"]["n"] == 4
    other = ldm_compare(lambda prompt, seed, steps: ldm_pipeline(prompt, seed, steps)[:, ::-1],
                        prompts=PROMPTS, seeds=[0, 1], steps=2)
    assert other["psnr_db"]["mean"] < 30 and other["ssim"]["mean"] < 1

def test_images(ldm_pipeline, ldm_compare):
    images = ldm_pipeline(PROMPTS, seed=[0, 0], steps=2)
    brighter = np.minimum(images, 250) + np.uint8(5)
    found = ldm_compare(brighter, images, prompts=PROMPTS, seeds=[0])
    assert all(4 < shift <= 5 for shift in found["colour_shift"]["mean"])

def test_what_is_broken_is_named(ldm_pipeline, ldm_compare):
    nan = lambda prompt, seed: np.full((1, 32, 32, 3), np.nan)
    with pytest.raises(Exception, match="the image of 'sun', seed 1 holds NaN or infinity"):
        ldm_compare(nan, prompts=["sun"], seeds=[1])
    with pytest.raises(Exception, match="the image of 'sun', seed 1 is constant .one flat colour."):
        ldm_compare(np.zeros((1, 32, 32, 3), np.uint8), prompts=["sun"], seeds=[1])
    with pytest.raises(ValueError, match="shapes differ: .*; images are never resized"):
        ldm_compare(np.zeros((1, 16, 16, 3), np.uint8), prompts=["sun"], seeds=[1])
    with pytest.raises(ValueError, match="1 images for 2 prompts and seeds; give one for each"):
        ldm_compare(np.zeros((1, 32, 32, 3), np.uint8), prompts=["sun"], seeds=[1, 2])
"""


def test_the_fixtures_draw_and_compare(tmp_path: Path, run: Any, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(FIXTURES)
    bundle = write_tiny_bundle(tmp_path / "bundle")
    result = run(bundle, "-k", "test_")
    result.assert_outcomes(passed=4, deselected=11)


def test_without_a_bundle_the_fixtures_skip_with_the_remedy(run: Any, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(ldm_compare): pass")
    result = run(None)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*no bundle to test; run pytest with --ldm-bundle DIR"])


def test_without_the_options_the_plugin_costs_no_import(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys
        def test_it(pytestconfig):
            assert "ldm_deploy.eval.pytest_plugin" in sys.modules
            heavy = ("torch", "onnxruntime", "numpy", "ldm_deploy.eval.compare", "ldm_deploy.runtime.bundle")
            assert not [name for name in heavy if name in sys.modules]
        """
    )
    pytester.runpytest_subprocess(*NAMED, "-p", "no:hypothesispytest").assert_outcomes(passed=1)


@pytest.mark.slow
def test_several_processes_evaluate_once(tmp_path: Path, pytester: pytest.Pytester) -> None:
    """With pytest-xdist; its workers are processes of their own, so the baseline is the real one, which is not here."""
    bundle = write_tiny_bundle(tmp_path / "bundle")
    pytester.makeconftest(
        f"""
        from ldm_deploy.eval import compare, lpips_distance
        from ldm_deploy.eval.grid import Grid
        evaluate = compare.evaluate_bundle
        compare.load_grid = lambda *_: Grid(("sun",), (0, 1))
        def counted(*arguments, **options):
            with open({str(tmp_path / "calls")!r}, "a") as file:
                file.write("evaluated\\n")
            return evaluate(*arguments, **options)
        compare.evaluate_bundle = counted
        """
    )
    (pytester.path / "limits.toml").write_text("format = 1\n[default]\nsize_max = 90000\npeak_memory_max = 9e9\n")
    arguments = (*NAMED, "-n", "2", "--ldm-bundle", bundle, "--ldm-budget", "limits.toml")
    result = pytester.runpytest_subprocess(*map(str, arguments))
    result.assert_outcomes(passed=3)
    assert (tmp_path / "calls").read_text() == "evaluated\n"
