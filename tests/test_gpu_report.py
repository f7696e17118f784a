"""`make gpu-report`, tried out on the processor: what is measured, what is not, and what is wrong, each as a row."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def command(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    module = importlib.import_module("gpu_report")
    monkeypatch.setattr(module, "COMPONENTS", ("text_encoder",))
    monkeypatch.setattr(module, "TORCH_ROWS", (("fp32", False), ("bf16", False)))
    return module


def test_every_row_is_measured_or_says_why(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm_deploy.export import targets

    missing = targets.Target("tensorrt", "cpu", ">=10", (), {"fp32": "fp32"}, targets._to_tensorrt)
    wanted = {"onnxruntime-cpu": targets.TARGETS["onnxruntime-cpu"], "tensorrt-cpu": missing}
    monkeypatch.setattr(targets, "TARGETS", wanted)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    # In processes of their own they would not see what is set here.
    monkeypatch.setattr(command, "isolated", lambda empty, end, function, arguments: function(*arguments))
    report = command.run(["reference"], "cpu", tmp_path, 5, 600.0)
    rows = {row["name"]: row for row in report["components"]["text_encoder of reference"]}
    assert list(rows) == [
        "fp32-torch",
        "bf16-torch",
        "fp32-onnxruntime-cpu",
        "fp16-onnxruntime-cpu",
        "fp32-tensorrt-cpu",
    ]
    for name, row in rows.items():
        if name == "fp32-tensorrt-cpu":
            assert row["status"] == "not measured"
            assert "TensorRT is not installed" in row["reason"]
            continue
        assert row["status"] == "ok"
        assert row["latency_ms"]["samples"] == 5
        assert (row["speedup"] is None) == (name == "fp32-torch")
        assert row["parity"]["passed"]
    assert rows["fp32-torch"]["parity"]["relative_error"] < 1e-6 < rows["bf16-torch"]["parity"]["relative_error"]
    text = (tmp_path / "gpu.md").read_text("utf-8")
    assert "| fp32-tensorrt-cpu | not measured: TensorRT is not installed" in text
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8")) == report
    # What is there is not measured again.
    monkeypatch.setattr(command, "measure", lambda *arguments: pytest.fail("measured again"))
    assert command.run(["reference"], "cpu", tmp_path, 5, 600.0)["components"] == report["components"]


def test_a_wrong_row_is_marked(command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_deploy.eval import worker
    from ldm_deploy.eval.parity import write_probes

    original = worker.open_module

    def open_wrong(spec: dict[str, Any], threads: int | None = None) -> Any:
        engine = original(spec, threads)
        for parameter in engine.module.parameters():
            parameter.data += 0.05
        return engine

    monkeypatch.setattr(worker, "open_module", open_wrong)
    probes = tmp_path / "probes.safetensors"
    write_probes(probes, [command_probe()])
    first = command.torch_row(command_source(), "text_encoder", probes, "cpu", "fp32", False)
    assert not first["parity"]["passed"]
    cells = command._cells({**first, "latency_ms": {"median": 1.0, "p5": 1.0, "p95": 1.0}})
    assert "**above 0.0001**" in cells[2]


def test_what_is_not_installed_is_not_tried(command: ModuleType, tmp_path: Path) -> None:
    if command.tool_versions("torch-tensorrt")["torch-tensorrt"] != "absent":
        pytest.skip("torch-tensorrt is installed")
    made = command.engine_row(command_source(), "text_encoder", "torch-tensorrt-cuda", "fp16", tmp_path, 1)
    assert (made["status"], made["reason"]) == ("not measured", "torch-tensorrt is not installed")


def test_a_crash_is_a_row(command: ModuleType) -> None:
    empty = command.row("fp16-aoti-cuda", "fp16", "aoti")
    assert command.isolated(empty, time.monotonic() + 60, dict, ({"status": "ok"},)) == {"status": "ok"}
    crashed = command.isolated(empty, time.monotonic() + 60, os._exit, (7,))
    assert crashed == {**empty, "status": "failed", "reason": "its process ended with code 7"}
    late = command.isolated(empty, time.monotonic() + 0.01, time.sleep, (600,))
    assert late["reason"] == "not built within --build-limit"


def test_without_a_baseline_nothing_is_compared(command: ModuleType, tmp_path: Path) -> None:
    first = command.row("fp32-torch", "fp32", "torch") | {"status": "failed", "reason": "planted"}
    other = command.row("fp16-torch", "fp16", "torch") | {"spec": {"kind": "module"}}
    rows = command.measure([first, other], "unet", tmp_path / "absent", 5)
    assert [made["reason"] for made in rows] == ["planted", "there is no fp32-torch to compare with"]
    assert command._cells(rows[1])[0].startswith("not measured")


def command_source() -> Path:
    from ldm_deploy.models.sources import resolve_source

    return resolve_source("reference")


def command_probe() -> Any:
    from ldm_deploy.eval.parity import Probe
    from ldm_deploy.models.sources import load_source

    ids = np.zeros((1, 16), np.int64)
    with torch.no_grad():
        states = load_source(command_source()).components()["text_encoder"](torch.from_numpy(ids))
    return Probe({"input_ids": ids}, {"encoder_hidden_states": states.numpy()})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "gpu_report.py")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        4, "error: not measured: torch finds no NVIDIA GPU here; run it on a machine that has one",
    )  # fmt: skip
