"""INT8 for OpenVINO: which layers, that undoing one gives the float layer back, and that losers are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ldm_deploy.errors import QuantizationError
from ldm_deploy.eval.parity import Probe, relative_error, write_probes
from ldm_deploy.quantize import candidates, openvino_cpu
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.candidates import quantize_component
from ldm_deploy.quantize.openvino_cpu import OpenVinoKit, check_activations
from ldm_deploy.quantize.openvino_graph import layers_of, quantized_layers, restore
from ldm_deploy.quantize.scheme import OpenVinoRecipe
from ldm_deploy.runtime.bundle import verify_bundle, write_bundle
from ldm_deploy.runtime.engine_openvino import OpenVinoEngine
from ldm_deploy.runtime.pipeline import load
from tests.quantize.conftest import make_feeds
from tests.tiny_bundle import write_tiny_bundle

openvino = pytest.importorskip("openvino")
pytest.importorskip("nncf")


def to_xml(onnx: Path, xml: Path) -> Path:
    openvino.save_model(openvino.Core().read_model(onnx), xml, compress_to_fp16=False)
    return xml


def stacked(count: int) -> Samples:
    feeds = [make_feeds(seed) for seed in range(count)]
    return Samples({name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]})


@pytest.fixture(scope="module")
def xml(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_xml(denoiser, tmp_path_factory.mktemp("openvino") / "unet-fp32.xml")


@pytest.fixture(scope="module")
def probes(xml: Path) -> list[Probe]:
    engine = OpenVinoEngine(xml, threads=1)
    return [Probe(feeds, engine.run(feeds)) for feeds in (make_feeds(1), make_feeds(2, batch=3, height=4, width=20))]


@pytest.fixture(scope="module")
def kit(xml: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenVinoKit:
    """Calibrated once."""
    kit = OpenVinoKit(xml, threads=1)
    kit.calibrate(stacked(8), stacked(4), tmp_path_factory.mktemp("kit"))
    return kit


def test_layers_are_read_from_the_graph(xml: Path) -> None:
    layers = layers_of(openvino.Core().read_model(xml))
    kinds = [(layer.kind, layer.channels, layer.rows) for layer in layers]
    assert kinds.count(("Convolution", (4, 16), True)) == 1
    assert kinds.count(("Convolution", (16, 16), True)) == 1
    assert kinds.count(("Convolution", (16, 4), True)) == 1
    assert kinds.count(("MatMul", (1, 16), False)) == 1  # the timestep's Gemm: as many rows as the batch
    assert kinds.count(("MatMul", (8, 16), True)) == 2
    assert kinds.count(("attention", (0, 0), True)) == 2
    assert len({layer.name for layer in layers}) == len(layers)


def test_narrow_layers_and_the_timestep_stay_float(kit: OpenVinoKit) -> None:
    chosen = [layer.op for layer in kit.layers(kit.settle(OpenVinoRecipe()))]
    assert chosen.count("Convolution") == 1  # the middle one
    assert chosen.count("MatMul") == 3
    assert {layer.op for layer in kit.layers(OpenVinoRecipe(op_types=("Convolution",)))} == {"Convolution"}
    with pytest.raises(QuantizationError, match="no Convolution that NNCF quantizes"):
        kit.build(Path("never.xml"), kit.settle(OpenVinoRecipe(op_types=("Convolution",), min_channels=64)))


def test_a_graph_with_every_layer_restored_is_the_original(
    kit: OpenVinoKit, xml: Path, probes: list[Probe], tmp_path: Path
) -> None:
    assert set(kit._quantized) == set(openvino_cpu.ALPHAS)
    for scaling, path in kit._quantized.items():
        model, original = (openvino.Core().read_model(file) for file in (path, xml))
        names = quantized_layers(model)
        assert names, scaling
        restore(model, original, names)
        assert quantized_layers(model) == set()
        openvino.save_model(model, tmp_path / f"{path.stem}.xml", compress_to_fp16=False)
        engine = OpenVinoEngine(tmp_path / f"{path.stem}.xml", threads=1)
        for probe in probes:
            assert relative_error(probe.outputs["prediction"], engine.run(probe.inputs)["prediction"]) < 1e-5


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> tuple[OpenVinoKit, Path]:
    """The parts of a U-Net that NNCF rounds for the layers behind them, and others read: a skip connection whose
    concatenation a shortcut and a norm read, an upsampled map, the sines of the timestep. With what it is made from."""
    draw = np.random.default_rng(0)
    weights: list[Any] = []

    def constant(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    def conv(source: str, out: str, channels: tuple[int, int], size: int = 3) -> Any:
        weight = draw.standard_normal((channels[1], channels[0], size, size)).astype(np.float32)
        name = constant(f"{out}.w", weight / np.float32(np.sqrt(channels[0] * size * size)))
        return helper.make_node("Conv", [source, name], [out], name=out, pads=[size // 2] * 4)

    frequencies = constant("frequencies", np.linspace(0.1, 2, 8, dtype=np.float32)[None])
    product = constant("embed.w", draw.standard_normal((16, 16)).astype(np.float32) / 4)
    scales = constant("scales", np.array([1, 1, 2, 2], np.float32))
    node = helper.make_node
    nodes = [
        node("Mul", ["t", frequencies], ["angles"]),
        node("Sin", ["angles"], ["sin"]), node("Cos", ["angles"], ["cos"]),
        node("Concat", ["sin", "cos"], ["sines"], axis=1),
        node("MatMul", ["sines", product], ["embed"], name="embed"),
        conv("x", "first", (8, 16)), node("Tanh", ["first"], ["down"]),
        conv("down", "middle", (16, 16)), node("Tanh", ["middle"], ["up"]),
        node("Concat", ["down", "up"], ["joined"], axis=1),
        conv("joined", "shortcut", (32, 16), 1),
        node("Exp", ["joined"], ["normed"]), conv("normed", "inner", (32, 16)),
        node("Add", ["shortcut", "inner"], ["level"]),
        node("Resize", ["level", "", scales], ["large"], mode="nearest", nearest_mode="floor",
             coordinate_transformation_mode="asymmetric"),
        conv("large", "last", (16, 8)),
    ]  # fmt: skip
    shapes = {"x": ["n", 8, 8, 8], "t": ["n", 1], "last": ["n", 8, 16, 16], "embed": ["n", 16]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(nodes, "g", values[:2], values[2:], weights)
    folder = tmp_path_factory.mktemp("skipping")
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(folder / "g.onnx")
    )
    kit = OpenVinoKit(to_xml(folder / "g.onnx", folder / "g.xml"), threads=1)
    x, t = draw.standard_normal((16, 8, 8, 8)).astype(np.float32), np.arange(16, dtype=np.float32)[:, None]
    kit.calibrate(Samples({"x": x[:8], "t": t[:8]}), Samples({"x": x[8:], "t": t[8:]}), folder)
    return kit, folder


def left_in_float(kit: OpenVinoKit, folder: Path, *names: str) -> tuple[float, int]:
    """Relative error with these layers in float, and how many activations are rounded."""
    recipe = replace(kit.settle(OpenVinoRecipe()), keep_float=names)
    model = openvino.Core().read_model(kit._path(recipe))
    original = openvino.Core().read_model(kit.model_path)
    restore(model, original, names)
    openvino.save_model(model, folder / "some.xml", compress_to_fp16=False)
    feeds = {"x": np.random.default_rng(5).standard_normal((2, 8, 8, 8), np.float32), "t": np.array([[1], [9]], "f4")}
    found, expected = (OpenVinoEngine(file, threads=1).run(feeds) for file in (folder / "some.xml", kit.model_path))
    rounded = [
        node for node in model.get_ordered_ops()
        if node.get_type_name() == "FakeQuantize" and node.input_value(0).get_node().get_type_name() != "Constant"
    ]  # fmt: skip
    return max(relative_error(expected[name], found[name]) for name in expected), len(rounded)


def test_what_no_int8_layer_reads_is_rounded_for_nobody(skipping: tuple[OpenVinoKit, Path]) -> None:
    kit, folder = skipping
    original = openvino.Core().read_model(kit.model_path)
    layers = [layer.name for layer in layers_of(original)]
    assert set(quantized_layers(openvino.Core().read_model(kit._path(kit.settle(OpenVinoRecipe()))))) == set(layers)
    error, rounded = left_in_float(kit, folder, *layers)
    assert rounded == 0
    assert error < 1e-5
    # One layer stays in INT8; what others read was rounded before and is not any more.
    for name, sources in (("shortcut", 2), ("last", 2), ("inner", 1), ("embed", 2)):
        error, rounded = left_in_float(kit, folder, *(other for other in layers if other != name))
        assert 1 <= rounded <= sources, name
        assert 1e-5 < error < 0.05, name


def test_what_one_sample_alone_reaches_is_not_cut_off(skipping: tuple[OpenVinoKit, Path], tmp_path: Path) -> None:
    """As one timestep may: its activations are the largest, and of all samples' maxima the mean is far below."""
    kit, _ = skipping
    x, t = np.random.default_rng(0).standard_normal((8, 8, 8, 8)).astype(np.float32), np.zeros((8, 1), np.float32)
    x[3] *= 10
    openvino_cpu.quantize_file(kit.model_path, tmp_path / "q.xml", Samples({"x": x, "t": t}), OpenVinoRecipe())
    nodes = openvino.Core().read_model(tmp_path / "q.xml").get_ordered_ops()
    (first,) = (
        node for node in nodes
        if node.get_type_name() == "FakeQuantize" and node.input_value(0).get_node().get_friendly_name() == "x"
    )  # fmt: skip
    low, high = (float(first.input_value(place).get_node().data.ravel()[0]) for place in (1, 2))
    assert 0.98 * x.max() < high < 1.1 * x.max()
    assert 1.1 * x.min() < low < 0.98 * x.min()


