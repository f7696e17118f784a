"""Distances between two sets of images, on features of the LPIPS backbone: a Fréchet and a kernel distance.

They are made like FID (Heusel et al. 2017) and KID (Bińkowski et al. 2018) on another network, so their values compare
with no published FID or KID and never carry these names. The sets are paired (image i of both was asked for with the
same prompt and seed, or has the same file name), which intervals and the kernel distance make use of. Features come
in blocks, in a fixed order; memory does not grow with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np

GROUPS = 10  # of images, left out in turn by the jackknife
RESAMPLES = 2000

Block = tuple[np.ndarray, np.ndarray]  # features of the reference and the candidate, (m, d) each, paired by row


class Scatter:
    """Count, mean and covariance of vectors that come in blocks, (m, d) each; blocks can be taken out again."""

    def __init__(self, origin: np.ndarray) -> None:
        """`origin` (d,): any vector near the mean, so that squares lose no digits."""
        self.origin = origin.astype(np.float64)
        self.count = 0
        self.total = np.zeros(len(origin))
        self.outer = np.zeros((len(origin), len(origin)))

    def add(self, vectors: np.ndarray) -> None:
        centred = vectors.astype(np.float64) - self.origin
        self.count += len(centred)
        self.total += centred.sum(axis=0)
        self.outer += centred.T @ centred

    def plus(self, other: Scatter, sign: int = 1) -> Scatter:
        """Both together; with -1, without the vectors of `other`."""
        both = Scatter(self.origin)
        both.count = self.count + sign * other.count
        both.total = self.total + sign * other.total
        both.outer = self.outer + sign * other.outer
        return both

    @property
    def mean(self) -> np.ndarray:
        return np.asarray(self.origin + self.total / self.count)

    def factor(self) -> np.ndarray:
        """(rank, d), factorᵀ factor = unbiased covariance. What rounding left of a singular matrix's zeros is cut."""
        covariance = (self.outer - np.outer(self.total, self.total) / self.count) / (self.count - 1)
        values, vectors = np.linalg.eigh(covariance)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return np.asarray(np.sqrt(values[kept])[:, None] * vectors[:, kept].T)


def frechet_distance(first: Scatter, second: Scatter) -> float:
    """‖m1 - m2‖² + tr(S1 + S2 - 2 (S1 S2)^½), means m and covariances S (Dowson and Landau 1982, eq. 4).

    With S = FᵀF the last trace is the sum of the singular values of F1 F2ᵀ: no root of a d x d matrix, which is
    singular for d images or fewer. It is the distance of normal distributions, and of a few images far above that of
    the populations, so only values of equal numbers of images compare. Raises `ValueError` for fewer than two vectors.
    """
    if min(first.count, second.count) < 2:
        raise ValueError("a Fréchet distance needs two images or more")
    a, b = first.factor(), second.factor()
    step = first.mean - second.mean
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
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

    The interval of the Fréchet distance is a jackknife's that leaves out every tenth image of both sets in turn (Efron
    and Tibshirani 1993, section 11.5). A bootstrap sample repeats images, and fewer different images raise this
    distance: between independent sets its percentiles do not even hold the estimate.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # rounding must not depend on the number of threads, nor they wait for each other
        return _set_distances(iter(blocks), seed)


def _set_distances(blocks: Iterator[Block], seed: int) -> dict[str, dict[str, Any]]:
    first, second = next(blocks, None), next(blocks, None)
    if first is None or (second is None and len(first[0]) < 2):
        reason = "a distance between sets needs two images or more"
        return {name: not_measured_set(reason) for name in ("frechet_distance", "kernel_distance")}
    kernel = KernelSum(seed)
    if second is None:
        first = _few_dimensions(*first)
    groups = [[Scatter(features.mean(axis=0)) for _ in range(GROUPS)] for features in first]
    count = 0
    for block in chain([first] if second is None else [first, second], blocks):
        kernel.add(*block)
        group = (count + np.arange(len(block[0]))) % GROUPS
        for scatters, features in zip(groups, block, strict=True):
            for number, scatter in enumerate(scatters):
                scatter.add(features[group == number])
        count += len(block[0])
    wholes = [reduce(Scatter.plus, scatters) for scatters in groups]
    frechet = frechet_distance(*wholes)
    left = []
    for parts in zip(*groups, strict=True):
        if 0 < parts[0].count < count - 1:
            left.append(frechet_distance(*(whole.plus(part, -1) for whole, part in zip(wholes, parts, strict=True))))
    return {
        "frechet_distance": _figure(frechet, jackknife_ci(frechet, left), count),
        "kernel_distance": _figure(kernel.value, kernel.interval, count),
    }


def _few_dimensions(reference: np.ndarray, candidate: np.ndarray) -> Block:
    """The same vectors in coordinates of the space they span, (m, min(2 m, d)): no distance or product changes."""
    rows = np.vstack([reference, candidate]).astype(np.float64)
    if len(rows) < rows.shape[1]:
        rows = rows @ np.linalg.qr(rows.T)[0]
    return rows[: len(reference)], rows[len(reference) :]


def jackknife_ci(value: float, left: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """value ± t · standard error, from the estimates with one group left out each; None for fewer than two."""
    if len(left) < 2:
        return None
    from scipy.special import stdtrit  # lpips, without which there are no features, needs scipy too

    estimates = np.asarray(left)
    error = np.sqrt((len(left) - 1) * np.mean((estimates - estimates.mean()) ** 2))
    reach = float(stdtrit(len(left) - 1, (1 + level) / 2) * error)
    return max(0.0, value - reach), value + reach


def not_measured_set(reason: str) -> dict[str, Any]:
    return {"value": None, "ci95": None, "n": 0, "reason": reason}


def _figure(value: float, interval: tuple[float, float] | None, count: int) -> dict[str, Any]:
    return {"value": value, "ci95": list(interval) if interval else None, "n": count, "reason": None}
