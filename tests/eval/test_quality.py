"""What a report says about images: planted faults, and the figure that shows each."""

from __future__ import annotations

from typing import Any

import jsonschema
import numpy as np
import pytest

from ldm_deploy.eval.budget import QUALITY, Limits, check_limits
from ldm_deploy.eval.choose import quality_figures
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.metrics import bootstrap_ci, psnr_db
from ldm_deploy.eval.quality import (
    METRICS,
    SETS,
    compare_images,
    describe_figure,
    flat_each,
    measure_pairs,
    nothing_measured,
)
from ldm_deploy.eval.report import schema
from tests.eval.factories import absent_lpips

PAIRS = [("red apple", seed) for seed in range(6)]


@pytest.fixture(scope="module")
def squeeze() -> Lpips:
    return Lpips("squeeze")


@pytest.fixture
def lpips() -> Lpips:
    return absent_lpips()


@pytest.fixture
def reference() -> np.ndarray:
    """Smooth reddish pictures with room above and below their values."""
    y, x = np.mgrid[0:64, 0:64] / 64
    rng = np.random.default_rng(0)
    planes = [
        170 - 35 * (plane % 3) + 70 * np.sin(rng.uniform(3, 12) * x + rng.uniform(3, 12) * y + rng.uniform(0, 6))
        for plane in range(18)
    ]
    return np.round(planes).astype(np.uint8).reshape(6, 3, 64, 64).transpose(0, 2, 3, 1)


def judge(quality: dict[str, Any], **limits: float) -> dict[str, Any]:
    gates = check_limits(Limits(limits, ()), quality_figures(quality))
    return {gate.name: (gate.result, gate.reason) for gate in gates}


def test_the_figures_are_valid_and_those_of_the_metrics(reference: np.ndarray, squeeze: Lpips) -> None:
    noise = np.random.default_rng(1).integers(-9, 10, reference.shape)
    candidate = np.clip(reference + noise, 0, 255).astype(np.uint8)
    quality, images = compare_images(reference, candidate, PAIRS, squeeze)
    _valid("quality", quality)
    for image in images:
        _valid("image", image)
    assert set(quality) == {*METRICS, "colour_shift", *SETS}
    assert [(image["prompt"], image["seed"]) for image in images] == PAIRS
    for name in METRICS:
        if quality[name]["reason"] is None:
            values = [image[name] for image in images]
            assert quality[name]["mean"] == pytest.approx(np.mean(values))
            assert quality[name]["ci95"] == list(bootstrap_ci(values) or ())
            worst = images[quality[name]["worst_image"]["seed"]]
            assert quality[name]["worst"] == worst[name]
            assert worst[name] in (min(values), max(values))
    assert quality["psnr_db"]["pooled"]["value"] == pytest.approx(psnr_db(reference, candidate, peak=255))
    assert quality["psnr_db"]["pooled"]["ci95"][0] < quality["psnr_db"]["pooled"]["value"]
    assert quality["ms_ssim"]["scales"] == 3
    if squeeze.available:
        for name in SETS:
            assert quality[name]["value"] > 0
            assert "LPIPS backbone squeeze" in quality[name]["features"]
            assert quality[name]["weights_sha256"] == squeeze.weights_sha256


def _valid(definition: str, value: Any) -> None:
    rules = schema()
    jsonschema.Draft202012Validator({"$defs": rules["$defs"], "$ref": f"#/$defs/{definition}"}).validate(value)


def test_half_a_grey_level_is_caught_by_the_shift_and_by_nothing_else(lpips: Lpips) -> None:
    rng = np.random.default_rng(0)
    exact = rng.uniform(20, 230, (6, 64, 64, 3))
    reference = np.round(exact).astype(np.uint8)
    candidate = np.round(exact - (0, 0.5, 0)).astype(np.uint8)
    quality, _ = compare_images(reference, candidate, PAIRS, lpips)
    found = judge(quality, psnr_db_min=40, ssim_min=0.99, ms_ssim_min=0.99, delta_e2000_max=1, colour_shift_max=0.4)
    assert {name for name, (result, _) in found.items() if result == "fail"} == {"colour_shift_max"}
    assert quality["colour_shift"]["mean"] == pytest.approx([0, -0.5, 0], abs=0.02)
    low, high = quality["colour_shift"]["ci95"][1]
    assert low < quality["colour_shift"]["mean"][1] < high < -0.4


def test_one_broken_image_shows_at_the_worst_and_hides_in_the_mean(reference: np.ndarray, lpips: Lpips) -> None:
    candidate = reference.copy()
    candidate[:] ^= 1
    candidate[4] = np.roll(reference[4], 31, axis=0)
    quality, _ = compare_images(reference, candidate, PAIRS, lpips)
    found = judge(quality, worst_psnr_db_min=30.0)
    assert found["worst_psnr_db_min"][0] == "fail"
    assert quality["psnr_db"]["worst_image"] == {"prompt": "red apple", "seed": 4}
    assert quality["psnr_db"]["mean"] > 40


def test_a_spot_is_named_by_its_tile(reference: np.ndarray, lpips: Lpips) -> None:
    candidate = reference.copy()
    candidate[2, 50:54, 18:22] = 255 - candidate[2, 50:54, 18:22]
    quality, images = compare_images(reference, candidate, PAIRS, lpips)
    assert quality["tile_psnr_db"]["worst_image"]["seed"] == 2
    assert quality["tile_psnr_db"]["worst_tile"] == {"top": 48, "left": 16}
    assert images[2]["tile_at"] == [48, 16]
    assert images[2]["tile_psnr_db"] == pytest.approx(images[2]["psnr_db"] - 10 * np.log10(16))  # one of 16 tiles


