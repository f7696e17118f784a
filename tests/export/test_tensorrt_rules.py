"""Graphs of ours are what TensorRT demands; planted faults are found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ldm_deploy.errors import ExportError
from ldm_deploy.export.probes import make_probes
from ldm_deploy.export.tensorrt_rules import broken_rules, check_graph
from ldm_deploy.export.to_onnx import component_axes
from ldm_deploy.export.traced import Traced
from ldm_deploy.models.sources import load_source

pytestmark = pytest.mark.timeout(900)  # a whole reference is exported


@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp16", "bf16"))]
)
def test_what_we_export_keeps_the_rules(reference: Path, tmp_path: Path, precision: str) -> None:
    source = load_source(reference)
    probes, modules = make_probes(source, threads=1), source.components()
    for name, module in modules.items():
        axes = component_axes(name, 4, source.signatures[name])
        traced = Traced(module, probes[name], axes, name, {}, tmp_path)
        assert broken_rules(onnx.load(str(traced.graph(precision)))) == []


def quantized(zero_point: np.ndarray, scale: np.ndarray, axis: int = 1, weights: bool = True) -> Any:
    """Quantize and dequantize a weight, or an activation; a convolution follows."""
    tensors = {
        "w": np.ones((4, 3, 1, 1), np.float32), "scale": scale.astype(np.float32), "zero": zero_point,
    }  # fmt: skip
    source = "w" if weights else "x"
    node = helper.make_node
    after = ["x", "d"] if weights else ["d", "w"]
    nodes = [
        node("QuantizeLinear", [source, "scale", "zero"], ["q"], name="quantize", axis=axis),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantize", axis=axis),
        node("Conv", after, ["y"], name="conv"),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, [1, 3, 4, 4])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def int8(*shape: int, value: int = 0) -> np.ndarray:
    return np.full(shape, value, np.int8)


def test_symmetric_weights_along_the_first_axis_are_sound() -> None:
    assert broken_rules(quantized(int8(4), np.ones(4), axis=0)) == []
    assert broken_rules(quantized(int8(), np.ones(()), weights=False)) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (quantized(int8(4), np.ones(4), axis=1), "'quantize' .* quantizes weights along axis 1; it must be 0"),
        (quantized(int8(4, value=3), np.ones(4), axis=0), "zero point that is not 0: quantization must be symmetric"),
        (quantized(np.zeros(4, np.uint8), np.ones(4), axis=0), "zero point of type UINT8; it must be INT8"),
        (quantized(int8(3), np.ones(3), weights=False), "quantizes activations per channel; only weights may be"),
    ],
)
def test_planted_faults_of_quantization_are_found(model: Any, message: str) -> None:
    with pytest.raises(ExportError, match=f"unet: TensorRT does not take this graph: .*{message}.*choose another"):
        check_graph(model, "unet")


def test_operators_and_types_it_lacks_are_found() -> None:
    model = quantized(int8(4), np.ones(4), axis=0)
    model.graph.node.append(helper.make_node("QuickGelu", ["y"], ["z"], domain="com.microsoft", name="gelu"))
    model.graph.node.append(helper.make_node("StringNormalizer", ["y"], ["s"], name="words"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2), "precise"))
    found = broken_rules(model)
    assert len(found) == 3
    assert found[0] == "initializer 'precise' is of type double"
    assert "'gelu' (QuickGelu) is of the domain 'com.microsoft'" in found[1]
    assert "'words' (StringNormalizer) is no operator that it is known to have" in found[2]
