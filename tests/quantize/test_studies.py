"""What one layer costs and wins, and how errors grow along the trajectory: against values computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ldm_deploy.eval.metrics import psnr_db
from ldm_deploy.eval.parity import Probe, write_probes
from ldm_deploy.eval.studies import check_study, read_studies
from ldm_deploy.quantize import candidates, mixed, sensitivity
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.drawing import Drawing
from ldm_deploy.quantize.onnxruntime_cpu import OnnxRuntimeKit
from ldm_deploy.quantize.quantize import quantize_bundle
from ldm_deploy.quantize.search import Measured
from ldm_deploy.quantize.sensitivity import describe_study, study_layers, time_won
from ldm_deploy.quantize.timestep_error import measure_timestep_error
from ldm_deploy.runtime.bundle import read_bundle, verify_bundle, write_bundle
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from ldm_deploy.runtime.pipeline import load
from tests.quantize.conftest import make_feeds
from tests.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a U-Net that has something to quantize, and probes."""
    directory = write_tiny_bundle(tmp_path_factory.mktemp("studies") / "bundle")
    path = directory / "engines" / "unet-fp32.onnx"
    path.write_bytes(denoiser.read_bytes())
    engine = OnnxRuntimeEngine(path, threads=1)
    (directory / "probes").mkdir()
    write_probes(directory / "probes" / "unet.safetensors", [Probe(one, engine.run(one)) for one in [make_feeds(1)]])
    write_bundle(directory, json.loads((directory / "bundle.json").read_text()))
    return directory


@pytest.fixture(scope="module")
def kit(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimeKit:
    kit = OnnxRuntimeKit(denoiser, threads=1)
    feeds = [make_feeds(seed) for seed in range(6)]
    samples = Samples({name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]})
    kit.calibrate(samples, samples, tmp_path_factory.mktemp("kit"))
    return kit


def test_time_won_is_what_changed_kernels_save() -> None:
    before = [{"conv Conv": 5.0, "norm Norm": 9.0 + run, "act Silu": 1.0} for run in range(5)]
    after = [{"conv QLinearConv": 2.0, "q QuantizeLinear": 0.5, "norm Norm": 7.0, "act Silu": 1.0} for _ in range(5)]
    # The norm, whose time drifts, is in both engines and not counted.
    assert time_won(before, after) == {"median": 2.5, "ci95": [2.5, 2.5]}
    assert time_won(after, before)["median"] == -2.5
    noisy = [{"conv Conv": 5.0 + 0.1 * run} for run in range(11)]
    found = time_won(noisy, [{"conv QLinearConv": 2.0}] * 11)
    assert found["median"] == pytest.approx(3.5)
    assert 3.0 < found["ci95"][0] < 3.5 < found["ci95"][1] < 4.0


