"""Bring values into the range of half precision by powers of two, without changing what a module computes.

Group and layer normalisation do not see the scale of their input: GN(s x; s^2 eps) = GN(x; eps). What lies between the
last layer with weights and such a norm can therefore be made smaller: those weights are multiplied by a power of two,
and the norm's eps by its square, all exactly. Residual sums, concatenations and reshapes tie values to one scale; what
meets a function that does see the scale (SiLU, softmax, a product of two values), or is an input or output, keeps its
own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ldm_deploy.export.graph import attribute, title

aten = torch.ops.aten
LARGEST = 65504.0  # of fp16 (IEEE 754-2019, binary16)
MARGIN = 4.0  # a few inputs were looked at; others may go beyond them

NORMS = {aten.group_norm.default: 4, aten.layer_norm.default: 4}  # op -> place of eps
WEIGHTED = (aten.conv2d.default, aten.conv2d.padding, aten.linear.default, aten.conv_transpose2d.input)
# One scale in, the same out.
TIED = (
    aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.view.default, aten.reshape.default,
    aten.transpose.int, aten.permute.default, aten.flatten.using_ints, aten.unflatten.int, aten.contiguous.default,
    aten.clone.default, aten.expand.default, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim,
    aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten.pad.default, aten.constant_pad_nd.default,
    aten.avg_pool2d.default, aten.dropout.default, aten.relu.default, aten.chunk.default, aten.split.Tensor,
    aten.select.int, aten.mean.dim,
)  # fmt: skip


@dataclass(frozen=True)
class Rescaled:
    """One group of values that was made smaller by 2^exponent: the largest of them, before, and where it arises."""

    tensor: str
    largest: float
    exponent: int


class _Groups:
    """Disjoint sets of nodes (Tarjan 1975)."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self.pinned: set[fx.Node] = set()

    def find(self, node: fx.Node) -> fx.Node:
        parent = self._parent.setdefault(node, node)
        if parent is not node:
            parent = self._parent[node] = self.find(parent)
        return parent

    def tie(self, first: fx.Node, second: fx.Node) -> None:
        first, second = self.find(first), self.find(second)
        if first is not second:
            self._parent[first] = second
            if first in self.pinned:
                self.pinned.add(second)

    def pin(self, node: fx.Node) -> None:
        self.pinned.add(self.find(node))

    def free(self, node: fx.Node) -> bool:
        return self.find(node) not in self.pinned


def rescale(graph: fx.GraphModule, largest: Mapping[str, float]) -> list[Rescaled]:
    """Scale weights and eps of `graph` in place so that values fit into fp16 where that is possible.

    `largest`: see `scan_ranges`; afterwards the magnitude of a node is that divided by 2^exponent of its group. Returns
    what was scaled, empty where nothing had to be.
    """
    groups = _tie(graph)
    exponents: dict[fx.Node, int] = {}
    found: list[Rescaled] = []
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.name in largest and groups.free(node) and not _is_weight(node):
            members.setdefault(groups.find(node), []).append(node)
    for root, nodes in members.items():
        top = max(nodes, key=lambda node: largest[node.name])
        size = largest[top.name]
        if math.isfinite(size) and size > LARGEST / MARGIN:
            exponents[root] = math.ceil(math.log2(size * MARGIN / LARGEST))
            found.append(Rescaled(title(top), size, exponents[root]))
    if found:
        _apply(graph, groups, exponents)
    return found


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors a node reads, weights included."""
    return [value for value in node.all_input_nodes if _is_tensor(value)]


def _is_tensor(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    value = node.meta.get("val")
    return isinstance(value, Tensor | tuple | list)


def _tie(graph: fx.GraphModule) -> _Groups:
    groups = _Groups()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            continue
        inputs = _inputs(node)
        if node.op != "call_function":  # placeholder, output
            for value in (node, *inputs):
                groups.pin(value)
        elif node.target in NORMS:
            groups.pin(node)
            for parameter in inputs[1:]:
                groups.pin(parameter)
        elif node.target in WEIGHTED and _own_parameters(node):
            pass  # its weights take up whatever lies between the scales of input and output
        elif node.target in TIED or _is_item(node) or _by_number(node):
            if any(not isinstance(argument, fx.Node) for argument in node.args[:2]) and node.target in (
                aten.add.Tensor, aten.sub.Tensor,
            ):  # fmt: skip
                groups.pin(node)  # x + 1
            for value in inputs:
                groups.tie(value, node)
        else:
            for value in (node, *inputs):
                groups.pin(value)
    return groups


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _by_number(node: fx.Node) -> bool:
    return node.target in (aten.mul.Tensor, aten.div.Tensor) and not isinstance(node.args[1], fx.Node)


def _is_weight(node: fx.Node) -> bool:
    return node.op == "get_attr" and any(user.target in WEIGHTED for user in node.users)


def _own_parameters(node: fx.Node) -> bool:
    """Whether weight and bias are parameters that no other node reads."""
    weights = [argument for argument in node.args[1:3] if argument is not None]
    return all(isinstance(value, fx.Node) and value.op == "get_attr" and len(value.users) == 1 for value in weights)


def _apply(graph: fx.GraphModule, groups: _Groups, exponents: Mapping[fx.Node, int]) -> None:
    def exponent(node: fx.Node) -> int:
        return exponents.get(groups.find(node), 0) if groups.free(node) else 0

    for node in graph.graph.nodes:
        if node.op == "get_attr":
            if exponent(node) and not _is_weight(node):  # a constant that is added
                attribute(graph, node.target).data.mul_(2.0 ** -exponent(node))
        elif node.op != "call_function":
            continue
        elif node.target in NORMS and exponent(node.args[0]):
            place = NORMS[node.target]
            eps = node.args[place] if len(node.args) > place else 1e-5
            arguments = [*node.args, *([None] * (place - len(node.args)))][:place]
            node.args = (*arguments, eps * 4.0 ** -exponent(node.args[0]))
        elif node.target in WEIGHTED and _own_parameters(node):
            inward, outward = exponent(node.args[0]), exponent(node)
            attribute(graph, node.args[1].target).data.mul_(2.0 ** (inward - outward))
            if len(node.args) > 2 and node.args[2] is not None:
                attribute(graph, node.args[2].target).data.mul_(2.0**-outward)
    graph.recompile()
