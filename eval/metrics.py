"""How far apart are images? PSNR, SSIM, MS-SSIM, and bootstrap intervals. Nothing is ever resized or rescaled.

Colour is in `colour.py`, the worst place of an image in `tiles.py`, LPIPS in `lpips_distance.py`, and distances between
sets of images in `distribution.py`.
"""

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
WINDOW = 2 * SSIM_RADIUS + 1
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2: finest scale first

BOOTSTRAP_BYTES = 8 * 2**20  # resamples are drawn so many bytes at a time, whatever the number of values


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


def check_range(reference: np.ndarray, candidate: np.ndarray, peak: float) -> None:
    """Raises `ValueError` unless the values of each span `peak` or less, which is the largest possible difference.

    A candidate may overshoot by a quarter: where the peak is the reference's own range, an engine's error leads beyond.
    """
    if not peak > 0:
        raise ValueError(f"peak is {peak}; give the largest possible value, 255 for uint8")
    for name, image in (("reference", reference), ("candidate", candidate)):
        low, high = (float(image.min()), float(image.max())) if image.size else (0.0, 0.0)
        if high - low > peak * (1 if image is reference else 1.25):
            raise ValueError(
                f"the {name} ranges from {low:g} to {high:g}, more than the peak {peak:g}; "
                "bring both images to one range and give its width as the peak"
            )


