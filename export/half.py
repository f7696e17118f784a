"""A module in fp16 or bf16 that draws what it drew in fp32: weights and arithmetic halved, except where that breaks.

Kept in fp32: the statistics of norms, what is computed from integers alone (a timestep of 999 has no place in bf16's 8
bits), and every operator that takes or returns a value which fp16 cannot hold after `rescale` did what it could.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ldm_deploy.export.graph import attribute, title, trace
from ldm_deploy.export.ranges import scan_ranges
from ldm_deploy.export.rescale import LARGEST, MARGIN, NORMS, WEIGHTED, Rescaled, rescale

LISTED = 20  # of the largest magnitudes, in bundle.json
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class HalfReport:
    """What was found and done. `largest`: where -> largest magnitude in fp32 before any repair, largest first."""

    precision: str
    largest: dict[str, float]
    rescaled: list[Rescaled] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)  # where -> why it stays in fp32

    def to_dict(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "limit": LARGEST,
            "margin": MARGIN,
            "largest": dict(list(self.largest.items())[:LISTED]),
            "rescaled": [vars(entry) for entry in self.rescaled],
            "kept_fp32": self.kept,
        }


def to_half(
    module: nn.Module,
    samples: Sequence[Mapping[str, np.ndarray]],
    axes: Mapping[str, Mapping[int, str]],
    precision: str,
    *,
    repair: bool = True,
) -> tuple[nn.Module, HalfReport]:
    """A module with the inputs and outputs of `module`, in their types, that computes in `precision`.

    `samples`: real inputs, by name; the first with no symbolic axis shorter than 2 is traced. `repair` False halves
    everything as `module.half()` would, to show what that does.
    """
    example = max(samples, key=lambda sample: min(size for value in sample.values() for size in value.shape))
    graph = trace(module, example, axes)
    scan = scan_ranges(graph, samples)
    nodes = {node.name: node for node in graph.graph.nodes}
    ordered = sorted(scan, key=lambda name: -scan[name] if scan[name] == scan[name] else -np.inf)
    report = HalfReport(precision, {title(nodes[name]): scan[name] for name in ordered if nodes[name].op != "output"})
    limit = np.inf
    if precision == "fp16" and repair:
        report.rescaled = rescale(graph, scan)
        scan = scan_ranges(graph, samples) if report.rescaled else scan
        limit = LARGEST / MARGIN
    kept = _kept(graph, scan, limit) if repair else _integers(graph)
    report.kept = {title(nodes[name]): reason for name, reason in kept.items() if reason != "integers"}
    return HalfModule(graph, DTYPES[precision], set(kept)).eval(), report


def _kept(graph: fx.GraphModule, largest: Mapping[str, float], limit: float) -> dict[str, str]:
    """node name -> why it is computed in fp32."""
    kept = _integers(graph)
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.name in kept:
            continue
        touched = {
            name: largest.get(name, 0.0) for name in (node.name, *(value.name for value in node.all_input_nodes))
        }
        worst = max(touched, key=lambda name: touched[name])
        if node.target in NORMS:
            kept[node.name] = "statistics of a norm"
        elif not touched[worst] <= limit:
            kept[node.name] = f"a magnitude of {touched[worst]:.4g} is beyond {limit:.4g}"
    return kept


def _integers(graph: fx.GraphModule) -> dict[str, str]:
    """Nodes whose result follows from integers alone; the first layer with weights ends that."""
    found: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if isinstance(value, Tensor) and not value.is_floating_point():
                found[node.name] = "integers"
        elif node.op == "call_function" and node.target not in (*WEIGHTED, torch.ops.aten.embedding.default):
            inputs = [value for value in node.all_input_nodes if value.op != "get_attr"]
            if all(value.name in found for value in inputs):
                found[node.name] = "integers"
    return found


class HalfModule(nn.Module):
    """Runs a graph node by node, each with its floating inputs in the type it computes in; can be traced again."""

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype, kept: set[str]) -> None:
        super().__init__()
        self.traced, self.dtype, self.kept = graph, dtype, kept
        for node in graph.graph.nodes:
            if node.op == "get_attr" and any(user.name not in kept for user in node.users):
                value = attribute(graph, node.target)
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.data = value.data.to(dtype)

    def forward(self, *inputs: Tensor) -> Any:
        outputs = _Halves(self.traced, self.dtype, self.kept, inputs[0].device).run(*inputs)
        return _cast(outputs, torch.float32)


class _Halves(fx.Interpreter):
    """`device`: where tensors are made that the graph, traced elsewhere, makes itself."""

    def __init__(self, graph: fx.GraphModule, dtype: torch.dtype, kept: set[str], device: torch.device) -> None:
        super().__init__(graph)
        self.dtype, self.kept, self.device = dtype, kept, device

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        dtype = torch.float32 if n.name in self.kept else self.dtype
        args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self.device}
        return self.call_function(n.target, args, kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cast(part, dtype) for part in value)
    return value
