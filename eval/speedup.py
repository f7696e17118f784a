"""How many times faster, and whether the run that says so is fit to be judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm_deploy.eval.metrics import ratio_ci

WIDTH = 0.04  # an interval whose ends are within 4 % is narrow enough to stop at
TOO_WIDE = 0.5
DRIFT = 0.05  # by how much the halves of a run may differ, beyond chance, before it is not judged
FEWEST = 12  # pairs of which halves can be compared
CHANCE = 3.3  # standard deviations; one quiet run in a thousand goes beyond


def speedup(
    baseline_ms: Sequence[float] | np.ndarray, candidate_ms: Sequence[float] | np.ndarray, versus: str, *, seed: int = 0
) -> dict[str, Any]:
    """A ratio as report.json has it: `ratio_ci`'s "median", "ci95_low", "ci95_high", with "versus" and "noise".

    Sample i of both comes from the same round, in order of time. `noise`: why no gate should be judged by it, or None.
    """
    ratio: dict[str, Any] = {**ratio_ci(baseline_ms, candidate_ms, seed=seed), "versus": versus}
    return {**ratio, "noise": _noise(np.log(np.asarray(baseline_ms) / np.asarray(candidate_ms)), ratio)}


def _noise(log_ratios: np.ndarray, ratio: Mapping[str, Any]) -> str | None:
    """A wide interval is judged as what it is, unless it says nothing; what an interval cannot show is that the ratio
    itself changed during the run: another tenant that hurts one of the two, a clock that fell, an engine still warming.
    """
    low, high = ratio["ci95_low"], ratio["ci95_high"]
    if low is not None and high / low - 1 > TOO_WIDE:
        return f"too noisy: the 95 % interval {low:.2f} to {high:.2f} is wider than {TOO_WIDE:.0%}"
    if len(log_ratios) < FEWEST:
        return None
    halves = np.array_split(log_ratios, 2)
    medians = [float(np.median(half)) for half in halves]
    variance = sum(median_variance(half) for half in halves)
    change = abs(medians[1] - medians[0])
    if change > DRIFT and change > CHANCE * math.sqrt(variance):
        first, second = (math.exp(median) for median in medians)
        return f"too noisy: the ratio was {first:.2f} in the first half of the run and {second:.2f} in the second"
    return None


def median_variance(values: np.ndarray) -> float:
    """Variance of the median of n values with standard deviation σ: π σ² / (2 n).

    σ is taken to be 1.4826 times the median absolute deviation, which bursts of load do not move.
    """
    spread = 1.4826 * float(np.median(np.abs(values - np.median(values))))
    return math.pi / 2 * spread**2 / len(values)


def narrow(samples: Mapping[str, Sequence[float]], *, seed: int = 0) -> bool:
    """Whether every ratio to the first of `samples` is known to `WIDTH`: the rule by which a run stops.

    Stopping at a width, unlike stopping at a verdict, leaves the interval's level what it is (Chow and Robbins 1965).
    """
    first, *others = samples.values()
    for times in others:
        ratio = ratio_ci(first, times, seed=seed)
        low, high = ratio["ci95_low"], ratio["ci95_high"]
        if low is None or high is None or high / low - 1 > WIDTH:
            return False
    return True
