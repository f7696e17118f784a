"""Bundles in, bundles out: what is proven stays, what is slow or wrong is refused with its reason."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from ldm_deploy.errors import QuantizationError, StageMissingError
from ldm_deploy.eval.budget import load_budget
from ldm_deploy.eval.parity import ParityResult, Probe, write_probes
from ldm_deploy.quantize import candidates, onnxruntime_cpu
from ldm_deploy.quantize import kit as kit_module
from ldm_deploy.quantize.calibration import CalibrationSet, Samples, collect, write_calibration
from ldm_deploy.quantize.candidates import Candidate, judge_speed, quantize_component
from ldm_deploy.quantize.onnxruntime_cpu import OnnxRuntimeKit
from ldm_deploy.quantize.profile import OpCost, profile_ops, slower_ops, summarize_events
from ldm_deploy.quantize.quantize import OTHER_SIZES, quantize_bundle, with_allowances
from ldm_deploy.quantize.scheme import Recipe
from ldm_deploy.runtime.bundle import verify_bundle, write_bundle
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from ldm_deploy.runtime.pipeline import load
from tests.quantize.conftest import make_feeds
from tests.tiny_bundle import write_tiny_bundle

Speeds = dict[str, float]


@pytest.fixture(scope="module")
def source(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a U-Net that has something to quantize, and probes."""
    directory = write_tiny_bundle(tmp_path_factory.mktemp("source") / "bundle")
    path = directory / "engines" / "unet-fp32.onnx"
    path.write_bytes(denoiser.read_bytes())
    engine = OnnxRuntimeEngine(path, threads=1)
    feeds = [make_feeds(1), make_feeds(2, batch=3, height=4, width=20)]
    (directory / "probes").mkdir()
    write_probes(directory / "probes" / "unet.safetensors", [Probe(one, engine.run(one)) for one in feeds])
    data = json.loads((directory / "bundle.json").read_text())
    write_bundle(directory, data)
    return directory


def plant_speeds(monkeypatch: pytest.MonkeyPatch, speeds: Speeds) -> None:
    """Replace the measurement; `speeds`: recipe -> speedup."""

    def compare(specs: dict[str, Any], feeds: object, **options: object) -> dict[str, Any]:
        first, *others = specs
        speedup = {
            name: {
                "median": speeds[name],
                "ci95_low": speeds[name] - 0.1,
                "ci95_high": speeds[name] + 0.1,
                "versus": first,
            }
            for name in others
        }
        return {"speedup": speedup, "failed": {}}

    monkeypatch.setattr(candidates, "compare_engines", compare)


