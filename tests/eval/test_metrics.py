from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ldm_deploy.eval import metrics
from ldm_deploy.eval.metrics import (
    MS_SSIM_WEIGHTS,
    bootstrap_ci,
    ms_ssim,
    ms_ssim_weights,
    mse_each,
    psnr_db,
    psnr_db_each,
    psnr_db_of,
    ratio_ci,
    ssim,
)


def images(count: int = 3, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_psnr_is_the_formula_and_needs_its_peak() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr_db(black, black + 1, peak=255) == pytest.approx(20 * math.log10(255))
    assert psnr_db(black, black + 1, peak=1) == pytest.approx(0)
    assert psnr_db(black, black, peak=255) == math.inf
    with pytest.raises(TypeError, match="peak"):
        psnr_db(black, black)  # type: ignore[call-arg]


def test_differences_of_uint8_do_not_wrap_around() -> None:
    dark, light = np.full((2, 2), 1, np.uint8), np.full((2, 2), 3, np.uint8)
    assert psnr_db(dark, light, peak=255) == psnr_db(light, dark, peak=255) == pytest.approx(20 * math.log10(255 / 2))


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (np.zeros((4, 5, 3), np.uint8), r"shapes differ: reference \(4, 4, 3\), candidate \(4, 5, 3\)"),
        (np.zeros((4, 4, 1), np.uint8), "never resized"),
        (np.zeros((4, 4, 3), np.float32), "dtypes differ: reference uint8, candidate float32"),
    ],
)
def test_psnr_refuses_what_does_not_compare(candidate: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        psnr_db(np.zeros((4, 4, 3), np.uint8), candidate, peak=255)


def test_psnr_refuses_nan_and_a_bad_peak() -> None:
    good, bad = np.zeros((2, 2), np.float32), np.full((2, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="the candidate holds NaN or infinity"):
        psnr_db(good, bad, peak=1)
    with pytest.raises(ValueError, match="peak is 0"):
        psnr_db(good, good, peak=0)


@pytest.mark.parametrize("metric", [psnr_db, lambda a, b, peak: ssim(a[None], b[None], peak=peak)])
def test_an_image_in_another_range_is_refused(metric: Any) -> None:
    """One in [0, 1], the other in [0, 255], and the peak of the first: a figure, but no meaningful one."""
    unit = np.random.default_rng(0).random((16, 16, 3))
    with pytest.raises(ValueError, match=r"the candidate ranges from .* to .*, more than the peak 1; bring both"):
        metric(unit, 255 * unit, peak=1)


def test_psnr_of_the_mean_is_that_of_all_images_as_one_and_no_mean_of_psnrs() -> None:
    reference = images(2)
    candidate = reference.copy()
    candidate[0] ^= 1
    candidate[1] ^= 31
    pooled = float(psnr_db_of(mse_each(reference, candidate).mean(), peak=255))
    assert pooled == pytest.approx(psnr_db(reference, candidate, peak=255))
    assert pooled < psnr_db_each(reference, candidate, peak=255).mean() - 5
    assert psnr_db_of(0.0, peak=255) == 100


def test_identical_images_count_as_100_db_and_no_different_pair_reaches_that() -> None:
    reference = images(2, 64)
    candidate = reference.copy()
    candidate[1, 0, 0, 0] ^= 1
    first, second = psnr_db_each(reference, candidate, peak=255)
    assert first == 100
    assert second == pytest.approx(89.03, abs=0.01)


@pytest.mark.parametrize("shape", [(3, 32, 32, 3), (2, 11, 40, 3), (1, 64, 48, 1)])
def test_ssim_is_scikit_images(shape: tuple[int, ...]) -> None:
    from skimage.metrics import structural_similarity

    rng = np.random.default_rng(1)
    reference = rng.integers(0, 256, shape, dtype=np.uint8)
    candidate = np.clip(reference.astype(int) + rng.integers(-40, 40, shape), 0, 255).astype(np.uint8)
    theirs = [
        structural_similarity(
            one, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=255
        )
        for one, other in zip(reference, candidate, strict=True)
    ]
    np.testing.assert_allclose(ssim(reference, candidate, peak=255), theirs, atol=1e-6)


def test_ssim_of_equal_images_is_one_and_small_images_are_refused() -> None:
    np.testing.assert_allclose(ssim(images(), images(), peak=255), 1)
    with pytest.raises(ValueError, match="11x11 or more"):
        ssim(images(size=10), images(size=10), peak=255)


def waves(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two images made by formulas, the second with ripples on it."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 120 * np.sin(x / 9) * np.cos(y / 13), 255 * x / width, 127 + 100 * np.sin((x + y) / 5)]
    one = np.stack(planes, axis=-1)
    other = one + 40 * np.sin(x * y / 50)[..., None]
    first, second = (np.clip(image, 0, 255).astype(np.uint8)[None] for image in (one, other))
    return first, second


@pytest.mark.parametrize(
    ("height", "width", "published"), [(176, 176, 0.8811577583164713), (192, 256, 0.8866611215226335)]
)
def test_ms_ssim_is_that_of_a_published_package(height: int, width: int, published: float) -> None:
    """Values of pytorch-msssim 1.0.0 in double precision, its Gaussian window in double too."""
    assert ms_ssim(*waves(height, width), peak=255)[0] == pytest.approx(published, abs=1e-12)


def scipy_ms_ssim(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> float:
    """Equation 7 of the paper with scipy: (H, W) each, even at every scale, peak 255."""
    from scipy.ndimage import gaussian_filter

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

    result = 1.0
    for scale, weight in enumerate(weights):
        mean1, mean2 = blur(one), blur(other)
        spread1, spread2 = blur(one**2) - mean1**2, blur(other**2) - mean2**2
        common = blur(one * other) - mean1 * mean2
        term = (2 * common + 58.5225) / (spread1 + spread2 + 58.5225)
        if scale == len(weights) - 1:
            term = term * (2 * mean1 * mean2 + 6.5025) / (mean1**2 + mean2**2 + 6.5025)
        result *= term.mean() ** weight
        shape = (one.shape[0] // 2, 2, one.shape[1] // 2, 2)
        one, other = one.reshape(shape).mean(axis=(1, 3)), other.reshape(shape).mean(axis=(1, 3))
    return float(result)


def test_ms_ssim_of_small_images_has_fewer_scales_whose_weights_are_brought_to_the_same_sum() -> None:
    weights = ms_ssim_weights(64, 64)
    assert weights == pytest.approx(np.array([0.0448, 0.2856, 0.3001]) * 1.0001 / 0.6305)
    assert [len(ms_ssim_weights(side, 512)) for side in (22, 44, 88, 176, 512)] == [2, 3, 4, 5, 5]
    assert ms_ssim_weights(512, 176) == pytest.approx(MS_SSIM_WEIGHTS)
    one, other = waves(64, 64)
    channels = [scipy_ms_ssim(one[0, ..., c] * 1.0, other[0, ..., c] * 1.0, weights) for c in range(3)]
    assert ms_ssim(one, other, peak=255)[0] == pytest.approx(np.mean(channels), abs=1e-12)


def test_ms_ssim_has_its_extremes_and_its_limits() -> None:
    np.testing.assert_allclose(ms_ssim(images(2, 64), images(2, 64), peak=255), 1)
    pattern = np.kron(images(2, 8), np.ones((1, 8, 8, 1), np.uint8))
    np.testing.assert_allclose(ms_ssim(pattern, 255 - pattern, peak=255), 0)  # a negative term has no power
    assert ms_ssim(images(1, 63), images(1, 63, 1), peak=255).shape == (1,)  # an odd last row is left out
    with pytest.raises(ValueError, match="22x22 or more, room for two scales; got 21x40"):
        ms_ssim(np.zeros((1, 21, 40, 3), np.uint8), np.zeros((1, 21, 40, 3), np.uint8), peak=255)


def test_a_swapped_channel_is_seen_by_all_three() -> None:
    reference = np.kron(images(4, 8), np.ones((1, 4, 4, 1), np.uint8))
    swapped = np.ascontiguousarray(reference[..., ::-1])
    assert ms_ssim(reference, swapped, peak=255).max() < 0.9
    assert psnr_db_each(reference, swapped, peak=255).max() < 20
    assert ssim(reference, swapped, peak=255).max() < 0.9


def test_bootstrap_is_seeded_holds_the_mean_and_is_none_for_one_value() -> None:
    values = np.random.default_rng(0).normal(10, 2, 200)
    interval = bootstrap_ci(values)
    assert interval is not None
    assert interval == bootstrap_ci(values)
    assert interval[0] < values.mean() < interval[1]
    # The standard error of the mean gives the width: 2 * 1.96 * 2 / sqrt(200)
    assert interval[1] - interval[0] == pytest.approx(3.92 * values.std() / 200**0.5, rel=0.1)
    assert bootstrap_ci([1.0]) is None


def test_resamples_in_pieces_are_those_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50)
    rng = np.random.default_rng(7)
    whole = np.percentile(values[rng.integers(50, size=(4000, 50))].mean(axis=1), [2.5, 97.5])
    monkeypatch.setattr(metrics, "BOOTSTRAP_BYTES", 8 * 50 * 7)
    assert bootstrap_ci(values, seed=7) == tuple(whole)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_ci(rng.normal(5, 1, 40), resamples=500) or (0, 0)
        hits += low <= 5 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_ratio_is_paired_so_that_common_slowness_cancels() -> None:
    rng = np.random.default_rng(0)
    load = rng.uniform(1, 5, 30)  # a machine that is up to five times slower, for both alike
    ratio = ratio_ci(20 * load, 10 * load * rng.normal(1, 0.01, 30))
    assert ratio["median"] == pytest.approx(2, rel=0.02)
    assert ratio["ci95_low"] is not None
    assert ratio["ci95_high"] is not None
    assert 1.95 < ratio["ci95_low"] <= ratio["median"] <= ratio["ci95_high"] < 2.05


def test_ratio_refuses_unpaired_samples_and_has_no_interval_for_one() -> None:
    with pytest.raises(ValueError, match="paired samples"):
        ratio_ci([1.0, 2.0], [1.0])
    assert ratio_ci([4.0], [2.0]) == {"median": 2.0, "ci95_low": None, "ci95_high": None}