def mse_each(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Mean squared error of each image of two batches (n, H, W, C) -> float64 (n,), exact for uint8."""
    check_pair(reference, candidate)
    pairs = zip(reference, candidate, strict=True)
    return np.array([np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2) for a, b in pairs])


def psnr_db(reference: np.ndarray, candidate: np.ndarray, *, peak: float) -> float:
    """10 log10(peak² / MSE) over all values, in dB; infinity for equal arrays.

    `peak` is the largest possible difference (255 for uint8, 2 for floats in [-1, 1]) and has no default, because a
    wrong one shifts every figure. Raises `ValueError` for unequal shapes or dtypes, NaN, or values that span more than
    the peak.
    """
    check_pair(reference, candidate)
    check_range(reference, candidate, peak)
    mse = float(mse_each(reference[None], candidate[None])[0])
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)


def psnr_db_of(mse: np.ndarray | float, *, peak: float) -> np.ndarray:
    """dB of mean squared errors, at most `IDENTICAL_DB`. Of a mean of them: the PSNR of all images as one."""
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(peak**2 / np.asarray(mse, np.float64)), IDENTICAL_DB)


def psnr_db_each(reference: np.ndarray, candidate: np.ndarray, *, peak: float) -> np.ndarray:
    """`psnr_db` of each image of two batches (n, H, W, C) -> float64 (n,); identical images count as `IDENTICAL_DB`."""
    mse = mse_each(reference, candidate)
    check_range(reference, candidate, peak)
    return psnr_db_of(mse, peak=peak)


def ssim(reference: np.ndarray, candidate: np.ndarray, *, peak: float) -> np.ndarray:
    """Structural similarity of each image of two batches (n, H, W, C) -> float64 (n,), 1 for equal images.

    Wang et al. 2004 with Gaussian weights, per channel, then the mean. Equal to scikit-image's `structural_similarity`
    with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=peak`.
    Raises `ValueError` for unequal shapes or dtypes, NaN, values that span more than the peak, or images smaller than
    the 11-pixel window.
    """
    check_pair(reference, candidate)
    check_range(reference, candidate, peak)
    if reference.ndim != 4 or min(reference.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs images (n, H, W, C) of {WINDOW}x{WINDOW} or more; got {reference.shape}")
    pairs = zip(reference, candidate, strict=True)  # one at a time: an image fits into the cache, a batch does not
    return np.array([_similarity(a.astype(np.float64), b.astype(np.float64), peak)[0].mean() for a, b in pairs])


def ms_ssim_weights(height: int, width: int) -> np.ndarray:
    """The weights of the scales an image has room for: five from 176 pixels, three at 64.

    Wang et al. 2003 use five scales, the coarsest at a sixteenth of the size, which a window of 11 needs 176 pixels
    for. A smaller image gets the finest of them that fit, their weights brought to the sum of all five, so figures of
    different numbers of scales do not compare. Raises `ValueError` below two scales: that is SSIM.
    """
    scales = sum(min(height, width) >> scale >= WINDOW for scale in range(len(MS_SSIM_WEIGHTS)))
    if scales < 2:
        raise ValueError(
            f"MS-SSIM needs images of {2 * WINDOW}x{2 * WINDOW} or more, room for two scales; got {height}x{width}"
        )
    weights = np.array(MS_SSIM_WEIGHTS[:scales])
    return np.asarray(weights * (sum(MS_SSIM_WEIGHTS) / weights.sum()))


def ms_ssim(reference: np.ndarray, candidate: np.ndarray, *, peak: float) -> np.ndarray:
    """Multi-scale structural similarity of each image of two batches (n, H, W, C) -> float64 (n,), 1 for equal images.

    Wang, Simoncelli and Bovik 2003, eq. 7: the contrast-structure terms of all scales and the luminance of the
    coarsest, each to the power of its weight (see `ms_ssim_weights`), per channel, then the mean over channels. From
    scale to scale 2x2 pixels are averaged; an odd last row or column is left out. A negative term, of which there is no
    power, counts as 0. Raises `ValueError` as `ssim` does.
    """
    check_pair(reference, candidate)
    check_range(reference, candidate, peak)
    if reference.ndim != 4:
        raise ValueError(f"MS-SSIM needs images (n, H, W, C); got {reference.shape}")
    weights = ms_ssim_weights(*reference.shape[1:3])
    found = []
    for pair in zip(reference, candidate, strict=True):
        a, b = (image.astype(np.float64) for image in pair)
        product = np.ones(a.shape[-1])
        for scale, weight in enumerate(weights):
            last = scale == len(weights) - 1
            full, contrast = _similarity(a, b, peak)
            product *= np.maximum((full if last else contrast).mean(axis=(0, 1)), 0) ** weight
            a, b = _halve(a), _halve(b)
        found.append(product.mean())
    return np.array(found)


def _similarity(x: np.ndarray, y: np.ndarray, peak: float) -> tuple[np.ndarray, np.ndarray]:
    """(SSIM, its contrast-structure factor) at every place of the window: (H, W, C) -> (H - 10, W - 10, C) each."""
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x * mean_x
    variance_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance * contrast, contrast


def _blur(image: np.ndarray) -> np.ndarray:
    """Gaussian window over H and W, where it fits whole: (H, W, C) -> (H - 10, W - 10, C).

    scikit-image filters the whole image and then drops the border of half a window, which comes to the same. Plain
    sums, no matrix product: their rounding does not depend on the number of threads.
    """
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    weights = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()
    height, width = image.shape[0] - WINDOW + 1, image.shape[1] - WINDOW + 1
    rows = sum(weight * image[tap : tap + height] for tap, weight in enumerate(weights))
    return np.asarray(sum(weight * rows[:, tap : tap + width] for tap, weight in enumerate(weights)))


def _halve(image: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels: (H, W, C) -> (H // 2, W // 2, C)."""
    even = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]
    return (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 4000,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of `statistic` (called with `axis=1`); None for fewer than two values.

    Seeded, so the same values give the same interval. Efron and Tibshirani 1993, chapter 13. Values of the same seed
    and number are resampled alike. Memory does not grow with the number of values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return None
    rng = np.random.default_rng(seed)
    block = max(1, BOOTSTRAP_BYTES // (8 * sample.size))
    parts = []
    for start in range(0, resamples, block):  # the generator's stream is the same in pieces
        rows = min(block, resamples - start)
        parts.append(statistic(sample[rng.integers(sample.size, size=(rows, sample.size))], axis=1))
    drawn = np.concatenate(parts)
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
