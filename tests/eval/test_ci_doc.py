"""docs/ci.md is run: its job on a toy bundle, as it is and with a planted regression, and its example test."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lpips
import onnx
import onnxruntime
import pytest
import tokenizers
import torch

from ldm_deploy.eval import compare, lpips_distance
from ldm_deploy.eval.budget import load_budget
from ldm_deploy.eval.grid import Grid
from tests.eval.test_pytest_plugin import NAMED, shift_colours, tamper
from tests.tiny_bundle import write_tiny_bundle

pytest_plugins = ["pytester"]

# pytester forgets what is imported during a test, and these cannot be imported twice.
ONCE = (lpips, onnx, onnxruntime, tokenizers, torch)

# Not the document's: a toy is its own baseline and no faster than itself.
LIMITS = "format = 1\n[default]\npsnr_db_min = 30.0\n[regression]\ncolour_change_max = 0.2\nsize_rise_max = 0.02\n"


@pytest.fixture
def document(root: Path) -> str:
    return (root / "docs" / "ci.md").read_text(encoding="utf-8")


def fenced(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def steps(document: str) -> list[str]:
    """The commands of the YAML blocks, in order."""
    return [line for block in fenced(document, "yaml") for line in re.findall(r"^\W*run: (.*)$", block, re.MULTILINE)]


@pytest.fixture
def shell(
    pytester: pytest.Pytester, ldm_deploy_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], int]:
    """Runs a command where a runner would, and returns its exit code; installing and exporting was done."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))

    def run(line: str) -> int:
        words = shlex.split(line)
        if words[0] == "pip" or words[:2] == ["ldm-deploy", "optimize"]:
            return 0
        if words[0] == "ldm-deploy":
            return int(ldm_deploy_cli(*words[1:], "--threads", "1").code)
        if words[0] == "pytest":
            return int(pytester.runpytest_inprocess(*NAMED, *words[1:]).ret)
        return subprocess.run(line, shell=True, check=False, env=os.environ).returncode

    return run


@pytest.fixture
def bundle(
    pytester: pytest.Pytester,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stand_in_baseline: Callable[[Path], None],
) -> Path:
    monkeypatch.setattr(lpips_distance, "_weights_file", lambda _: tmp_path / "none.pth")
    monkeypatch.setattr(compare, "load_grid", lambda *_: Grid(("red apple", "sun"), (0, 1)))
    monkeypatch.setattr(compare, "usable_threads", lambda: 1)  # as `shell` asks of the command line
    bundle = write_tiny_bundle(pytester.path / "build" / "reference")
    stand_in_baseline(bundle)
    (pytester.path / "limits.toml").write_text(LIMITS)
    return bundle


def test_the_job_passes_and_then_catches_a_regression(document: str, bundle: Path, shell: Callable[[str], int]) -> None:
    store, *_ = fenced(document, "bash")[0].splitlines()
    assert shell(store) in (0, 3, 4)  # whether a toy is faster than itself, as the shipped limits ask, is chance
    assert Path("stored.json").is_file()
    job = steps(document)
    assert [shell(line) for line in job] == [0] * len(job)
    assert (bundle.parent / "report" / "junit.xml").is_file()
    assert "**Chosen: fp32-onnxruntime-cpu.**" in Path("summary.md").read_text(encoding="utf-8")

    tamper(bundle, "vae_decoder", shift_colours)
    shutil.rmtree(bundle.parent / "report")
    codes = {line.split()[1]: shell(line) for line in job}
    assert codes["eval"] == 3
    assert codes["--ldm-bundle"] == pytest.ExitCode.TESTS_FAILED
    summary = Path("summary.md").read_text(encoding="utf-8")
    assert re.search(
        r"\| fp32-onnxruntime-cpu \| colour_change_max .* \| fail \| 0.\d+ is above the limit 0.2", summary
    )
    for file in ("report/junit.xml", "junit.xml"):
        failures = list(ElementTree.parse(bundle.parent / file).iter("failure"))
        assert len(failures) == 1
        assert "is above the limit 0.2" in str(failures[0].get("message"))
    assert json.loads((bundle.parent / "report" / "report.json").read_text())["against"]["path"] == "stored.json"


def test_what_the_job_installs_is_there(root: Path, document: str) -> None:
    import tomllib

    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (line,) = [line for line in steps(document) if line.startswith("pip ")]
    assert set(re.findall(r"ldm-deploy\[(\w+)\]", line)) <= set(extras)


def test_the_limits_load(document: str, tmp_path: Path) -> None:
    (text,) = fenced(document, "toml")
    (tmp_path / "limits.toml").write_text(text)
    budget = load_budget(tmp_path / "limits.toml")
    assert budget.tolerances_for("int8-onnxruntime-cpu").limits["psnr_db_drop_max"] == 1.0
    assert budget.tolerances_for("fp32-onnxruntime-cpu").limits["psnr_db_drop_max"] == 0.5


def test_the_example_of_the_fixtures_runs(document: str, tmp_path: Path, pytester: pytest.Pytester) -> None:
    (example,) = fenced(document, "python")
    server = """
import pytest, ldm_deploy, types
from pathlib import Path
pipeline = ldm_deploy.load({bundle!r})
my_server = types.SimpleNamespace(draw=lambda prompt, seed: pipeline(prompt, seed=seed))
"""
    bundle = write_tiny_bundle(tmp_path / "bundle")
    pytester.makepyfile(server.format(bundle=str(bundle)) + example)
    result = pytester.runpytest_inprocess(*NAMED, "--ldm-bundle", str(bundle), "-k", "my_server")
    assert result.parseoutcomes()["passed"] == 1
