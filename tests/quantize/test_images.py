"""An INT8 engine that is the reference, and fast, but whose images are not what the budget asks for, is not kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_deploy.eval.parity import Probe, Runnable, write_probes
from ldm_deploy.quantize import candidates
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.candidates import quantize_component
from ldm_deploy.quantize.images import ImageGate
from ldm_deploy.quantize.onnxruntime_cpu import OnnxRuntimeKit
from ldm_deploy.quantize.quantize import quantize_bundle
from ldm_deploy.quantize.scheme import Recipe
from ldm_deploy.runtime.bundle import write_bundle
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from tests.quantize.conftest import make_feeds
from tests.tiny_bundle import write_tiny_bundle


class Easel:
    """Stands for a drawing: its images are an engine's output, 20 grey levels per unit, not rounded."""

    def images(self, component: str, engine: Runnable) -> np.ndarray:
        value = engine.run(make_feeds(5))["prediction"]
        return (128 + 20 * value.astype(np.float64)).transpose(0, 2, 3, 1)[..., :3]


def gate(psnr_db_min: float, count: int = 1) -> ImageGate:
    drawing: Any = Easel()
    return ImageGate(drawing, psnr_db_min, count)


def plant_speeds(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    runs: list[list[str]] = []

    def compare(specs: Mapping[str, Any], feeds: object, **options: object) -> dict[str, Any]:
        first, *others = specs
        runs.append(others)
        found = {"median": 1.5, "ci95_low": 1.4, "ci95_high": 1.6, "versus": first}
        return {"speedup": dict.fromkeys(others, found), "failed": {}}

    monkeypatch.setattr(candidates, "compare_engines", compare)
    return runs


def test_what_one_component_takes_the_others_do_not_have() -> None:
    one = gate(31.0, 2)
    assert one.asked_db == pytest.approx(31 + 10 * math.log10(2))  # half of the squared error
    one.settle(40.0)
    assert 10 ** (-one.asked_db / 10) == pytest.approx(10**-3.1 - 10**-4)
    other = gate(31.0, 2)
    other.settle(None)  # it stayed in float
    assert other.asked_db == pytest.approx(31.0)
    spent = gate(31.0, 2)
    spent.settle(30.0)
    assert spent.asked_db > 200  # nothing is left


@pytest.fixture
def parts(denoiser: Path) -> dict[str, Any]:
    feeds = make_feeds(0)
    return {
        "samples": Samples({name: np.concatenate([make_feeds(seed)[name] for seed in range(20)]) for name in feeds}),
        "probes": [Probe(feeds, OnnxRuntimeEngine(denoiser, threads=1).run(feeds))],
        "limit": 0.1,
    }


def test_layers_are_spared_until_the_images_are_good_enough(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any]
) -> None:
    runs = plant_speeds(monkeypatch)
    kit = OnnxRuntimeKit(denoiser, recipes={"conv+matmul": Recipe()}, threads=1)
    fp32 = OnnxRuntimeEngine(denoiser, threads=1)

    def psnr_db(path: Path) -> float:
        return gate(0.0).psnr_db("unet", fp32, OnnxRuntimeEngine(path, threads=1))

    first, refused = quantize_component("unet", kit, tmp_path / "first", **parts, gate=gate(1.0))
    assert first is not None
    assert refused == []  # good enough as it is
    plain = psnr_db(first.path)
    better, refused = quantize_component("unet", kit, tmp_path / "second", **parts, gate=gate(plain + 2))
    assert better is not None
    assert better.name == "conv+matmul, spared 1"
    assert better.recipe.keep_float == ("middle",)  # which causes most of the error
    assert psnr_db(better.path) >= plain + 2
    assert better.parity.passed
    assert better.found["int8"] == first.found["int8"] - 1
    assert better.speedup is not None  # measured, with what is left of the others
    assert runs[-1] == ["conv+matmul, spared 1"]
    (loser,) = refused
    assert loser.refused == (
        f"unet: INT8 (conv+matmul) draws images of {plain:.1f} dB, {plain + 2:.1f} are asked for "
        "(psnr_db_min of the budget, less what other components take)"
    )
    none, refused = quantize_component("unet", kit, tmp_path / "third", **parts, gate=gate(90.0))
    assert none is None
    assert ["are asked for" in str(one.refused) for one in refused] == [True] * len(refused)


def test_a_worse_engine_is_not_kept_for_want_of_a_better_one(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any]
) -> None:
    """The next recipe has its turn, and what the component takes is told to the gate."""
    plant_speeds(monkeypatch)
    recipes = {"conv": Recipe(op_types=("Conv",)), "matmul": Recipe(op_types=("MatMul",))}
    kit, fp32 = OnnxRuntimeKit(denoiser, recipes=recipes, threads=1), OnnxRuntimeEngine(denoiser, threads=1)
    found = {}
    for name, recipe in recipes.items():
        alone = OnnxRuntimeKit(denoiser, recipes={name: recipe}, threads=1)
        best = quantize_component("unet", alone, tmp_path / name, **parts)[0]
        assert best is not None
        found[name] = gate(0.0).psnr_db("unet", fp32, OnnxRuntimeEngine(best.path, threads=1))
    assert found["conv"] < found["matmul"]
    asked = gate((found["conv"] + found["matmul"]) / 2, 2)
    asked.settle(None)
    best, refused = quantize_component("unet", kit, tmp_path / "both", **parts, gate=asked)
    assert best is not None
    assert best.name == "matmul"
    assert [one.name for one in refused] == ["conv"]  # one layer: none can be spared
    assert asked._left == pytest.approx(10 ** -(sum(found.values()) / 20) - 10 ** (-found["matmul"] / 10))


def test_the_budget_says_what_images_must_keep(denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_speeds(monkeypatch)
    directory = write_tiny_bundle(tmp_path / "source")
    path = directory / "engines" / "unet-fp32.onnx"
    path.write_bytes(denoiser.read_bytes())
    engine = OnnxRuntimeEngine(path, threads=1)
    (directory / "probes").mkdir()
    write_probes(directory / "probes" / "unet.safetensors", [Probe(make_feeds(1), engine.run(make_feeds(1)))])
    write_bundle(directory, json.loads((directory / "bundle.json").read_text()))
    budget = tmp_path / "budget.toml"
    for psnr_db, kept in ((10, True), (99, False)):
        budget.write_text(f"format = 1\n[default]\npsnr_db_min = {psnr_db}\n")
        made = quantize_bundle(directory, tmp_path / f"out-{psnr_db}", components=["unet"], threads=1, budget=budget)
        assert (made.data["engines"][-1]["precision"] == "int8") == kept
        assert any("99.0 are asked for" in entry["reason"] for entry in made.data["refused"]) != kept