def test_without_zero_points_ranges_are_around_zero_and_cover_the_others(
    skipping: tuple[OpenVinoKit, Path], tmp_path: Path
) -> None:
    kit, _ = skipping
    ranges = []
    for symmetric in (False, True):
        kit.build(tmp_path / "s.xml", replace(kit.settle(OpenVinoRecipe()), symmetric=symmetric))
        nodes = openvino.Core().read_model(tmp_path / "s.xml").get_ordered_ops()
        ranges.append({
            node.get_friendly_name(): [node.input_value(place).get_node().data for place in range(1, 5)]
            for node in nodes
            if node.get_type_name() == "FakeQuantize"
        })  # fmt: skip
    with_zero_point, without = ranges
    assert with_zero_point.keys() == without.keys()
    one_sided = 0
    for name, (low, high, *out) in without.items():
        old_low, old_high = with_zero_point[name][:2]
        assert (low <= old_low + 1e-6).all()
        assert (high >= old_high - 1e-6).all()
        np.testing.assert_array_equal(out, [low, high])
        if (old_low >= 0).all():  # the exponential: unsigned, as it was
            one_sided += 1
            np.testing.assert_array_equal([low, high], [old_low, old_high])
        else:
            np.testing.assert_allclose(low * 127, high * -128, rtol=1e-6)
            assert (np.isclose(low, old_low) | np.isclose(high, old_high)).all()  # and no wider than need be
    assert one_sided == 1


