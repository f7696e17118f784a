"""The layers of an OpenVINO graph, and the way back to float for those that are not to be INT8.

NNCF leaves every layer under the name it had: its activations come through FakeQuantize (after SmoothQuant, a Multiply
before it), its weights through an int8 constant, Convert, Multiply. Undoing one layer is therefore cheaper than
quantizing all others again: a few edges, no calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

CONVOLUTIONS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData")
SMOOTH = "/nncf_smooth_quant"
# What values pass through unchanged, or nearly: NNCF puts a FakeQuantize before them rather than after.
PASSING = ("Reshape", "Transpose", "Interpolate", "Squeeze", "Unsqueeze", "StridedSlice", "Slice", "VariadicSplit")


@dataclass(frozen=True)
class Layer:
    """A convolution or a product. `kind`: "Convolution", "MatMul" (with constant weights) or "attention" (without)."""

    name: str
    kind: str
    channels: tuple[int, int]  # in, out; of products without weights (0, 0)
    rows: bool  # whether it has more rows than the batch: pixels or tokens


def layers_of(model: Any) -> list[Layer]:
    """In the order of the graph."""
    found = []
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        name = node.get_friendly_name()
        if kind in CONVOLUTIONS:
            shape = list(_weight_shape(node))
            inputs, outputs = (shape[1], shape[0]) if kind == "Convolution" else (shape[0], shape[1])
            found.append(Layer(name, "Convolution", (inputs, outputs), True))
        elif kind == "MatMul":
            weighted = [index for index in (0, 1) if follows_from_constants(node.input_value(index))]
            rank = node.input_value(0).get_partial_shape().rank
            rows = rank.is_dynamic or rank.get_length() > 2
            if not weighted:
                found.append(Layer(name, "attention", (0, 0), rows))
            elif weighted == [1]:
                shape = list(_weight_shape(node))[-2:]
                transposed = node.get_attributes()["transpose_b"]
                outputs, inputs = shape if transposed else reversed(shape)
                found.append(Layer(name, "MatMul", (inputs, outputs), rows))
    return found


def quantized_layers(model: Any) -> set[str]:
    """Names of the layers that read a FakeQuantize."""
    return {
        node.get_friendly_name()
        for node in _products(model)
        if any(_find_quantize(node, index) is not None for index in (0, 1))
    }


def restore(model: Any, original: Any, names: Collection[str]) -> None:
    """Bring the layers `names` of a quantized model back to float, with the weights they have in `original`."""
    import openvino

    before = {node.get_friendly_name(): node for node in _products(original)}
    for node in _products(model):
        name = node.get_friendly_name()
        if name not in names:
            continue
        for index in (0, 1):
            edge = _find_quantize(node, index)
            if edge is not None:
                source = edge.get_source_output().get_node().input_value(0)
                if source.get_node().get_friendly_name().endswith(SMOOTH):
                    source = source.get_node().input_value(0)
                edge.replace_source_output(source)
        if follows_from_constants(node.input_value(1)):
            weight = _constant_value(before[name].input_value(1))
            node.input(1).replace_source_output(openvino.opset13.constant(weight).output(0))
    model.validate_nodes_and_infer_types()


def _products(model: Any) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in (*CONVOLUTIONS, "MatMul")]


def _find_quantize(node: Any, index: int) -> Any:
    """The edge (an input of `node` or of what stands before it) that comes from a FakeQuantize of activations."""
    edge = node.input(index)
    while True:
        source = edge.get_source_output().get_node()
        kind = source.get_type_name()
        if kind == "FakeQuantize":
            return None if follows_from_constants(source.input_value(0)) else edge
        if kind not in PASSING:
            return None
        edge = source.input(0)


def follows_from_constants(output: Any) -> bool:
    """Whether a value follows from constants alone."""
    return _walk(output, lambda node: node.get_type_name() == "Constant")


def _walk(output: Any, fits: Callable[[Any], bool]) -> bool:
    pending, seen = [output.get_node()], 0
    while pending:
        node = pending.pop()
        seen += 1
        if node.get_input_size() == 0:
            if not fits(node):
                return False
        elif seen > 12:  # weights are a constant, its zero point and scale, and a conversion or two
            return False
        else:
            pending += [node.input_value(index).get_node() for index in range(node.get_input_size())]
    return True


def _weight_shape(node: Any) -> Any:
    return node.input_value(1).get_shape()


def _constant_value(output: Any) -> Any:
    """The value of a constant, or of what is computed from constants."""
    import openvino

    node = output.get_node()
    if node.get_type_name() == "Constant":
        return node.data
    model = openvino.Model([output], [], "weights")
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([])[0]
