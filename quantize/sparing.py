"""Nodes that quantization hurts most stay in float: the fewest with which a recipe still is the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm_deploy.eval.parity import ParityResult, Probe, compare_outputs
from ldm_deploy.quantize.kit import Kit
from ldm_deploy.quantize.scheme import AnyRecipe

MOST = 0.25  # share of a recipe's nodes that may be spared
# Of the parity limit: what is spared is chosen on a few inputs, and a sampler's later steps amplify the rest.
MARGIN = 0.9


def spare(
    kit: Kit,
    path: Path,
    recipe: AnyRecipe,
    probes: Sequence[Probe],
    limit: float,
    alone: dict[str, float] | None = None,
) -> tuple[AnyRecipe, ParityResult] | None:
    """Write to `path` the recipe's graph with as few nodes in float as keep its error within `MARGIN` of `limit`.

    Every node is quantized alone and ranked by the error it causes in the component's output; those at the head of the
    list are spared. `alone` keeps these errors for the next recipe. None, and no file, if even `MOST` of the nodes are
    not enough.
    """

    def build(kept: Sequence[str], within: float) -> tuple[AnyRecipe, ParityResult]:
        chosen = replace(recipe, keep_float=tuple(kept))
        kit.build(path, chosen)
        return chosen, compare_outputs(kit.open(path, chosen), probes, within)

    names = [layer.name for layer in kit.layers(recipe)]
    if len(set(names)) < len(names):
        return None  # without names of their own nodes cannot be told apart
    alone = {} if alone is None else alone
    for name in names:
        if name not in alone:
            alone[name] = build([other for other in names if other != name], np.inf)[1].relative_error
    ranked = sorted(names, key=lambda name: -alone[name])
    count = fewest(int(MOST * len(names)), lambda count: build(ranked[:count], MARGIN * limit)[1].passed)
    if count is None:
        for file in kit.files(path):
            file.unlink(missing_ok=True)  # none was built where too few layers may be spared
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