def quantize(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    bundle = quantize_bundle(source, out, components=["unet"], threads=1, **options)
    verify_bundle(out)
    return bundle.data


def test_the_fastest_recipe_is_kept_and_described(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_speeds(monkeypatch, {"conv+matmul": 1.4, "conv": 1.7, "matmul": 1.0})
    data = quantize(source, tmp_path / "out")
    engine = data["engines"][-1]
    assert engine["id"] == "unet-int8-onnxruntime-cpu"
    assert engine["precision_found"] == {"fp32": 8, "int8": 1}
    assert engine["parity"]["passed"]
    assert (
        0 < engine["parity"]["relative_error"] < engine["parity"]["limit"] == load_budget().parity_limit("int8", "unet")
    )
    assert engine["speedup"]["median"] == 1.7
    assert engine["speedup"]["versus"] == "fp32-onnxruntime-cpu"
    assert engine["recipe"]["name"] == "conv"
    assert list(engine["recipes_refused"]) == ["matmul"]
    assert engine["size_bytes"] == (tmp_path / "out" / engine["files"][0]).stat().st_size
    assert data["refused"] == []
    # The decoder stays fp32, so this is not the int8 variant.
    assert [variant["name"] for variant in data["variants"]] == ["fp32-onnxruntime-cpu", "mixed-onnxruntime-cpu"]
    assert data["default_variant"] == "mixed-onnxruntime-cpu"
    assert data["parents"]["calibration"].startswith("sha256:")
    record = json.loads((tmp_path / "out.calibration.json").read_text())
    assert record["digest"] == data["parents"]["calibration"]
    assert not (tmp_path / "out" / "candidates").exists()


def test_what_the_decoder_saved_the_unet_may_have(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Components go by size; the larger one's limit counts what the smaller one has become, not what it was."""
    directory = tmp_path / "source"
    shutil.copytree(source, directory)
    shutil.copyfile(directory / "probes" / "unet.safetensors", directory / "probes" / "vae_decoder.safetensors")
    content = json.loads((directory / "bundle.json").read_text())
    write_bundle(directory, content)
    sizes = {engine["component"]: engine["size_bytes"] for engine in content["engines"]}
    first, last = sorted(("unet", "vae_decoder"), key=sizes.__getitem__)
    limits: dict[str, float] = {}

    def small(name: str, kit: Any, folder: Path, *rest: Any, size_limit: float, **options: Any) -> Any:
        limits[name] = size_limit
        path = folder / "conv" / f"{name}-int8.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(kit.model_path.read_bytes())
        return Candidate("conv", path, Recipe(), ParityResult(0.0, 0.1, "", "", (0.0,)), {"int8": 1}, size_bytes=1), []

    monkeypatch.setattr(candidates, "quantize_component", small)
    quantize_bundle(directory, tmp_path / "out", components=["unet", "vae_decoder"], threads=1)
    assert list(limits) == [first, last]
    others = sum(size for name, size in sizes.items() if name not in limits)
    assert limits[last] == pytest.approx(0.6 * sum(sizes.values()) - others - 1)


def test_the_quantized_bundle_draws(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_speeds(monkeypatch, {"conv+matmul": 2, "conv": 1.5, "matmul": 1.5})
    quantize(source, tmp_path / "out")
    images = [
        load(tmp_path / "out", variant=f"{name}-onnxruntime-cpu", threads=1)("sun", seed=3).astype(int)
        for name in ("fp32", "mixed")
    ]
    assert images[0].shape == (1, 32, 32, 3)
    assert 0 < np.abs(images[0] - images[1]).max() < 60
    assert np.abs(images[0] - images[1]).mean() < 6


def test_a_slow_engine_is_refused_with_the_ops_that_cost(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_speeds(monkeypatch, {"conv+matmul": 0.8, "conv": 1.05, "matmul": 0.9})
    data = quantize(source, tmp_path / "out")
    assert [engine["precision"] for engine in data["engines"]] == ["fp32"] * 4
    assert [variant["name"] for variant in data["variants"]] == ["fp32-onnxruntime-cpu"]
    assert data["default_variant"] == "fp32-onnxruntime-cpu"
    assert len(data["refused"]) == 3
    first, second, _ = data["refused"]
    assert first["name"] == "unet-int8-onnxruntime-cpu (conv+matmul)"
    assert first["reason"].startswith(
        "unet: INT8 (conv+matmul) is not faster than fp32: 0.80x (0.70 to 0.90); time goes to "
    )
    assert {"op", "ms", "share"} <= set(first["costly_ops"][0])
    assert second["speedup"]["ci95_low"] == pytest.approx(0.95)  # 1.05 times, but not surely


def test_a_wrong_engine_is_refused_whatever_its_speed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_speeds(monkeypatch, {"conv+matmul": 9, "conv": 9, "matmul": 9})
    original = onnxruntime_cpu.quantize_graph

    def swapped(model: Path, out: Path, *arguments: Any, **options: Any) -> Any:
        result = original(model, out, *arguments, **options)
        graph = onnx.load(str(out))
        for tensor in graph.graph.initializer:
            if tensor.name in ("middle.weight", "middle.weight_dequantized_0_quantized"):
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
        onnx.save(graph, str(out))
        return result

    monkeypatch.setattr(onnxruntime_cpu, "quantize_graph", swapped)
    data = quantize(source, tmp_path / "out")
    assert len(data["refused"]) == 3
    for entry in data["refused"]:
        assert not entry["parity"]["passed"]
        assert entry["speedup"] is None
        assert "differs from the reference: output 'prediction' on the probe " in entry["reason"]


def heavier(path: Path, out: Path) -> Path:
    """The same function with forty needless 256x256 products behind it."""
    model = onnx.load(str(path))
    model.graph.output[0].name = "prediction"
    last = model.graph.node[-1]
    last.output[0] = "light"
    rng = np.random.default_rng(0)
    constants = {"heavy": rng.standard_normal((256, 256)), "tiny": np.array(1e-30), "rows": rng.random((256, 256))}
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items())
    # From an input, so that nothing of it can be folded into a constant.
    model.graph.node.append(helper.make_node("ReduceMean", ["sample"], ["m"], keepdims=0))
    model.graph.node.append(helper.make_node("Mul", ["rows", "m"], ["x0"]))
    for index in range(40):
        model.graph.node.append(helper.make_node("MatMul", [f"x{index}", "heavy"], [f"y{index}"]))
        model.graph.node.append(helper.make_node("Tanh", [f"y{index}"], [f"x{index + 1}"]))
    model.graph.node.append(helper.make_node("ReduceMean", ["x40"], ["z"], keepdims=0))
    model.graph.node.append(helper.make_node("Mul", ["z", "tiny"], ["nothing"]))
    model.graph.node.append(helper.make_node("Add", ["light", "nothing"], ["prediction"]))
    onnx.save(model, str(out))
    return out


def test_a_planted_slow_engine_is_measured_and_refused_and_a_fast_one_is_not(denoiser: Path, tmp_path: Path) -> None:
    slow = heavier(denoiser, tmp_path / "slow.onnx")
    parity = ParityResult(0.0, 0.1, "", "", ())

    def judged(baseline: Path, path: Path) -> Candidate:
        candidate = Candidate("planted", path, Recipe(), parity, {"int8": 1})
        judge_speed("unet", OnnxRuntimeKit(baseline, threads=1), [candidate], make_feeds(0, batch=2), rounds=12)
        return candidate

    refused = judged(denoiser, slow)
    assert refused.speedup is not None
    assert refused.speedup["ci95_high"] < 1
    assert refused.refused is not None
    assert "is not faster than fp32" in refused.refused
    assert refused.costly_ops[0]["op"] in ("MatMul", "Tanh")
    kept = judged(slow, denoiser)
    assert kept.refused is None
    assert kept.speedup is not None
    assert kept.speedup["ci95_low"] > 1


@pytest.mark.parametrize("survivor", ["vae_decoder", None])
def test_an_encoder_goes_with_what_draws_and_not_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survivor: str | None
) -> None:
    directory = tmp_path / "source"
    shutil.copytree(source, directory)
    for name in ("vae_decoder", "vae_encoder"):
        shutil.copyfile(directory / "probes" / "unet.safetensors", directory / "probes" / f"{name}.safetensors")
    write_bundle(directory, json.loads((directory / "bundle.json").read_text()))

    def one(name: str, kit: Any, folder: Path, *rest: Any, **options: Any) -> Any:
        path = folder / "conv" / f"{name}-int8.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(kit.model_path.read_bytes())
        made = Candidate("conv", path, Recipe(), ParityResult(0.0, 0.1, "", "", (0.0,)), {"int8": 1}, size_bytes=1)
        return (made if name in ("vae_encoder", survivor) else None), []

    monkeypatch.setattr(candidates, "quantize_component", one)
    data = quantize_bundle(directory, tmp_path / "out", threads=1).data
    verify_bundle(tmp_path / "out")
    int8 = [engine["component"] for engine in data["engines"] if engine["precision"] == "int8"]
    assert int8 == ([survivor, "vae_encoder"] if survivor else [])
    assert [path.name for path in (tmp_path / "out" / "engines").glob("*int8*")] == [
        f"{name}-int8.onnx" for name in int8
    ]
    names = [variant["name"] for variant in data["variants"]]
    assert ("mixed-onnxruntime-cpu" in names) == (survivor is not None)


def test_other_sizes_than_a_students_own_are_allowed_more() -> None:
    teacher = {"default_size": [64, 32], "downsampling": 4}
    model = {**teacher, "distilled": {"steps": [1, 2]}}

    def probe(*shape: int) -> Probe:
        return Probe({"sample": np.zeros(shape), "timestep": np.zeros(shape[0])}, {})

    def allowances(probes: list[Probe], model: Any) -> list[float]:
        return [one.allowance for one in with_allowances(probes, model)]

    latents, other, swapped, image = probe(2, 4, 16, 8), probe(1, 4, 8, 8), probe(1, 4, 8, 16), probe(3, 3, 64, 32)
    assert allowances([latents, other, swapped, image], model) == [1.0, OTHER_SIZES, OTHER_SIZES, 1.0]
    assert allowances([latents, other], teacher) == [1.0, 1.0]
    assert allowances([latents, other], None) == [1.0, 1.0]  # a component of one's own has no size of its own
    assert allowances([Probe({"input_ids": np.zeros((1, 16))}, {})], model) == [1.0]


def test_of_a_large_component_two_engines_are_held_at_once_and_less_is_tried(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[list[str]] = []
    speeds = {"conv+matmul": {"fp32": 1.5, "bf16": 0.8}, "conv": {"fp32": 1.3, "bf16": 1.2}}

    def compare(specs: dict[str, Any], feeds: object, **options: object) -> dict[str, Any]:
        runs.append(list(specs))
        sibling, name = specs
        ratio = speeds[name][sibling]
        found = {"median": ratio, "ci95_low": ratio - 0.1, "ci95_high": ratio + 0.1, "versus": sibling}
        return {"speedup": {name: found}, "failed": {}}

    class Kit(OnnxRuntimeKit):
        def siblings(self) -> dict[str, Any]:
            (fp32,) = super().siblings().values()
            return {"fp32": fp32, "bf16": fp32}

    monkeypatch.setattr(kit_module, "LARGE_BYTES", 0)
    monkeypatch.setattr(candidates, "compare_engines", compare)
    feeds = make_feeds(0)
    probes = [Probe(feeds, OnnxRuntimeEngine(denoiser, threads=1).run(feeds))]
    samples = Samples({name: np.concatenate([make_feeds(seed)[name] for seed in range(20)]) for name in feeds})
    best, refused = quantize_component("unet", Kit(denoiser, threads=1), tmp_path, samples, probes, 0.1)
    assert runs == [[sibling, name] for name in speeds for sibling in ("fp32", "bf16")]
    assert best is not None
    assert (best.name, best.speedup) == ("conv", best.comparisons[0])
    assert [comparison["versus"] for comparison in best.comparisons] == ["fp32", "bf16"]
    (loser,) = refused
    assert loser.refused is not None
    assert "(conv+matmul) is not faster than bf16: 0.80x" in loser.refused


def test_an_engine_that_is_int8_in_name_only_is_refused(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_cpu, "precision_found", lambda path: {"fp32": 9})
    feeds = make_feeds(0)
    probes = [Probe(feeds, OnnxRuntimeEngine(denoiser, threads=1).run(feeds))]
    samples = Samples({name: np.concatenate([make_feeds(seed)[name] for seed in range(20)]) for name in feeds})
    kit = OnnxRuntimeKit(denoiser, recipes={"conv": Recipe(op_types=("Conv",))}, threads=1)
    best, refused = quantize_component("unet", kit, tmp_path, samples, probes, 0.1)
    assert best is None
    assert refused[0].refused is not None
    assert "runs none of the nodes quantized by recipe conv in INT8" in refused[0].refused


def test_a_foreign_calibration_file_is_refused(source: Path, tmp_path: Path) -> None:
    pipeline = load(source, threads=1)
    data = collect(pipeline, "sha256:" + "f" * 64, prompts=("sun",), trajectories=((2, True),))
    write_calibration(data, tmp_path / "foreign.npz")
    with pytest.raises(QuantizationError, match="collected from another model"):
        quantize(source, tmp_path / "out", calibration=tmp_path / "foreign.npz")
    empty = CalibrationSet("sha256:" + "0" * 64, {"vae_decoder": data.arrays["vae_decoder"]}, {})
    write_calibration(empty, tmp_path / "empty.npz")
    with pytest.raises(QuantizationError, match="no samples for unet; it has vae_decoder"):
        quantize(source, tmp_path / "out", calibration=tmp_path / "empty.npz")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_quantized_is_said(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"text_encoder cannot be quantized: .* recipes for unet, vae_decoder"):
        quantize_bundle(source, tmp_path / "out", components=["text_encoder"])
    with pytest.raises(StageMissingError, match="'tensorrt-cuda' is not built yet; there is: onnxruntime-cpu, openvin"):
        quantize_bundle(source, tmp_path / "out", target="tensorrt-cuda")
    with pytest.raises(QuantizationError, match=r"fp32 engines for openvino-cpu of nothing.*export it with --target"):
        quantize_bundle(source, tmp_path / "out", target="openvino-cpu")


def test_profile_sums_kernels_and_leaves_the_first_run_out(denoiser: Path) -> None:
    costs = profile_ops(denoiser, make_feeds(0), runs=3, threads=1)
    assert sum(cost.share for cost in costs) == pytest.approx(1)
    assert costs == sorted(costs, key=lambda cost: -cost.ms)
    assert sum(cost.calls for cost in costs if "Softmax" in cost.op) == 1

    def kernel(start: int, duration: int) -> dict[str, Any]:
        return {"cat": "Node", "name": "a_kernel_time", "ts": start, "dur": duration, "args": {"op_name": "Conv"}}

    events = [{"name": "model_run", "ts": 0}, kernel(1, 900), {"name": "model_run", "ts": 1000}, kernel(1001, 100)]
    assert summarize_events(events, 1) == [OpCost("Conv", 0.1, 1.0, 1)]
    before = [OpCost("Conv", 5, 0.5, 1), OpCost("Softmax", 1, 0.1, 1)]
    after = [replace(before[0], op="QLinearConv", ms=2), replace(before[1], ms=4), OpCost("Conv", 1, 0.1, 1)]
    assert [cost.op for cost in slower_ops(before, after)] == ["Softmax", "QLinearConv"]