def test_what_is_read_back_is_what_the_recipe_chose(kit: OpenVinoKit, probes: list[Probe], tmp_path: Path) -> None:
    errors = []
    for kinds in (("Convolution",), ("Convolution", "MatMul")):
        recipe = kit.settle(OpenVinoRecipe(op_types=kinds))
        path = tmp_path / f"{len(kinds)}.xml"
        kit.build(path, recipe)
        engine = kit.open(path, recipe)
        found = kit.found(path, engine)
        assert found["int8"] >= len(kinds)
        assert sum(count for name, count in found.items() if name != "int8") >= 3  # first, last, timestep at least
        outputs = engine.run(probes[0].inputs)["prediction"]
        quick = kit.open(path, recipe, trial=True)  # compiled once for all sizes
        assert relative_error(outputs, quick.run(probes[0].inputs)["prediction"]) < 1e-2
        assert [list(one._graphs) == [None] for one in (engine, quick)] == [False, True]
        errors.append(relative_error(probes[0].outputs["prediction"], outputs))
        assert 1e-4 < errors[-1] < 0.1
        costs = kit.profile(kit.spec(path, recipe), probes[0].inputs)
        assert {"Convolution"} <= {cost.op for cost in costs}
        assert sum(cost.share for cost in costs) == pytest.approx(1)


