"""Nodes that quantization hurts most stay in float: the fewest with which a recipe still is the reference."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

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

    Nodes are ranked by the error that each causes alone in the component's output (`ranking`); those at the head of the
    list are spared. `alone` keeps these errors for the next recipe. None, and no file, if even `MOST` of the nodes are
    not enough, or cannot be (`hopeless`).
    """

    def build(kept: Sequence[str], within: float) -> tuple[AnyRecipe, ParityResult]:
        chosen = replace(recipe, keep_float=tuple(kept))
        kit.build(path, chosen)
        return chosen, compare_outputs(kit.open(path, chosen, trial=True), probes, within)

    def error(group: Sequence[str]) -> float:
        found = build([name for name in names if name not in group], math.inf)[1]
        error = found.relative_error / found.allowance
        return math.inf if math.isnan(error) else error

    @functools.cache
    def enough(count: int) -> bool:
        return build(ranked[:count], MARGIN * limit)[1].passed

    names = [layer.name for layer in kit.layers(recipe)]
    if len(set(names)) < len(names):
        return None  # without names of their own nodes cannot be told apart
    most, due = int(MOST * len(names)), 1
    ranked: list[str] = []
    stop = functools.partial(hopeless, most=most, limit=limit)
    for name, left in ranking(names, error, {} if alone is None else alone, stop) if most else ():
        ranked.append(name)
        if len(ranked) < most and (left > MARGIN * limit or len(ranked) < due):
            continue
        if enough(len(ranked)):
            count = fewest(len(ranked), enough)
            return build(ranked[:count], limit)
        if len(ranked) == most:
            break
        due = len(ranked) + 1 + len(ranked) // 4
    for file in kit.files(path):
        file.unlink(missing_ok=True)  # none was built where too few layers may be spared
    return None


def hopeless(found: int, errors: Sequence[float], most: int, limit: float) -> bool:
    """Whether `most` names, `found` of them known, leave more than `limit` whichever they are.

    `errors`: of the groups in which the others are. If a single name of a group causes all of its error, sparing that
    one removes it; more than that no choice can.
    """
    return math.sqrt(sum(error**2 for error in heapq.nsmallest(len(errors) - (most - found), errors))) > limit


def ranking(
    names: Sequence[str],
    error: Callable[[Sequence[str]], float],
    alone: dict[str, float],
    stop: Callable[[int, Sequence[float]], bool] = lambda found, errors: False,
) -> Iterator[tuple[str, float]]:
    """(name, error that is left without it and those before it), the name that causes the largest error first.

    `error` measures a group, the costly step: whichever group has the largest error is halved. Squared errors add up
    (those of nodes are hardly correlated), so that one half tells of the other, which is measured only when its turn
    comes. The first few of a hundred are known after some thirty measurements. `alone`: errors of single names, known
    and found. Ends early if `stop`, given how many names were found and the errors of the groups left, says so.
    """
    found = 0
    rest = tuple(name for name in names if name not in alone)
    groups: list[tuple[float, tuple[str, ...], bool]] = []  # minus the error, names, whether it was measured
    groups += [(-alone[name], (name,), True) for name in names if name in alone]
    groups += [(-error(rest), rest, True)] if rest else []
    heapq.heapify(groups)
    while groups and not stop(found, [-negative for negative, *_ in groups]):
        negative, group, measured = heapq.heappop(groups)
        if not measured:
            heapq.heappush(groups, (-error(group), group, True))
        elif len(group) == 1:
            alone[group[0]] = -negative
            found += 1
            yield group[0], math.sqrt(sum(other**2 for other, *_ in groups))
        else:
            first, second = group[: len(group) // 2], group[len(group) // 2 :]
            one = error(first)
            other = math.inf if math.isinf(negative) else math.sqrt(max(0.0, negative**2 - one**2))
            heapq.heappush(groups, (-one, first, True))
            heapq.heappush(groups, (-other, second, False))


def fewest(most: int, enough: Callable[[int], bool]) -> int | None:
    """The smallest count from 1 to `most` that is enough, if more is never worse; None if `most` is not."""
    if most < 1 or not enough(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high