def test_swapped_channels_fail_every_limit(reference: np.ndarray, lpips: Lpips) -> None:
    candidate = np.ascontiguousarray(reference[..., ::-1])
    quality, _ = compare_images(reference, candidate, PAIRS, lpips)
    limits = dict(zip(QUALITY, (31.0, 18.0, 0.96, 0.97, 0.02, 2.5, 1.0), strict=True))
    assert judge(quality, lpips_max=limits.pop("lpips_max")) == {"lpips_max": ("not measured", "no weights")}
    assert {result for result, _ in judge(quality, **limits).values()} == {"fail"}


def test_intervals_are_paired_so_that_hard_images_do_not_widen_them(lpips: Lpips) -> None:
    """Every image the same shift, however different the images are: the interval of the shift has no width."""
    rng = np.random.default_rng(0)
    reference = np.concatenate([rng.integers(0, 250, (3, 24, 24, 3)), np.full((3, 24, 24, 3), 9)]).astype(np.uint8)
    quality, _ = compare_images(reference, reference + np.uint8(2), PAIRS, lpips)
    assert quality["colour_shift"]["ci95"] == [[2, 2]] * 3
    assert quality["psnr_db"]["ci95"][0] == pytest.approx(quality["psnr_db"]["ci95"][1])


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (np.zeros((6, 64, 65, 3), np.uint8), "shapes differ"),
        (np.zeros((6, 64, 64, 3), np.float32), "dtypes differ"),
    ],
)
def test_what_does_not_compare_is_a_reason_and_no_figure(
    reference: np.ndarray, lpips: Lpips, candidate: np.ndarray, message: str
) -> None:
    quality, images = compare_images(reference, candidate, PAIRS, lpips)
    _valid("quality", quality)
    for name, figure in quality.items():
        assert ("no weights" if name in ("lpips", *SETS) else message) in figure["reason"]
    assert images[0] == {"prompt": "red apple", "seed": 0}
    assert {
        result for result, _ in judge(quality, psnr_db_min=1, colour_shift_max=1, worst_psnr_db_min=1).values()
    } == {"not measured"}


def test_images_too_small_for_a_window_leave_the_other_figures(reference: np.ndarray, lpips: Lpips) -> None:
    quality, _ = compare_images(reference[:, :16, :16], reference[:, 16:32, :16], PAIRS, lpips)
    assert quality["ms_ssim"]["reason"] is not None
    assert "room for two scales; got 16x16" in quality["ms_ssim"]["reason"]
    assert quality["ssim"]["reason"] is None


def test_without_lpips_the_sets_have_its_reason(reference: np.ndarray, lpips: Lpips) -> None:
    quality, _ = compare_images(reference, reference, PAIRS, lpips)
    _valid("quality", quality)
    assert {quality[name]["reason"] for name in ("lpips", *SETS)} == {"no weights"}
    assert "it was not asked for" in measure_pairs(reference, reference, None)[1]["lpips"]
    for nothing in (nothing_measured("none drawn", lpips), nothing_measured("none drawn", None)):
        _valid("quality", nothing)
        assert {figure["reason"] for figure in nothing.values()} == {"none drawn"}
        assert set(nothing) == set(quality)


def test_pairs_measured_in_parts_are_the_same_bits(reference: np.ndarray) -> None:
    candidate = reference ^ 3
    whole, _ = measure_pairs(reference, candidate, None)
    parts = [measure_pairs(reference[cut], candidate[cut], None)[0] for cut in (slice(0, 1), slice(1, 4), slice(4, 6))]
    for name, values in whole.items():
        np.testing.assert_array_equal(values, np.concatenate([part[name] for part in parts]))


def test_figures_in_words() -> None:
    figure = {"mean": 31.25, "worst": 20.5, "worst_image": {"prompt": "sun", "seed": 1}, "ci95": [30.0, 32.0], "n": 4}
    assert describe_figure({**figure, "reason": None}) == "mean 31.25 (95 % 30 to 32), worst 20.5 (sun, 1), n = 4"
    shift = {"mean": [1.0, 2.0, -3.0], "worst": [2.0, 2.0, 2.0], "worst_image": {"file": "a.png"}, "n": 1}
    assert describe_figure({**shift, "ci95": None, "reason": None}) == "mean 1 / 2 / -3, worst 2 / 2 / 2 (a.png), n = 1"
    assert describe_figure({"value": 0.5, "ci95": [0.4, 0.6], "n": 9, "reason": None}) == "0.5 (95 % 0.4 to 0.6), n = 9"
    assert describe_figure({"value": None, "reason": "no weights"}) == "not measured: no weights"


@pytest.mark.parametrize(
    ("mean", "intervals", "result"),
    [
        ([0.1, -0.2, 0.0], [[0, 0.2], [-0.3, -0.1], [-0.1, 0.1]], "pass"),
        ([0.1, -2.0, 0.0], [[0, 0.2], [-2.5, -1.5], [-0.1, 0.1]], "fail"),
        ([0.1, -1.0, 0.0], [[0, 0.2], [-1.5, -0.5], [-0.1, 0.1]], "not measured"),
        ([0.1, 0.0, 0.0], [[0, 0.2], [-0.5, 0.5], [-3.0, 3.0]], "not measured"),
    ],
)
def test_a_limit_on_the_shift_holds_for_every_channel_in_either_direction(
    mean: list[float], intervals: list[list[float]], result: str
) -> None:
    entry = {"mean": mean, "ci95": intervals, "worst": mean, "n": 9, "reason": None}
    assert judge({"colour_shift": entry}, colour_shift_max=1.0)["colour_shift_max"][0] == result


def test_a_flat_image_is_one_colour() -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[1] = [1, 2, 3]
    images[2, 7, 7, 2] = 1
    assert flat_each(images).tolist() == [True, True, False]
