"""How far apart are images? PSNR, SSIM, LPIPS, and bootstrap intervals. Nothing is ever resized or rescaled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# PSNR of identical images is infinite, which neither averages nor fits into JSON. The smallest difference that a
# 64x64 RGB image can have is 89 dB, so 100 dB stands for "identical" in means; `psnr_db` itself returns infinity.
IDENTICAL_DB = 100.0

SSIM_SIGMA = 1.5  # Wang et al. 2004, section III.C
SSIM_RADIUS = 5  # int(3.5 sigma + 0.5), as scikit-image has it: an 11-tap window


def check_pair(reference: np.ndarray, candidate: np.ndarray) -> None:
    """Raises `ValueError` unless shapes and dtypes agree and every value is finite."""
    if reference.shape != candidate.shape:
        raise ValueError(
            f"shapes differ: reference {reference.shape}, candidate {candidate.shape}; images are never resized"
        )
    if reference.dtype != candidate.dtype:
        raise ValueError(
            f"dtypes differ: reference {reference.dtype}, candidate {candidate.dtype}; convert one, with its range"
        )
    for name, image in (("reference", reference), ("candidate", candidate)):
        if not np.isfinite(image).all():
            raise ValueError(f"the {name} holds NaN or infinity; find the engine that returned it")


def psnr_db(reference: np.ndarray, candidate: np.ndarray, *, peak: float) -> float:
    """10 log10(peak² / MSE) over all values, in dB; infinity for equal arrays.

    `peak` is the largest possible difference (255 for uint8, 2 for floats in [-1, 1]) and has no default, because a
    wrong one shifts every figure. Raises `ValueError` for unequal shapes or dtypes, NaN, or a peak not above 0.
    """
    check_pair(reference, candidate)
    if not peak > 0:
        raise ValueError(f"peak is {peak}; give the largest possible value, 255 for uint8")
    mse = float(np.mean((reference.astype(np.float64) - candidate.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)


def psnr_db_each(reference: np.ndarray, candidate: np.ndarray, *, peak: float) -> np.ndarray:
    """`psnr_db` of each image of two batches (n, H, W, C) -> float64 (n,); identical images count as `IDENTICAL_DB`."""
    check_pair(reference, candidate)
    pairs = zip(reference, candidate, strict=True)
    return np.array([min(psnr_db(a, b, peak=peak), IDENTICAL_DB) for a, b in pairs])


def ssim(reference: np.ndarray, candidate: np.ndarray, *, peak: float) -> np.ndarray:
    """Structural similarity of each image of two batches (n, H, W, C) -> float64 (n,), 1 for equal images.

    Wang et al. 2004 with Gaussian weights, per channel, then the mean. Equal to scikit-image's `structural_similarity`
    with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=peak`.
    Raises `ValueError` for unequal shapes or dtypes, NaN, or images smaller than the 11-pixel window.
    """
    check_pair(reference, candidate)
    window = 2 * SSIM_RADIUS + 1
    if reference.ndim != 4 or min(reference.shape[1:3]) < window:
        raise ValueError(f"SSIM needs images (n, H, W, C) of {window}x{window} or more; got {reference.shape}")
    x, y = reference.astype(np.float64), candidate.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x * mean_x
    variance_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return np.asarray((luminance * structure).mean(axis=(1, 2, 3)))


def _blur(images: np.ndarray) -> np.ndarray:
    """Gaussian window over H and W, where it fits whole: (n, H, W, C) -> (n, H - 10, W - 10, C).

    scikit-image filters the whole image and then drops the border of half a window, which comes to the same.
    """
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()
    for axis in (1, 2):
        images = np.lib.stride_tricks.sliding_window_view(images, len(weights), axis=axis) @ weights
    return images


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 4000,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of `statistic` (called with `axis=1`); None for fewer than two values.

    Seeded, so the same values give the same interval. Efron and Tibshirani 1993, chapter 13.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = statistic(sample[rng.integers(sample.size, size=(resamples, sample.size))], axis=1)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return float(low), float(high)


def ratio_ci(
    baseline_ms: Sequence[float] | np.ndarray,
    candidate_ms: Sequence[float] | np.ndarray,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, float | None]:
    """How many times faster the candidate is: the median of the paired ratios baseline / candidate, with its interval.

    Sample i of both must come from the same round, so that what slowed the machine down slowed both. Raises
    `ValueError` for unequal numbers of samples. The interval is None for a single pair.
    """
    baseline, candidate = np.asarray(baseline_ms, np.float64), np.asarray(candidate_ms, np.float64)
    if baseline.shape != candidate.shape or baseline.ndim != 1 or baseline.size == 0:
        raise ValueError(f"paired samples are needed; got {baseline.shape} and {candidate.shape}")
    ratios = baseline / candidate
    low, high = bootstrap_ci(ratios, np.median, level, seed) or (None, None)
    return {"median": float(np.median(ratios)), "ci95_low": low, "ci95_high": high}
