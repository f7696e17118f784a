from __future__ import annotations

import math

import numpy as np
import pytest

from ldm_deploy.eval.metrics import bootstrap_ci, psnr_db, psnr_db_each, ratio_ci, ssim


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


def test_a_swapped_channel_is_seen_by_both() -> None:
    reference = np.kron(images(4, 8), np.ones((1, 4, 4, 1), np.uint8))
    swapped = np.ascontiguousarray(reference[..., ::-1])
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
