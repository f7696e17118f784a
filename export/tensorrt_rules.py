"""What TensorRT demands of an ONNX graph, checked without it: a graph that breaks this is not handed over.

From NVIDIA's operator list of onnx-tensorrt and the developer guide's chapter on quantized types: INT8 is symmetric,
weights are quantized per tensor or along their first axis, and nothing is computed in double.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ldm_deploy.errors import ExportError
from ldm_deploy.onnx_graph import nodes_of

# Of the standard operators, those our exports are made of; another one is refused until somebody has seen it work.
OPERATORS = frozenset({
    "Add", "And", "ArgMax", "ArgMin", "Attention", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat",
    "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "CumSum", "DequantizeLinear", "Div", "Einsum",
    "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND",
    "Gelu", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual", "GroupNormalization", "HardSigmoid",
    "HardSwish", "Identity", "If", "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "Loop", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mul", "Neg", "Not", "Or", "PRelu",
    "Pad", "Pow", "QuantizeLinear", "RMSNormalization", "Range", "Reciprocal", "ReduceL2", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Resize", "Round", "ScatterElements",
    "ScatterND", "Shape", "Sigmoid", "Sin", "Size", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Squeeze",
    "Sub", "Sum", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor",
})  # fmt: skip


def broken_rules(model: Any) -> list[str]:
    """One sentence for each thing in an `onnx.ModelProto` that TensorRT does not take; empty for a sound graph."""
    from onnx import TensorProto, numpy_helper

    found = []
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = set(tensors)  # and what is quantized of them inside the graph
    doubles = [name for name, tensor in tensors.items() if tensor.data_type == TensorProto.DOUBLE]
    if doubles:
        found.append(f"initializer {doubles[0]!r} is of type double")
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            found.append(f"{value.name!r} is of type double")
    for node in nodes_of(model.graph):
        where = f"node {node.name or node.output[0]!r} ({node.op_type})"
        if node.domain not in ("", "ai.onnx"):
            found.append(f"{where} is of the domain {node.domain!r}")
        elif node.op_type not in OPERATORS:
            found.append(f"{where} is no operator that it is known to have")
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if len(node.input) > 2 and node.input[2] in tensors:
            zero_point = tensors[node.input[2]]
            if zero_point.data_type != TensorProto.INT8:
                kind = TensorProto.DataType.Name(zero_point.data_type)
                found.append(f"{where} has a zero point of type {kind}; it must be INT8")
            elif np.any(numpy_helper.to_array(zero_point)):
                found.append(f"{where} has a zero point that is not 0: quantization must be symmetric")
        elif len(node.input) < 3 and node.op_type == "QuantizeLinear":
            found.append(f"{where} has no zero point, which makes it UINT8; it must be INT8")
        if node.input[0] in weights:
            weights.add(node.output[0])
        scale = tensors.get(node.input[1])
        if scale is not None and np.prod(scale.dims) > 1:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
            if node.input[0] not in weights:
                found.append(f"{where} quantizes activations per channel; only weights may be")
            elif axis != 0:
                found.append(f"{where} quantizes weights along axis {axis}; it must be 0")
    return found


def check_graph(model: Any, name: str) -> None:
    """Raises `ExportError` naming the first broken rule and how many there are."""
    found = broken_rules(model)
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise ExportError(f"{name}: TensorRT does not take this graph: {found[0]}{more}; choose another target")
