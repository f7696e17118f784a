"""Nodes that quantization hurts most stay in float: the fewest with which a recipe still is the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm_deploy.eval.parity import ParityResult, Probe, compare_outputs
from ldm_deploy.onnx_graph import load_model
from ldm_deploy.quantize.observe import Histogram
from ldm_deploy.quantize.onnxruntime_cpu import quantize_graph
from ldm_deploy.quantize.qdq import select_nodes
from ldm_deploy.quantize.scheme import Recipe
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

MOST = 0.25  # share of a recipe's nodes that may be spared
# Of the parity limit: what is spared is chosen on a few inputs, and a sampler's later steps amplify the rest.
MARGIN = 0.9


def spare(
    model_path: Path,
    path: Path,
    recipe: Recipe,
    histograms: Mapping[str, Histogram],
    probes: Sequence[Probe],
    limit: float,
    *,
    threads: int | None = None,
) -> tuple[Recipe, ParityResult] | None:
    """Write to `path` the recipe's graph with as few nodes in float as keep its error within `MARGIN` of `limit`.

    Every node is quantized alone and ranked by the error it causes in the component's output; those at the head of the
    list are spared. None, and no file, if even `MOST` of the nodes are not enough.
    """

    def build(kept: Sequence[str], within: float) -> tuple[Recipe, ParityResult]:
        chosen = replace(recipe, keep_float=tuple(kept))
        quantize_graph(model_path, path, (), chosen, histograms=histograms)
        return chosen, compare_outputs(OnnxRuntimeEngine(path, threads=threads), probes, within)

    names = [node.name for node in select_nodes(load_model(model_path), recipe)]
    if len(set(names)) < len(names):
        return None  # without names of their own nodes cannot be told apart
    alone = {name: build([other for other in names if other != name], np.inf)[1].relative_error for name in names}
    ranked = sorted(names, key=lambda name: -alone[name])
    count = fewest(int(MOST * len(names)), lambda count: build(ranked[:count], MARGIN * limit)[1].passed)
    if count is None:
        path.unlink()
        return None
    return build(ranked[:count], limit)


def fewest(most: int, enough: Callable[[int], bool]) -> int | None:
    """The smallest count from 1 to `most` that is enough, if more is never worse; None if `most` is not."""
    if most < 1 or not enough(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high
