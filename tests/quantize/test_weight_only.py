"""Weights alone in 8 or 4 bits: smaller, close, read back from the file; and refused where that is not so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ldm_deploy.errors import ConfigError, QuantizationError
from ldm_deploy.eval.budget import load_budget
from ldm_deploy.eval.parity import Probe, relative_error, write_probes
from ldm_deploy.quantize import weight_only
from ldm_deploy.quantize.weight_only import onnxruntime_weights, openvino_weights, quantize_weights, stored_weights
from ldm_deploy.runtime.bundle import verify_bundle, write_bundle
from ldm_deploy.runtime.engine_openvino import OpenVinoEngine
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from ldm_deploy.runtime.pipeline import load
from tests.tiny_bundle import write_tiny_bundle

WIDTH = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products and a convolution of some size, in the place of the tiny U-Net."""
    rng = np.random.default_rng(0)
    constants = {
        "kernel": rng.standard_normal((WIDTH, 4, 3, 3)) / 6,
        "back": rng.standard_normal((4, WIDTH, 1, 1)) / 11,
        "a": rng.standard_normal((WIDTH, WIDTH)) / 11,
        "b": rng.standard_normal((WIDTH, WIDTH)) / 11,
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["sample", "kernel"], ["h"], "conv", pads=[1] * 4),
        node("Transpose", ["h"], ["t"], "there", perm=[0, 2, 3, 1]),
        node("MatMul", ["t", "a"], ["u"], "first"),
        node("Relu", ["u"], ["v"], "relu"),
        node("MatMul", ["v", "b"], ["w"], "second"),
        node("Transpose", ["w"], ["x"], "back_again", perm=[0, 3, 1, 2]),
        node("Conv", ["x", "back"], ["prediction"], "last"),
    ]
    shape: list[Any] = ["batch", 4, "height", "width"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("sample", "prediction")]
    values += [
        helper.make_tensor_value_info("timestep", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("encoder_hidden_states", TensorProto.FLOAT, ["batch", "sequence", 8]),
    ]
    graph = helper.make_graph(
        nodes, "g", [values[0], *values[2:]], values[1:2],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("weights") / "unet-fp32.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def feeds(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((2, 4, 8, 8), np.float32),
        "timestep": np.array([3, 4]),
        "encoder_hidden_states": np.zeros((2, 5, 8), np.float32),
    }


def test_onnx_files_hold_what_was_asked_and_compute_nearly_the_same(model: Path, tmp_path: Path) -> None:
    expected = OnnxRuntimeEngine(model, threads=1).run(feeds())["prediction"]
    sizes, errors = [model.stat().st_size], []
    for precision in ("w8", "w4"):
        (path,) = onnxruntime_weights(model, tmp_path / f"{precision}.onnx", precision)
        errors.append(relative_error(expected, OnnxRuntimeEngine(path, threads=1).run(feeds())["prediction"]))
        sizes.append(path.stat().st_size)
        products, kernel = 2 * WIDTH * WIDTH, WIDTH * 4 * 9
        stored = stored_weights(path)
        if precision == "w8":
            # Zero points of the scales are int8 too; the last convolution is too small to be worth it.
            assert products + kernel <= stored["int8"] <= products + kernel + 3 * WIDTH
        else:
            assert stored["int4"] == products
            assert kernel <= stored["int8"] <= kernel + WIDTH
    assert sizes[1] < 0.4 * sizes[0]
    assert sizes[2] < 0.7 * sizes[1]
    assert 1e-4 < errors[0] < 0.02 < errors[1] < 0.2


def test_openvino_files_hold_what_was_asked(model: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    xml = tmp_path / "fp32.xml"
    openvino.save_model(openvino.Core().read_model(model), xml, compress_to_fp16=False)
    expected = OpenVinoEngine(xml, threads=1).run(feeds())["prediction"]
    errors = []
    for precision, kind in (("w8", "int8"), ("w4", "int4")):
        files = openvino_weights(xml, tmp_path / f"{precision}.xml", precision)
        assert kind in stored_weights(files[0])
        engine = OpenVinoEngine(files[0], precision=precision, threads=1)
        errors.append(relative_error(expected, engine.run(feeds())["prediction"]))
        assert files[1].stat().st_size < 0.45 * xml.with_suffix(".bin").stat().st_size
    assert 1e-4 < errors[0] < 0.02 < errors[1] < 0.2


@pytest.fixture
def source(model: Path, tmp_path: Path) -> Path:
    directory = write_tiny_bundle(tmp_path / "bundle")
    path = directory / "engines" / "unet-fp32.onnx"
    path.write_bytes(model.read_bytes())
    probes = [Probe(feeds(1), OnnxRuntimeEngine(path, threads=1).run(feeds(1)))]
    (directory / "probes").mkdir()
    for component in ("unet",):
        write_probes(directory / "probes" / f"{component}.safetensors", probes)
    write_bundle(directory, json.loads((directory / "bundle.json").read_text()))
    return directory


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(specs: dict[str, Any], feeds: object, **options: object) -> dict[str, Any]:
        first, second = specs
        return {"speedup": {second: {"versus": first, "median": 0.9, "ci95_low": 0.8, "ci95_high": 1.0}}, "failed": {}}

    monkeypatch.setattr(weight_only, "compare_engines", compare)


def test_a_bundle_gets_smaller_engines_and_is_told_their_speed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ldm_deploy_cli: Any
) -> None:
    plant(monkeypatch)
    arguments = ("quantize", source, "--target", "onnxruntime-cpu", "--precision", "w4", "--component", "unet")
    ran = ldm_deploy_cli(*arguments, "--out", tmp_path / "out", "--threads", 1, "--quiet")
    assert ran.code == 0, ran.err
    assert "unet-w4-onnxruntime-cpu: 0.90x fp32-onnxruntime-cpu (0.80 to 1.00); error " in ran.out
    data = verify_bundle(tmp_path / "out").data
    assert data["engines"][-1]["weights_found"]["int4"] == 2 * WIDTH * WIDTH
    assert [variant["name"] for variant in data["variants"]] == ["fp32-onnxruntime-cpu", "w4-onnxruntime-cpu"]
    assert data["default_variant"] == "fp32-onnxruntime-cpu"
    image = load(tmp_path / "out", variant="w4-onnxruntime-cpu", threads=1)("sun")
    assert image.shape == (1, 32, 32, 3)


def test_what_is_wrong_or_not_smaller_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)

    def run(out: str) -> dict[str, Any]:
        return quantize_weights(
            source, tmp_path / out, precision="w8", target="onnxruntime-cpu", budget=load_budget(), components=["unet"],
            threads=1,
        ).data  # fmt: skip

    monkeypatch.setattr(weight_only, "LARGEST_SHARE", 0.01)
    (refused,) = run("large")["refused"]
    assert "times those in fp32" in refused["reason"]
    monkeypatch.undo()
    plant(monkeypatch)
    original = weight_only.store_weights

    def swapped(model: Any, nodes: Any, smallest: int) -> None:
        original(model, nodes, smallest)
        for tensor in model.graph.initializer:
            if tensor.name == "a_dequantized_1_quantized":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))

    monkeypatch.setattr(weight_only, "store_weights", swapped)
    (refused,) = run("wrong")["refused"]
    assert "differs from the reference: output 'prediction'" in refused["reason"]


def test_what_cannot_be_done_is_said(source: Path, tmp_path: Path, ldm_deploy_cli: Any) -> None:
    common = {"target": "onnxruntime-cpu", "budget": load_budget(), "threads": 1}
    with pytest.raises(ConfigError, match="precision 'w2' is unknown; allowed: int8, w8, w4"):
        quantize_weights(source, tmp_path / "out", precision="w2", **common)
    with pytest.raises(
        QuantizationError, match=r"unet2 cannot be quantized: .* has fp32 engines for onnxruntime-cpu of"
    ):
        quantize_weights(source, tmp_path / "out", precision="w8", components=["unet2"], **common)
    ran = ldm_deploy_cli(
        "quantize", source, "--target", "onnxruntime-cpu", "--precision", "w8", "--builds", 3, "--out", tmp_path / "o"
    )
    assert ran.code == 2
    assert "--builds are for int8" in ran.err
