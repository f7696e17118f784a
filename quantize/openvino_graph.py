"""The layers of an OpenVINO graph, and the way back to float for those that are not to be INT8.

NNCF leaves every layer under the name it had: its activations come through FakeQuantize (after SmoothQuant, a Multiply
before it), its weights through an int8 constant, Convert, Multiply. Undoing one layer is therefore cheaper than
quantizing all others again: a few edges, no calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

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
        if any(_reads_quantized(node.input_value(index)) for index in (0, 1))
    }


def restore(model: Any, original: Any, names: Collection[str]) -> None:
    """Bring the layers `names` of a quantized model back to float, with the weights they have in `original`.

    With them goes every FakeQuantize that no other layer reads: NNCF rounds skip connections, what is upsampled and
    even the sines of the timestep, for layers behind them, and what reads those in float would read them rounded.
    """
    import openvino

    before = {node.get_friendly_name(): node for node in _products(original)}
    kept = quantized_layers(model) - set(names)
    for node in _products(model):
        if node.get_friendly_name() in names and follows_from_constants(node.input_value(1)):
            weight = _constant_value(before[node.get_friendly_name()].input_value(1))
            node.input(1).replace_source_output(openvino.opset13.constant(weight).output(0))
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or follows_from_constants(node.input_value(0)):
            continue
        source = node.input_value(0)
        if source.get_node().get_friendly_name().endswith(SMOOTH):
            source = source.get_node().input_value(0)
        for edge in node.output(0).get_target_inputs():
            if not _leads_to(edge.get_node(), kept):
                edge.replace_source_output(source)
    model.validate_nodes_and_infer_types()


def make_symmetric(model: Any) -> None:
    """Give every FakeQuantize of signed activations a range around zero, [-128, 127] steps, that covers its own."""
    import openvino

    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or follows_from_constants(node.input_value(0)):
            continue
        low, high = (node.input_value(place).get_node().data for place in (1, 2))
        step = np.maximum(-low / 128, high / 127)
        signed = low < 0
        for places, bound in (
            ((1, 3), np.where(signed, -128 * step, low)),
            ((2, 4), np.where(signed, 127 * step, high)),
        ):
            constant = openvino.opset13.constant(bound.astype(np.float32))
            for place in places:
                node.input(place).replace_source_output(constant.output(0))


def _products(model: Any) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() in (*CONVOLUTIONS, "MatMul")]


def _reads_quantized(value: Any) -> bool:
    """Whether activations come from a FakeQuantize."""
    node = value.get_node()
    if node.get_type_name() == "FakeQuantize":
        return not follows_from_constants(node.input_value(0))
    if node.get_type_name() == "Concat":
        return any(_reads_quantized(part) for part in node.input_values())
    return node.get_type_name() in PASSING and _reads_quantized(node.input_value(0))


def _leads_to(node: Any, names: Collection[str]) -> bool:
    """Whether a node is one of the layers `names`, or passes its values on to one."""
    if node.get_type_name() not in (*PASSING, "Concat", "FakeQuantize"):
        return node.get_friendly_name() in names
    return any(_leads_to(edge.get_node(), names) for output in node.outputs() for edge in output.get_target_inputs())


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
