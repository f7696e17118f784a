"""Group normalization (Wu and He 2018, arXiv:1803.08494) by moments of channels, for OpenVINO.

The exporter writes it as InstanceNormalization over (batch, groups, rest): pixels must lie channel by channel for that,
and the convolutions around it want them pixel by pixel, so that OpenVINO's CPU plugin reorders the whole map twice per
norm. Here only means of channels, (batch, C, 1, 1), are joined to groups; what touches pixels is a sum over them and
one multiplication and addition by channel, in any layout. The variance is that of differences from the group's mean:
that of squares would cancel where the mean is large.

Two cores of an AMD EPYC with AVX512-VNNI, OpenVINO 2026.4: a decoder of 12 M parameters to 256x256 has 1.10 times the
speed in fp32 and 1.11 in bf16, in INT8 nothing is reordered any more (42 of 263 ms); the shipped decoder, to 64x64,
1.19 and 1.05. U-Nets, whose maps are small, lose (the shipped one 0.94 and 0.89): they are left as they are. In bf16
the error is a tenth to a half more, as means are rounded, too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ldm_deploy.export.passes.match import array, only_user, producer, remove_unused


def norm_by_channel(model: ir.Model) -> int:
    """Rewrite every group normalization of (batch, C, height, width) with constant scales; returns how many."""
    if (model.opset_imports.get("") or 0) < 18:  # the axes of ReduceMean were an attribute
        return 0
    norms = [node for node in model.graph.all_nodes() if node.op_type == "InstanceNormalization"]
    if norms:
        ShapeInferencePass()(model)
    count = sum(_rewrite(model, node) for node in norms)
    if count:
        remove_unused(model)
    return count


def _rewrite(model: ir.Model, norm: ir.Node) -> bool:
    grouped = producer(norm.inputs[0], "Reshape")
    back = only_user(norm.outputs[0], "Reshape")
    scaled = only_user(back.outputs[0], "Mul") if back else None
    shifted = only_user(scaled.outputs[0], "Add") if scaled else None
    if not (grouped and back and scaled and shifted):
        return False
    x = grouped.inputs[0]
    scale, shift = _constant_of(scaled), _constant_of(shifted)
    ones, zeros = array(norm.inputs[1]), array(norm.inputs[2])
    if x is None or x.shape is None or len(x.shape) != 4 or scale is None or shift is None or ones is None:
        return False
    channels, groups = scale.size, ones.size
    if scale.shape != (channels, 1, 1) or shift.shape != scale.shape or channels % groups:
        return False
    if zeros is None or (ones != 1).any() or zeros.any():
        return False
    write = _Writer(model, shifted, norm.name or "norm")
    by_group, by_channel = (0, groups, -1, 1), (0, channels, 1, 1)

    def mean_of_group(value: ir.Value) -> ir.Value:
        """Mean over pixels, then over the channels of a group: (batch, groups, 1, 1)."""
        over_pixels = write("ReduceMean", value, np.array([2, 3]))
        return write("ReduceMean", write("Reshape", over_pixels, np.array(by_group)), np.array([2]))

    mean = mean_of_group(x)
    each = np.array([1, groups, channels // groups, 1])
    mean = write("Reshape", write("Expand", mean, each), np.array(by_channel))
    difference = write("Sub", x, mean)
    variance = mean_of_group(write("Mul", difference, difference))
    epsilon = np.array(norm.attributes.get_float("epsilon", 1e-5), scale.dtype)
    deviation = write("Sqrt", write("Add", variance, epsilon))
    factor = write("Div", scale.reshape(each), deviation)
    factor = write("Reshape", factor, np.array(by_channel))
    offset = write("Sub", shift.reshape(1, channels, 1, 1), write("Mul", mean, factor))
    new, old = write("Add", write("Mul", x, factor), offset), shifted.outputs[0]
    name = old.name
    old.name, new.name, new.type, new.shape = f"{name}_by_group", name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    return True


def _constant_of(node: ir.Node) -> np.ndarray | None:
    """The constant among its two inputs."""
    return next((found for value in node.inputs if (found := array(value)) is not None), None)


class _Writer:
    """Adds nodes before `place`; arrays among their inputs become constants."""

    def __init__(self, model: ir.Model, place: ir.Node, prefix: str) -> None:
        self.model, self.place, self.prefix, self.count = model, place, prefix, 0

    def __call__(self, op: str, *inputs: ir.Value | np.ndarray) -> ir.Value:
        self.count += 1
        name = f"{self.prefix}_{self.count}_{op}"
        values = [
            self._constant(f"{name}_{index}", value) if isinstance(value, np.ndarray) else value
            for index, value in enumerate(inputs)
        ]
        node = ir.Node("", op, values, name=name)
        node.outputs[0].name = name
        assert self.place.graph is not None
        self.place.graph.insert_before(self.place, node)
        return node.outputs[0]

    def _constant(self, name: str, values: np.ndarray) -> ir.Value:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value
