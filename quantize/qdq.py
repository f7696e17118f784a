"""Insert QuantizeLinear / DequantizeLinear pairs into an ONNX graph: precision lives in the graph.

A product with a bias behind it becomes the node that ONNX Runtime would make of its pairs, with the bias inside, which
ONNX Runtime does not do by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm_deploy.quantize.scheme import Recipe, activation_scale, channel_scales, quantize_bias, quantize_weight

Ranges = Mapping[str, tuple[float, float]]  # tensor name -> interval to represent
Channels = Mapping[str, tuple[np.ndarray, np.ndarray]]  # tensor name -> smallest and largest value of each channel
# What may read a convolution's output that has a scale per channel. Others are INT8 kernels themselves (convolutions),
# or fused with their quantized neighbours (Sigmoid, pooling), and these know one scale only.
PER_CHANNEL_READERS = (
    "Add", "Concat", "InstanceNormalization", "Mul", "Reshape", "Resize", "Shape", "Split", "Sub", "Transpose",
)  # fmt: skip


def select_nodes(model: Any, recipe: Recipe) -> list[Any]:
    """The nodes that a recipe quantizes: those of its types whose second input is a constant matrix or kernel.

    Attention multiplies activations by activations, so neither of its MatMuls is among them.
    """
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    chosen = []
    for node in model.graph.node:
        if node.op_type not in recipe.op_types or len(node.input) < 2 or node.input[1] not in shapes:
            continue
        if node.input[0] in shapes or node.name in recipe.keep_float:
            continue
        shape = shapes[node.input[1]]
        if node.op_type == "Conv":
            if min(shape[0], shape[1]) < recipe.min_channels:
                continue
        elif len(shape) != 2 or (node.op_type == "Gemm" and not _plain_gemm(node)):
            continue
        chosen.append(node)
    return chosen


def _plain_gemm(node: Any) -> bool:
    values = {attribute.name: attribute for attribute in node.attribute}
    return all(
        getattr(values[name], kind) == plain if name in values else True
        for name, kind, plain in (("alpha", "f", 1.0), ("beta", "f", 1.0), ("transA", "i", 0))
    )


def tensors_to_observe(nodes: Sequence[Any], recipe: Recipe) -> list[str]:
    """Activations whose range is needed, in graph order, each once."""
    names: dict[str, None] = {}
    for node in nodes:
        names.setdefault(node.input[0])
        if node.op_type in recipe.quantize_outputs:
            names.setdefault(node.output[0])
    return list(names)


def outputs_by_channel(model: Any, nodes: Sequence[Any]) -> dict[str, int]:
    """Outputs of convolutions among `nodes` that may have a scale per channel, with their rank: name -> axes."""
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    found = {
        node.output[0]: ranks[node.input[1]]
        for node in nodes
        if node.op_type == "Conv" and all(not bias or bias in ranks for bias in node.input[2:])
    }
    for node in model.graph.node:
        for name in node.input if node.op_type not in PER_CHANNEL_READERS else ():
            found.pop(name, None)
    for value in model.graph.output:
        found.pop(value.name, None)
    return found


def _weight_axis(node: Any) -> int:
    """The axis of the second input that holds the output channels."""
    if node.op_type == "Conv":
        return 0
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Gemm" and transposed else 1


def insert_qdq(model: Any, nodes: Sequence[Any], ranges: Ranges, recipe: Recipe, channels: Channels) -> None:
    """Quantize `nodes` of `model` in place. Activations U8, weights S8 per output channel, biases S32.

    Activations have one scale; outputs named in `channels` one per channel, where that is worth it.
    """
    _Inserter(model, nodes, ranges, recipe, channels).run()


def store_weights(model: Any, nodes: Sequence[Any], smallest: int) -> None:
    """Store the weights of `nodes`, where they have `smallest` values or more, as S8 per output channel, in place.

    Activations and arithmetic stay float: a DequantizeLinear stands before each node.
    """
    _Inserter(model, nodes, {}, Recipe(), {}).store_weights(smallest)


class _Inserter:
    def __init__(self, model: Any, nodes: Sequence[Any], ranges: Ranges, recipe: Recipe, channels: Channels) -> None:
        self.model, self.graph = model, model.graph
        self.recipe = recipe
        self.ranges = ranges
        self.chosen = {id(node) for node in nodes}
        self.by_channel = {
            name: scales
            for name in outputs_by_channel(model, nodes)
            if name in channels and (scales := channel_scales(*channels[name], ranges[name])) is not None
        }
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.scales: dict[str, np.ndarray] = {}  # quantized activation -> scale
        self.dequantized: dict[str, str] = {}  # tensor -> name of its dequantized form
        self.new_initializers: dict[str, Any] = {}
        self.nodes: list[Any] = []

    def run(self) -> None:
        # The outputs first: a chosen node's output is quantized once and everybody reads the dequantized value.
        quantized_outputs = {
            node.output[0]
            for node in self.graph.node
            if id(node) in self.chosen and node.op_type in self.recipe.quantize_outputs
        }
        additions = self._bias_additions()
        absorbed = {id(add) for add, _ in additions.values()}
        for node in self.graph.node:
            if id(node) not in self.chosen:
                if id(node) not in absorbed:
                    self.nodes.append(node)
                continue
            source = node.input[0]
            if source not in self.dequantized:
                self.dequantized[source] = self._activation(source, f"{source}_dequantized")
            if id(node) in additions:
                self._product(node, *additions[id(node)])
                continue
            node.input[0] = self.dequantized[source]
            output = node.output[0]
            steps = self.by_channel.get(output)
            weight_scale = self._weight(node, None if steps is None else steps[0])
            if steps is not None:
                self._shift_bias(node, *steps)
            if len(node.input) > 2 and node.input[2]:
                self._bias(node, self.scales[source], weight_scale)
            self.nodes.append(node)
            if output in quantized_outputs:
                node.output[0] = f"{output}_float"
                if steps is not None:
                    self._codes(output, node.output[0], *steps)
                else:
                    self._activation(output, output, source=node.output[0])
                self.dequantized[output] = output
        self._finish()

    def _bias_additions(self) -> dict[int, tuple[Any, str]]:
        """Of each chosen product whose only reader adds a constant to each column: that node, and the constant."""
        from ldm_deploy.onnx_graph import nodes_of

        readers: dict[str, list[Any]] = {}
        for node in nodes_of(self.graph):
            for name in node.input:
                readers.setdefault(name, []).append(node)
        asked = {value.name for value in self.graph.output}
        own = {name for node in self.graph.node for name in node.output}  # not of a subgraph
        found = {}
        for node in self.graph.node:
            behind = readers.get(node.output[0], [])
            if id(node) not in self.chosen or node.op_type != "MatMul" or node.output[0] in asked:
                continue
            if len(behind) != 1 or behind[0].op_type != "Add" or behind[0].output[0] not in own:
                continue
            other = next((name for name in behind[0].input if name != node.output[0]), "")
            columns = self.initializers[node.input[1]].dims[1]
            if other in self.initializers and list(self.initializers[other].dims) == [columns]:
                found[id(node)] = behind[0], other
        return found

    def _product(self, node: Any, add: Any, bias: str) -> None:
        """Product and addition as one node, from INT8 to float."""
        from onnx import helper

        source = node.input[0]
        self._weight(node)
        inputs = [
            f"{source}_quantized", f"{node.input[1]}_quantized", f"{source}_scale", f"{node.input[1]}_scale",
            f"{source}_zero_point", "", bias,
        ]  # fmt: skip
        made = helper.make_node("MatMulIntegerToFloat", inputs, [add.output[0]], name=node.name, domain="com.microsoft")
        self.nodes.append(made)
        if all(entry.domain != "com.microsoft" for entry in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    def store_weights(self, smallest: int) -> None:
        for node in self.graph.node:
            if id(node) in self.chosen and np.prod(self.initializers[node.input[1]].dims) >= smallest:
                self._weight(node)
            self.nodes.append(node)
        self._finish()

    def _constant(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self.new_initializers[name] = numpy_helper.from_array(value, name)
        return name

    def _activation(self, tensor: str, result: str, source: str | None = None) -> str:
        """source -> QuantizeLinear -> DequantizeLinear -> result, with the range that `tensor` was seen to have."""
        from onnx import helper

        scale, zero_point = activation_scale(*self.ranges[tensor])
        self.scales[tensor] = scale
        names = [self._constant(f"{tensor}_scale", scale), self._constant(f"{tensor}_zero_point", zero_point)]
        quantized = f"{tensor}_quantized"
        self.nodes.append(
            helper.make_node("QuantizeLinear", [source or tensor, *names], [quantized], name=f"{tensor}_QuantizeLinear")
        )
        self.nodes.append(
            helper.make_node("DequantizeLinear", [quantized, *names], [result], name=f"{tensor}_DequantizeLinear")
        )
        return result

    def _shift_bias(self, node: Any, step: np.ndarray, zero_point: np.ndarray) -> None:
        """A convolution with weights in units of each channel's step then counts them from its zero point: it returns
        the codes themselves."""
        from onnx import numpy_helper

        bias = np.zeros(step.shape, np.float32)
        if len(node.input) > 2 and node.input[2]:
            bias = numpy_helper.to_array(self.initializers[node.input[2]])
        name = f"{node.output[0]}_bias_in_steps"
        self.initializers[name] = numpy_helper.from_array((bias / step + zero_point).astype(np.float32), name)
        del node.input[2:]
        node.input.append(name)

    def _codes(self, tensor: str, source: str, step: np.ndarray, zero_point: np.ndarray) -> None:
        """source, in codes -> QuantizeLinear (rounds only) -> DequantizeLinear by channel -> tensor."""
        from onnx import helper

        one = [
            self._constant("__one_scale", np.array(1, np.float32)),
            self._constant("__one_zero_point", np.array(0, np.uint8)),
        ]
        names = [self._constant(f"{tensor}_scale", step), self._constant(f"{tensor}_zero_point", zero_point)]
        self.nodes += [
            helper.make_node("QuantizeLinear", [source, *one], [f"{tensor}_codes"], f"{tensor}_QuantizeLinear"),
            helper.make_node(
                "DequantizeLinear", [f"{tensor}_codes", *names], [tensor], f"{tensor}_DequantizeLinear", axis=1
            ),
        ]

    def _weight(self, node: Any, steps: np.ndarray | None = None) -> np.ndarray:
        """Point input 1 at a dequantized int8 constant; returns its scales. `steps`: in units of these, one per output
        channel."""
        from onnx import helper, numpy_helper

        name, axis = node.input[1], _weight_axis(node)
        result = f"{name}_dequantized_{axis}" if steps is None else f"{name}_dequantized_{node.output[0]}"
        if f"{result}_scale" not in self.new_initializers:
            quantized, scale = quantize_weight(
                numpy_helper.to_array(self.initializers[name]), axis, reduce_range=self.recipe.reduce_range
            )
            if steps is not None:
                scale = scale / steps
            inputs = [
                self._constant(f"{result}_quantized", quantized),
                self._constant(f"{result}_scale", scale),
                self._constant(f"{result}_zero_point", np.zeros(scale.shape, np.int8)),
            ]
            self.nodes.append(
                helper.make_node("DequantizeLinear", inputs, [result], name=f"{result}_DequantizeLinear", axis=axis)
            )
        node.input[1] = result
        return numpy_helper.to_array(self.new_initializers[f"{result}_scale"])

    def _bias(self, node: Any, input_scale: np.ndarray, weight_scale: np.ndarray) -> None:
        from onnx import helper, numpy_helper

        if node.input[2] not in self.initializers:
            return
        bias = numpy_helper.to_array(self.initializers[node.input[2]])
        result = f"{node.input[2]}_dequantized_{node.output[0]}"
        quantized, scale = quantize_bias(bias, input_scale, weight_scale)
        inputs = [
            self._constant(f"{result}_quantized", quantized),
            self._constant(f"{result}_scale", scale),
            self._constant(f"{result}_zero_point", np.zeros(scale.shape, np.int32)),
        ]
        self.nodes.append(
            helper.make_node("DequantizeLinear", inputs, [result], name=f"{result}_DequantizeLinear", axis=0)
        )
        node.input[2] = result

    def _finish(self) -> None:
        """Put nodes and constants in place; drop the float constants that nobody reads any more."""
        from ldm_deploy.onnx_graph import nodes_of

        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in nodes_of(self.graph) for name in node.input} | {out.name for out in self.graph.output}
        needed = [node for node in self.nodes if node.op_type != "DequantizeLinear" or node.output[0] in used]
        del self.graph.node[:]
        self.graph.node.extend(needed)
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend([*kept, *self.new_initializers.values()])
        del self.graph.value_info[:]