def test_every_layer_is_studied_alone_and_a_killed_study_goes_on(
    kit: OnnxRuntimeKit, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = Drawing(load(bundle, threads=1), ("sun", "rocket"), (0, 1), 3)
    widest = kit.settle(kit.recipes["conv+matmul"])
    feeds = make_feeds(0)
    probes = [Probe(feeds, OnnxRuntimeEngine(kit.model_path, threads=1).run(feeds))]
    journal = tmp_path / "unet.layers.jsonl"

    original, calls = sensitivity.image_quality, []

    def counted(*arguments: Any, **options: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(sensitivity, "image_quality", counted)

    def study() -> tuple[list[sensitivity.LayerStudy], float]:
        return study_layers("unet", kit, widest, feeds, tmp_path, probes=probes, drawing=drawing, journal=journal)

    with pytest.raises(KeyboardInterrupt):
        study()
    layers, latency = study()
    assert len(calls) == 5  # two were kept, the third is done again
    assert study()[0] == layers  # nothing is measured again
    assert len(calls) == 5
    assert [(layer.name, layer.op) for layer in layers] == [
        ("middle", "Conv"), ("to_q", "MatMul"), ("to_k", "MatMul"), ("to_v", "MatMul")
    ]  # fmt: skip
    assert latency > 0
    # The middle convolution, drawn by hand.
    alone = replace(widest, keep_float=("to_q", "to_k", "to_v"))
    kit.build(tmp_path / "alone.onnx", alone)
    images = [
        drawing.images("unet", OnnxRuntimeEngine(path, threads=1)) for path in (kit.model_path, tmp_path / "alone.onnx")
    ]
    assert images[0].shape == (4, 32, 32, 3)
    assert layers[0].image_psnr_db is not None
    by_hand = [min(psnr_db(a, b, peak=255), 100) for a, b in zip(*images, strict=True)]
    assert layers[0].image_psnr_db["mean"] == pytest.approx(np.mean(by_hand))
    assert layers[0].image_psnr_db["n"] == 4
    assert all(layer.time_won_ms is not None and layer.relative_error is not None for layer in layers)
    entry = describe_study("unet", kit, widest, layers, latency, ["middle"])
    assert [layer["changed"] for layer in entry["layers"]] == [True, False, False, False]
    protocol = {**drawing.protocol(), "threads": 1}
    check_study("sensitivity", {"format": 1, "created": "", "protocol": protocol, "studies": [entry]}, "here")


def test_errors_along_the_trajectory_are_those_that_were_planted(tmp_path: Path) -> None:
    """A U-Net that is 0.01 too large everywhere: the error of one step is known, and errors add up."""
    directory = write_tiny_bundle(tmp_path / "bundle")
    data = json.loads((directory / "bundle.json").read_text())
    model = onnx.load(str(directory / "engines" / "unet-fp32.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name == "bias":
            tensor.CopyFrom(numpy_helper.from_array(np.array(0.01, np.float32), "bias"))
    onnx.save(model, str(directory / "engines" / "unet-int8.onnx"))
    unet = next(engine for engine in data["engines"] if engine["component"] == "unet")
    data["engines"].append(
        {**unet, "id": "unet-int8-onnxruntime-cpu", "precision": "int8", "files": ["engines/unet-int8.onnx"]}
    )
    (fp32,) = data["variants"]
    engines = ["unet-int8-onnxruntime-cpu" if name == unet["id"] else name for name in fp32["engines"]]
    data["variants"].append({**fp32, "name": "mixed-onnxruntime-cpu", "engines": engines})
    write_bundle(directory, data)
    bundle = read_bundle(directory)
    content = measure_timestep_error(bundle, ["mixed-onnxruntime-cpu"], versus=fp32["name"], threads=1)
    check_study("timestep_error", content, "here")
    (series,) = content["series"]
    assert (series["component"], series["engine"]) == ("unet", "unet-int8-onnxruntime-cpu")
    assert [step["timestep"] for step in series["steps"]] == [999, 666, 333] or len(series["steps"]) == 3
    pipeline = load(directory, threads=1)
    ids = pipeline.tokenizer.encode(["", content["protocol"]["prompts"][0]])
    from ldm_deploy.runtime.noise import gaussian_noise

    noise = gaussian_noise([0], (4, 8, 8))
    prediction = pipeline.components["unet"].run(
        {
            "sample": np.concatenate([noise, noise]),
            "timestep": np.full(2, series["steps"][0]["timestep"]),
            **pipeline.components["text_encoder"].run({"input_ids": ids}),
        }
    )["prediction"]
    expected = 20 * np.log10(np.ptp(prediction) / 0.01)
    figures = series["steps"][0]["prediction_psnr_db"]
    assert figures["worst"] - 0.5 < expected < figures["mean"] + 3
    assert figures["n"] == 4
    latents = [step["latent_psnr_db"]["mean"] for step in series["steps"]]
    assert latents[0] > latents[-1]  # they grow
    same = measure_timestep_error(bundle, [fp32["name"]], versus=fp32["name"], threads=1)
    assert same["series"] == []  # nothing differs


def test_a_searched_bundle_holds_what_was_measured(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(specs: dict[str, Any], feeds: object, **options: object) -> dict[str, Any]:
        first = next(iter(specs))
        time = {name: 1.0 if name == first else 0.5 for name in specs}
        time |= {"trial": 0.4, "searched": 0.4}
        samples = {name: [time[name]] * 8 for name in specs}
        ratios = {
            name: {"versus": first, "median": 1 / time[name], "ci95_low": 1 / time[name], "ci95_high": 1 / time[name]}
            for name in specs
        }
        return {"failed": {}, "samples_ms": samples, "speedup": ratios}

    monkeypatch.setattr(candidates, "compare_engines", compare)
    monkeypatch.setattr(mixed, "compare_engines", compare)
    quantize_bundle(bundle, tmp_path / "out", components=["unet"], builds=4, threads=1)
    data = verify_bundle(tmp_path / "out").data
    engine = data["engines"][-1]
    assert engine["recipe"]["name"] == "searched"
    studies = read_studies(tmp_path / "out")
    assert set(studies) == {"search", "sensitivity", "timestep_error"}
    (study,) = studies["sensitivity"]["studies"]
    assert [layer["name"] for layer in study["layers"] if layer["changed"]] == engine["layers"]
    (found,) = studies["search"]["searches"]
    assert 1 <= len(found["measured"]) <= 4
    (best,) = [one for one in found["measured"] if one["best"]]
    assert best["layers"] == sorted(engine["layers"])
    assert studies["timestep_error"]["series"][0]["engine"] == "unet-int8-onnxruntime-cpu"
    # What was measured is taken up again: nothing is built for the same search.
    monkeypatch.setattr(mixed._Bench, "measure", lambda self, layers: pytest.fail("measured again"))
    quantize_bundle(bundle, tmp_path / "again", components=["unet"], builds=0, threads=1)
    (tmp_path / "out.search").rename(tmp_path / "third.search")
    quantize_bundle(bundle, tmp_path / "third", components=["unet"], builds=4, threads=1)
    assert read_studies(tmp_path / "third")["search"]["searches"] == studies["search"]["searches"]


def test_what_nothing_keeps_is_refused_with_the_closest(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(specs: dict[str, Any], feeds: object, **options: object) -> dict[str, Any]:
        first = next(iter(specs))
        ratios = {name: {"versus": first, "median": 0.9, "ci95_low": 0.88, "ci95_high": 0.92} for name in specs}
        samples = {name: [1.0 if name == first else 1.1] * 8 for name in specs}
        return {"failed": {}, "samples_ms": samples, "speedup": ratios}

    monkeypatch.setattr(candidates, "compare_engines", compare)
    monkeypatch.setattr(mixed, "compare_engines", compare)
    data = quantize_bundle(bundle, tmp_path / "out", components=["unet"], builds=3, threads=1).data
    last = data["refused"][-1]
    assert last["name"] == "unet-int8-onnxruntime-cpu (searched)"
    assert "assignments keeps" in last["reason"]
    assert "closest: " in last["reason"]
    assert " dB at 0.91x with " in last["reason"]
    assert all(
        layer["changed"] is None for layer in read_studies(tmp_path / "out")["sensitivity"]["studies"][0]["layers"]
    )


def test_a_fixed_recipe_that_breaks_the_quality_gives_way_to_the_searched_one(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faster in the measurement, but its images are planted to be far off: whatever has the middle convolution."""

    def compare(specs: dict[str, Any], feeds: object, **options: object) -> dict[str, Any]:
        first = next(iter(specs))
        speed = {name: 1.0 if name == first else 1.5 if name == "searched" else 3.0 for name in specs}
        ratios = {name: {"versus": first, "median": v, "ci95_low": v, "ci95_high": v} for name, v in speed.items()}
        return {"failed": {}, "samples_ms": {name: [1 / v] * 8 for name, v in speed.items()}, "speedup": ratios}

    def measure(self: Any, layers: Any) -> Measured:
        psnr = 20.0 if "middle" in layers else 60.0
        return Measured(tuple(layers), psnr, 1.5 + 0.01 * len(layers), (1.45, 1.6))

    monkeypatch.setattr(candidates, "compare_engines", compare)
    monkeypatch.setattr(mixed._Bench, "measure", measure)
    data = quantize_bundle(bundle, tmp_path / "out", components=["unet"], builds=6, threads=1).data
    engine = data["engines"][-1]
    assert "middle" not in engine["layers"]
    refused = engine["recipes_refused"]
    assert set(refused) >= {"conv+matmul", "conv"}
    assert refused["conv"].startswith("unet: INT8 (conv) draws images of 20.0 dB, 31.0 are asked for")
