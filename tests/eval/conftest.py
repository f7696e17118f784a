"""A made-up evaluation of one bundle: measurements by hand, everything after them by the real code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_deploy.eval import compare
from ldm_deploy.eval.budget import load_budget
from ldm_deploy.eval.compare import PROTOCOL, Evaluation, judge
from ldm_deploy.eval.grid import Grid
from ldm_deploy.eval.machine import machine
from ldm_deploy.eval.measure import BASELINE, Measured
from tests.eval.states import prepare

CONDITIONS = {"load_average": [0.0, 0.0, 0.0], "frequency_mhz": [2400.0, 2400.0], "stolen_s": 1.5}
FP32, INT8 = "fp32-onnxruntime-cpu", "int8-onnxruntime-cpu"
GRID = Grid(("red apple", "<b>sun</b> & co"), (0, 1))


def engine(component: str, precision: str, size: int) -> dict[str, Any]:
    return {
        "id": f"{component}-{precision}",
        "component": component,
        "precision": precision,
        "runtime": "onnxruntime",
        "device": "cpu",
        "files": [f"{component}-{precision}.onnx"],
        "size_bytes": size,
        "precision_found": {precision: 7},
        "parity": {"relative_error": 1e-5, "limit": 1e-4, "passed": True},
    }


class Case:
    """What was measured; tests change it before they ask for the `report`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        engines = [engine("unet", "fp32", 900), engine("vae_decoder", "fp32", 100), engine("unet", "int8", 300)]
        for entry in engines:
            (folder / entry["files"][0]).write_bytes(bytes(entry["size_bytes"]))
        common = {"steps": 50, "guidance_scale": 5.0, "sampler": "ddim"}
        self.data: dict[str, Any] = {
            "name": "toy",
            "engines": engines,
            "variants": [
                {"name": FP32, "engines": ["unet-fp32", "vae_decoder-fp32"], **common},
                {"name": INT8, "engines": ["unet-int8", "vae_decoder-fp32"], **common},
            ],
            "refused": [],
        }
        rng = np.random.default_rng(0)
        images = np.kron(rng.integers(0, 256, (4, 8, 8, 3)), np.ones((1, 4, 4, 1))).astype(np.uint8)
        self.found = Measured()
        self.found.images = {BASELINE: images, FP32: images.copy(), INT8: images ^ 1}
        load = rng.uniform(1, 1.2, 4)  # of the machine, the same for all in a round
        self.found.latency_ms = {BASELINE: list(100 * load), FP32: list(60 * load), INT8: list(40 * load)}
        self.found.memory_bytes = {BASELINE: 400 * 2**20, FP32: 120 * 2**20, INT8: 110 * 2**20}
        self.found.load_ms = dict.fromkeys(self.found.images, 10.0)
        self.found.component_ms = {"unet": {BASELINE: [4.0, 4.1], "unet-fp32": [2.0, 2.1], "unet-int8": [1.0, 1.05]}}
        memory = {
            "before_load_bytes": 50 * 2**20, "after_load_bytes": 80 * 2**20, "peak_working_bytes": 90 * 2**20,
            "weights_bytes": 30 * 2**20, "activations_bytes": 10 * 2**20, "reason": None,
            "gpu_peak_bytes": None, "gpu_reason": "it runs on the processor",
        }  # fmt: skip
        start = {"process": 100.0, "import": 200.0, "load": 210.0, "first_image": 800.0}
        self.found.memory = dict.fromkeys(self.found.images, memory)
        self.found.cold_start_ms = dict.fromkeys(self.found.images, start)
        self.found.batch_ms = {1: {name: [100.0] for name in self.found.images}, 4: {FP32: [320.0], INT8: [320.0]}}
        self.found.component_batch_ms = {"unet": {1: {"unet-int8": [1.25]}, 8: {"unet-int8": [8.0]}}}
        self.found.clock = dict.fromkeys(("unet-fp32", "unet-int8"), "host")
        self.baseline: dict[str, Any] = {
            "name": BASELINE, "status": "ok", "reason": None, "size_bytes": 1000, "stored_bytes": 500,
            "latency_ms": {"median": 105.0, "p5": 100.0, "p95": 120.0, "samples": 4}, "load_ms": 10.0,
            "peak_memory_bytes": 400 * 2**20, "components": [],
        }  # fmt: skip
        self.budget = load_budget()

    def lose(self, name: str, reason: str) -> None:
        """As if the variant, or the baseline, had failed."""
        self.found.failed[name] = reason
        for table in (self.found.images, self.found.latency_ms, self.found.memory_bytes):
            table.pop(name, None)  # type: ignore[attr-defined]
        if name == BASELINE:
            nothing = dict.fromkeys(("latency_ms", "load_ms", "peak_memory_bytes"))
            self.baseline |= {"status": "failed", "reason": reason, **nothing}

    def report(self) -> Evaluation:
        content = {
            "format": 1,
            "created": "2026-01-01T00:00:00+00:00",
            "duration_s": 1.0,
            "source": {"name": "toy", "digest": None},
            "protocol": {
                "prompts_sha256": GRID.prompts_sha256, "prompts": list(GRID.prompts), "seeds": list(GRID.seeds),
                "sampler": "ddim", "steps": 50, "guidance_scale": 5.0, "size": [32, 32], "threads": 2, **PROTOCOL,
            },
            "machine": {
                **machine(2), "load_average_after": [0.0, 0.0, 0.0],
                "conditions": {"before": CONDITIONS, "after": CONDITIONS},
            },
            "default_variant": FP32,
            **judge(self.data, self.folder, self.found, GRID, self.budget, self.baseline),
        }  # fmt: skip
        return Evaluation(content, self.found.images, GRID)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    folder = tmp_path / "toy"
    folder.mkdir()
    return Case(folder)


@pytest.fixture
def stand_in_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a copy of a toy bundle the baseline of evaluations (a torch reference would take half a minute)."""
    reference = tmp_path / "stand-in-reference"
    reference.mkdir()
    save_file({"weight": np.zeros(300, np.float16)}, str(reference / "unet.safetensors"))
    sampling = {"sampler": "ddim", "steps": 3, "guidance_scale": 2.0}
    (reference / "model.json").write_text(json.dumps({"format": 1, "sampling": sampling}))
    original, measure = tmp_path / "stand-in-baseline", compare.measure

    def with_stand_in(specs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        specs[BASELINE] = {"kind": "variant", "bundle": str(original), "variant": FP32}
        return measure(specs, *arguments, **options)

    def use(bundle: Path) -> None:
        shutil.copytree(bundle, original)
        monkeypatch.setattr(compare, "find_reference", lambda *_: (reference, None))
        monkeypatch.setattr(compare, "measure", with_stand_in)

    return use


@pytest.fixture(scope="session")
def report_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Evaluation]:
    """The report in one of the states of `states.py`. Made once, for tests that only read it."""

    @cache
    def make(state: str) -> Evaluation:
        report: Evaluation = prepare(Case(tmp_path_factory.mktemp("toy")), state)
        return report

    return make


@pytest.fixture
def budget_of(tmp_path: Path) -> Callable[[str], Any]:
    """A budget from the text below its `format` line."""

    def make(text: str) -> Any:
        path = tmp_path / "budget.toml"
        path.write_text(f"format = 1\n{text}")
        return load_budget(path)

    return make
