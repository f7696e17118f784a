"""Faults planted in ONNX graphs: a scale off by a tenth, two channels swapped, colours half a grey level off.

Each is what a broken export or quantization does, and leaves a graph that loads and runs without complaint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

COLOURS = ("red", "green", "blue")
WEIGHTED = ("Conv", "Gemm", "MatMul")
Plant = Callable[[dict[str, Any], np.random.Generator], tuple[str, str]]


def scale_a_layer(models: dict[str, Any], rng: np.random.Generator) -> tuple[str, str]:
    """Multiply the weight of one layer, of any component, by 1.1. Returns (component, what was done).

    Of a quantized weight it is the scale that is multiplied: the fault that the quantizer of one layer could make.
    """
    component, node, parts = _draw(models, rng, WEIGHTED)
    change = parts.get("scale", parts["weight"])
    _edit(models[component], change, lambda value: (value * np.float32(1.1)).astype(value.dtype))
    return component, f"{node.name} scaled"


def swap_two_channels(models: dict[str, Any], rng: np.random.Generator) -> tuple[str, str]:
    """Exchange two output channels of one convolution, weight and bias."""
    component, node, parts = _draw(models, rng, ("Conv",))
    channels = _values(models[component], parts["weight"]).shape[0]
    first, second = (int(index) for index in rng.choice(channels, 2, replace=False))

    def swap(value: np.ndarray) -> np.ndarray:
        if value.ndim == 0 or len(value) != channels:
            return value  # one scale for the whole tensor
        swapped = value.copy()
        swapped[[first, second]] = value[[second, first]]
        return swapped

    for name in parts.values():
        _edit(models[component], name, swap)
    return component, f"{node.name} channels {first} and {second} swapped"


def shift_a_colour(models: dict[str, Any], rng: np.random.Generator) -> tuple[str, str]:
    """Add half a grey level to one colour channel of the decoder's last convolution, or take it away."""
    from onnx import helper, numpy_helper

    graph = models["vae_decoder"].graph
    last = [node for node in graph.node if node.op_type == "Conv"][-1]
    channel, sign = int(rng.integers(3)), int(rng.choice((-1, 1)))
    shift = np.zeros((1, 3, 1, 1), np.float32)
    shift[0, channel] = sign * 0.5 / 127.5  # the decoder's image is in [-1, 1]
    graph.initializer.append(numpy_helper.from_array(shift, "planted_shift"))
    output, last.output[0] = last.output[0], "before_planted_shift"
    place = list(graph.node).index(last) + 1
    graph.node.insert(place, helper.make_node("Add", ["before_planted_shift", "planted_shift"], [output]))
    return "vae_decoder", f"{COLOURS[channel]} {sign * 0.5:+} grey levels"


def _draw(models: dict[str, Any], rng: np.random.Generator, kinds: tuple[str, ...]) -> tuple[str, Any, dict[str, str]]:
    """(component, node, its constants): a node with a constant weight, all of all components being as likely."""
    found = [
        (component, node, parts)
        for component, model in models.items()
        for node in model.graph.node
        if node.op_type in kinds and "weight" in (parts := _constants(model, node))
    ]
    return found[int(rng.integers(len(found)))]


def _constants(model: Any, node: Any) -> dict[str, str]:
    """Names of the initializers behind a node's weight and bias; of a quantized one also its scale and zero point."""
    initializers = {entry.name for entry in model.graph.initializer}
    sources = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    parts: dict[str, str] = {}
    for label, name in zip(("weight", "bias"), node.input[1:3], strict=False):
        prefix = "" if label == "weight" else "bias_"
        if name in initializers:
            parts[label] = name
        elif name in sources and sources[name].input[0] in initializers:
            keys = (label, f"{prefix}scale", f"{prefix}zero_point")
            parts |= dict(zip(keys, sources[name].input, strict=False))
    return parts


def _values(model: Any, name: str) -> np.ndarray:
    from onnx import numpy_helper

    (entry,) = [entry for entry in model.graph.initializer if entry.name == name]
    return np.asarray(numpy_helper.to_array(entry))


def _edit(model: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    from onnx import numpy_helper

    (entry,) = [entry for entry in model.graph.initializer if entry.name == name]
    entry.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(_values(model, name))), name))
