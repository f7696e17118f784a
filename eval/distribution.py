"""Distances between two sets of images, on features of the LPIPS backbone: a Fréchet and a kernel distance.

They are made like FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018) on another network, so their values compare
with no published FID or KID and never carry these names. The sets are paired (image i of both was asked for with the
same prompt and seed, or has the same file name), which intervals and the kernel distance make use of. Features
come in blocks, in a fixed order; memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

GROUPS = 20  # of images, left out in turn by the jackknife
RESAMPLES = 2000

Block = tuple[np.ndarray, np.ndarray]  # features of the reference and the candidate, (m, d) each, paired by row


@dataclass(frozen=True)
class Spread:
    """Mean and scatter of a set of vectors. `factor` (r, d): factorᵀ factor = sum of (x - mean)(x - mean)ᵀ.

    The factor, not the d x d matrix: it has few rows for few vectors, its products lose no digits to squaring, and
    nothing has to be inverted or rooted where the matrix is singular.
    """

    count: int
    mean: np.ndarray
    factor: np.ndarray


def spread_of(vectors: np.ndarray) -> Spread:
    """Of the rows of float (m, d), m of 1 or more; computed in float64."""
    vectors = vectors.astype(np.float64)
    mean = vectors.mean(axis=0)
    return Spread(len(vectors), mean, vectors - mean)


def merge(first: Spread, second: Spread) -> Spread:
    """Of both sets together (Chan, Golub and LeVeque 1983, eq. 2.1); the factor is kept at 2 d rows or fewer."""
    count = first.count + second.count
    step = second.mean - first.mean
    between = np.sqrt(first.count * second.count / count) * step
    factor = np.vstack([first.factor, second.factor, between])
    if len(factor) > 2 * len(step):
        factor = np.linalg.qr(factor, mode="r")
    return Spread(count, first.mean + step * (second.count / count), factor)


def frechet_distance(first: Spread, second: Spread) -> float:
    """‖m1 - m2‖² + tr(S1 + S2 - 2 (S1 S2)^½), means m and unbiased covariances S (Dowson and Landau 1982, eq. 4).

    With S = FᵀF the last trace is the sum of the singular values of F1 F2ᵀ. Of normal distributions; of a few images
    it is far above the distance of the populations, so only values of equal numbers of images compare. Raises
    `ValueError` for fewer than two vectors.
    """
    if min(first.count, second.count) < 2:
        raise ValueError("a Fréchet distance needs two images or more")
    a, b = (part.factor / np.sqrt(part.count - 1) for part in (first, second))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    step = first.mean - second.mean
    return max(0.0, float(step @ step + np.sum(a * a) + np.sum(b * b) - 2 * cross))


class KernelSum:
    """Kernel distance (squared maximum mean discrepancy), summed over blocks.

    k(x, y) = (x·y + 1)³, as KID but for the division by the dimension, because these features are of unit length at
    most. The estimate is the U-statistic of pairs (Gretton et al. 2012, lemma 6) over
    images i ≠ j of the same block: the mean of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i). It is unbiased
    although x_i and y_i depend on each other, is 0 for equal sets, may be negative, and takes linear time (the block
    test of Zaremba et al. 2013). Resamples weight images by independent Poisson numbers, which needs no list of all.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.blocks = 0
        self.total = self.pairs = 0.0
        self.totals, self.pairs_drawn = np.zeros(RESAMPLES), np.zeros(RESAMPLES)

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """One block of features, float (m, d) each."""
        x, y = reference.astype(np.float64), candidate.astype(np.float64)
        cross = _kernel(x, y)
        core = _kernel(x, x) + _kernel(y, y) - cross - cross.T
        np.fill_diagonal(core, 0)
        self.total += float(core.sum())
        self.pairs += len(x) * (len(x) - 1)
        weights = np.random.default_rng([self.seed, self.blocks]).poisson(1, (RESAMPLES, len(x))).astype(np.float64)
        self.totals += ((weights @ core) * weights).sum(axis=1)
        self.pairs_drawn += weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1)
        self.blocks += 1

    @property
    def value(self) -> float:
        """Raises `ValueError` for fewer than two images in a block."""
        if self.pairs == 0:
            raise ValueError("a kernel distance needs two images or more")
        return self.total / self.pairs

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % by percentiles of the resamples."""
        drawn = self.pairs_drawn > 0
        low, high = np.percentile(self.totals[drawn] / self.pairs_drawn[drawn], [2.5, 97.5])
        return float(low), float(high)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    similarity = x @ y.T + 1
    return np.asarray(similarity * similarity * similarity)


def set_distances(blocks: Iterable[Block], seed: int = 0) -> dict[str, dict[str, Any]]:
    """`frechet_distance` and `kernel_distance` of paired features: value, ci95, n, reason each.

    The interval of the Fréchet distance is a jackknife's that leaves out every 20th image of both sets in turn (Efron
    and Tibshirani 1993, section 11.5): a bootstrap sample repeats images, and fewer different images raise this
    distance so much that its percentiles need not hold the estimate.
    """
    kernel = KernelSum(seed)
    groups: list[dict[int, Spread]] = [{}, {}]
    count = 0
    for block in blocks:
        kernel.add(*block)
        group = (count + np.arange(len(block[0]))) % GROUPS
        for spreads, features in zip(groups, block, strict=True):
            for number in np.unique(group):
                own = spread_of(features[group == number])
                spreads[number] = merge(spreads[number], own) if number in spreads else own
        count += len(block[0])
    if count < 2:
        reason = "a distance between sets needs two images or more"
        return {name: not_measured_set(reason) for name in ("frechet_distance", "kernel_distance")}
    wholes, without = zip(*(_leave_one_out(list(spreads.values())) for spreads in groups), strict=True)
    frechet = frechet_distance(*wholes)
    left = [frechet_distance(*pair) for pair in zip(*without, strict=True)] if count > 2 else []
    return {
        "frechet_distance": _figure(frechet, jackknife_ci(frechet, left), count),
        "kernel_distance": _figure(kernel.value, kernel.interval, count),
    }


def _leave_one_out(parts: Sequence[Spread]) -> tuple[Spread, list[Spread]]:
    """(all merged, for each part all but it), from the merged beginnings and ends of the list."""
    heads = list(accumulate(parts, merge))
    tails = list(accumulate(reversed(parts), merge))[::-1]
    without = [merge(heads[index - 1], tails[index + 1]) for index in range(1, len(parts) - 1)]
    return heads[-1], [tails[1], *without, heads[-2]] if len(parts) > 1 else []


def jackknife_ci(value: float, left: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """value ± t · standard error, from the estimates with one group left out each; None for fewer than two."""
    if len(left) < 2:
        return None
    from scipy import stats  # lpips, without which there are no features, needs it too

    estimates = np.asarray(left)
    error = np.sqrt((len(left) - 1) * np.mean((estimates - estimates.mean()) ** 2))
    reach = float(stats.t.ppf((1 + level) / 2, len(left) - 1) * error)
    return max(0.0, value - reach), value + reach


def not_measured_set(reason: str) -> dict[str, Any]:
    return {"value": None, "ci95": None, "n": 0, "reason": reason}


def _figure(value: float, interval: tuple[float, float] | None, count: int) -> dict[str, Any]:
    return {"value": value, "ci95": list(interval) if interval else None, "n": count, "reason": None}
