"""A module as a graph of aten operators (torch.export), which the passes for half precision read and run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ldm_deploy.errors import ExportError

Axes = Mapping[str, Mapping[int, str]]  # input or output name -> {dimension: its symbol}


def trace(module: nn.Module, inputs: Mapping[str, np.ndarray], axes: Axes) -> fx.GraphModule:
    """The graph of `module` with attention written out; free axes as `export_module` has them.

    Its parameters are copies. Raises `ExportError` where forward() cannot be traced.
    """
    from ldm_deploy.export.attention import written_out

    args, kwargs, dynamic = bind(module, inputs, axes)
    try:
        with written_out(), torch.no_grad():
            program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)
    except Exception as error:
        raise ExportError(f"torch.export failed: {root_cause(error)}; rewrite that part of forward()") from error
    made = program.module(check_guards=False)
    assert isinstance(made, fx.GraphModule)
    graph = fx.GraphModule(made, made.graph)  # a plain one: that of torch.export refuses eval()
    for node in reversed(list(graph.graph.nodes)):
        if getattr(node.target, "__name__", "").startswith(("_assert", "sym_constrain")):
            graph.graph.erase_node(node)  # they ask for the types of the trace
    graph.recompile()
    for name, value in list(graph.named_parameters()):
        _replace(graph, name, value.detach().clone())
    return graph


def bind(module: nn.Module, inputs: Mapping[str, np.ndarray], axes: Axes) -> tuple[tuple[Tensor, ...], Any, Any]:
    """(args, kwargs, dynamic_shapes) for torch.export: inputs go by the names of forward()'s parameters if they are
    those, else in their order."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    dynamic = {name: dict.fromkeys(axes.get(name, {}), torch.export.Dim.AUTO) for name in inputs}
    parameters = inspect.signature(module.forward).parameters
    if set(inputs) <= set(parameters):
        return (), tensors, dynamic
    shapes: Any = tuple(dynamic.values())
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters.values()):
        shapes = (shapes,)  # of one parameter, *inputs
    return tuple(tensors.values()), None, shapes


def root_cause(error: BaseException) -> str:
    """The first line of the innermost exception: the outer ones only say that some step failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The floating tensors of a node's result."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def attribute(graph: nn.Module, name: str) -> Any:
    """What a get_attr node stands for."""
    value: Any = graph
    for part in name.split("."):
        value = getattr(value, part)
    return value


def title(node: fx.Node) -> str:
    """Where in the module a node comes from, and what it does: "decoder.mid_block.resnets.0.conv1 conv2d"."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    kind = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    place = stack[-1].removeprefix("L['self'].") if stack else ""
    return f"{place} {kind} ({node.name})" if place and "L['self']" not in place else f"{kind} ({node.name})"