def test_the_same_samples_give_the_same_bytes(xml: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        openvino_cpu.quantize_file(xml, tmp_path / f"{name}.xml", stacked(4), OpenVinoRecipe(smooth_quant_alpha=0.5))
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.fixture(scope="module")
def source(xml: Path, probes: list[Probe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle for OpenVINO, with a U-Net that has something to quantize."""
    directory = write_tiny_bundle(tmp_path_factory.mktemp("source") / "bundle")
    data = json.loads((directory / "bundle.json").read_text())
    for engine in data["engines"]:
        onnx = directory / engine["files"][0]
        path = xml if engine["component"] == "unet" else to_xml(onnx, onnx.with_suffix(".xml"))
        for file in (path, path.with_suffix(".bin")):
            (directory / "engines" / f"{onnx.stem}{file.suffix}").write_bytes(file.read_bytes())
        onnx.unlink()
        engine["files"] = [f"engines/{onnx.stem}{suffix}" for suffix in (".xml", ".bin")]
        engine |= {"runtime": "openvino", "id": engine["id"].replace("onnxruntime", "openvino")}
        engine["runtime_versions"] = ">=2025.2"
    (variant,) = data["variants"]
    variant |= {"name": "fp32-openvino-cpu", "engines": [engine["id"] for engine in data["engines"]]}
    data["default_variant"] = variant["name"]
    (directory / "probes").mkdir()
    write_probes(directory / "probes" / "unet.safetensors", probes)
    write_bundle(directory, data)
    return directory


def plant_speeds(monkeypatch: pytest.MonkeyPatch, versus_fp32: float, versus_bf16: float) -> None:
    """Replace the measurement: constant times, so that intervals are points."""

    def compare(specs: dict[str, Any], feeds: object, **options: object) -> dict[str, Any]:
        first = next(iter(specs))
        time = dict.fromkeys(specs, 1.0) | {first: versus_fp32, "bf16-openvino-cpu": versus_bf16}
        samples = {name: [time[name]] * 8 for name in specs}
        return {
            "failed": {},
            "samples_ms": samples,
            "speedup": {
                name: {"versus": first, "median": versus_fp32, "ci95_low": versus_fp32, "ci95_high": versus_fp32}
                for name in specs
            },
        }

    monkeypatch.setattr(candidates, "compare_engines", compare)
    monkeypatch.setattr(openvino_cpu, "has_bf16", lambda: True)
    # What would be bf16 is planted; it is not to be computed on a CPU that may lack it.
    monkeypatch.setattr(OpenVinoKit, "profile", lambda self, spec, feeds: [])


def test_a_bundle_gets_int8_for_openvino(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ldm_deploy_cli: Any
) -> None:
    plant_speeds(monkeypatch, 3.0, 2.0)
    arguments = ("quantize", source, "--target", "openvino-cpu", "--component", "unet", "--out", tmp_path / "out")
    ran = ldm_deploy_cli(*arguments, "--threads", 1, "--quiet")
    assert ran.code == 0, ran.err
    data = verify_bundle(tmp_path / "out").data
    engine = data["engines"][-1]
    assert engine["id"] == "unet-int8-openvino-cpu"
    assert (engine["precision"], engine["rest"]) == ("int8", "bf16")
    assert engine["files"] == ["engines/unet-int8-openvino.xml", "engines/unet-int8-openvino.bin"]
    assert engine["precision_found"]["int8"] >= 1
    assert 0 < engine["parity"]["relative_error"] < 0.1
    assert [one["versus"] for one in engine["comparisons"]] == ["fp32-openvino-cpu", "bf16-openvino-cpu"]
    assert engine["comparisons"][1]["median"] == pytest.approx(2.0)
    assert [variant["name"] for variant in data["variants"]] == ["fp32-openvino-cpu", "mixed-openvino-cpu"]
    first, second = (
        load(tmp_path / "out", variant=f"{name}-openvino-cpu", threads=1)("sun", seed=3).astype(int)
        for name in ("fp32", "mixed")
    )
    assert 0 < np.abs(first - second).mean() < 6


def test_faster_than_fp32_but_not_than_bf16_is_refused(
    xml: Path, probes: list[Probe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_speeds(monkeypatch, 3.0, 0.9)
    kit = OpenVinoKit(xml, recipes={"conv": OpenVinoRecipe(op_types=("Convolution",))}, threads=1)
    best, refused = quantize_component("unet", kit, tmp_path, stacked(4), probes, 0.1)
    assert best is None
    assert refused[0].refused is not None
    assert refused[0].refused.startswith(
        "unet: INT8 (conv) is not faster than bf16: 0.90x (0.90 to 0.90); time goes to"
    )
    assert refused[0].comparisons[0]["median"] == 3.0


def test_a_wrong_engine_is_refused(
    xml: Path, probes: list[Probe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the middle convolution are turned round after quantization."""
    plant_speeds(monkeypatch, 9, 9)
    original = openvino_cpu.restore

    def swapped(model: Any, before: Any, names: Any) -> None:
        original(model, before, names)
        for node in model.get_ordered_ops():
            if node.get_type_name() == "Constant" and list(node.get_output_shape(0)) == [16, 16, 3, 3]:
                node.output(0).replace(openvino.opset13.constant(node.data[::-1].copy()).output(0))

    monkeypatch.setattr(openvino_cpu, "restore", swapped)
    kit = OpenVinoKit(xml, recipes={"conv": OpenVinoRecipe(op_types=("Convolution",))}, threads=1)
    best, refused = quantize_component("unet", kit, tmp_path, stacked(4), probes, 0.1)
    assert best is None
    assert "differs from the reference: output 'prediction' on the probe " in str(refused[0].refused)


def test_what_is_not_finite_is_named_with_layer_and_timestep(denoiser: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(denoiser))
    for tensor in model.graph.initializer:
        if tensor.name == "middle.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.full(16, np.inf, np.float32), tensor.name))
    onnx.save(model, str(tmp_path / "broken.onnx"))
    path = to_xml(tmp_path / "broken.onnx", tmp_path / "broken.xml")
    feeds = make_feeds(0)
    expected = rf"activation 'middle.*' is not finite on calibration sample 0, timestep \[{feeds['timestep'][0]}\]"
    with pytest.raises(QuantizationError, match=expected):
        check_activations(OpenVinoEngine(path, threads=1), Samples(feeds))


def test_a_recipe_that_errs_beside_bf16_is_tried_beside_fp32_before_layers_are_spared(
    xml: Path, probes: list[Probe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be bf16 is planted: its outputs are 1.3 times too large."""
    plant_speeds(monkeypatch, 2.0, 2.0)
    plain = OpenVinoKit.open

    def opened(self: OpenVinoKit, path: Path, recipe: Any, **options: Any) -> Any:
        engine = plain(self, path, replace(recipe, rest="fp32"), **options)
        if recipe.rest == "bf16":
            run = engine.run
            monkeypatch.setattr(
                engine, "run", lambda feeds: {name: np.float32(1.3) * v for name, v in run(feeds).items()}
            )
        return engine

    monkeypatch.setattr(OpenVinoKit, "open", opened)
    kit = OpenVinoKit(xml, recipes={"conv": OpenVinoRecipe(op_types=("Convolution",))}, threads=1)
    best, refused = quantize_component("unet", kit, tmp_path, stacked(4), probes, 0.1)
    assert best is not None, [one.refused for one in refused]
    assert isinstance(best.recipe, OpenVinoRecipe)
    assert (best.recipe.rest, best.recipe.keep_float) == ("fp32", ())
    assert kit.spec(best.path, best.recipe)["rest"] == "fp32"
