"""Statistics of latents against numpy, scipy and cases done by hand; planted faults are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ldm_deploy.eval.analysis.latent_space import (
    analyze_latents,
    channel_correlation,
    channel_statistics,
    findings,
    histograms,
    interpolate,
    tsne_map,
)


def gaussian(count: int = 200, channels: int = 3, side: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, channels, side, side)).astype(np.float32)


def test_moments_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    latents = gaussian() * np.array([0.5, 1, 3])[None, :, None, None] + np.array([0, -2, 1])[None, :, None, None]
    latents[:, 2] = latents[:, 2] ** 3  # heavy tails
    for channel, row in enumerate(channel_statistics(latents)["channels"]):
        values = latents[:, channel].ravel()
        assert row["mean"] == pytest.approx(values.mean())
        assert row["std"] == pytest.approx(values.std())
        assert row["kurtosis"] == pytest.approx(stats.kurtosis(values))


def test_kurtosis_by_hand() -> None:
    latents = np.where(np.arange(8).reshape(2, 1, 2, 2) % 2, 1.0, -1.0)  # a coin: E x⁴ / (E x²)² - 3 = -2
    (row,) = channel_statistics(latents)["channels"]
    assert (row["mean"], row["std"], row["kurtosis"]) == (0, 1, -2)


def test_active_units_are_counted_per_position() -> None:
    latents = gaussian()
    latents[:, 0] *= 0.05  # variance 0.0025: below 0.01
    latents[:, 1, 0] = 7.0  # one row of four positions is constant
    found = channel_statistics(latents)
    assert [row["active_share"] for row in found["channels"]] == [0, 0.75, 1]
    assert (found["active_units"], found["units"]) == (28, 48)


@pytest.mark.parametrize(("variance", "active"), [(0.0099, 0), (0.0101, 4)])
def test_the_threshold_is_burdas(variance: float, active: int) -> None:
    latents = np.sqrt(variance) * np.array([1.0, -1.0])[:, None, None, None] * np.ones((1, 1, 2, 2))
    assert channel_statistics(latents)["active_units"] == active


def test_a_unit_that_only_differs_between_positions_is_not_active() -> None:
    latents = np.broadcast_to(np.arange(4.0).reshape(1, 1, 2, 2), (5, 1, 2, 2))
    found = channel_statistics(latents)
    assert found["active_units"] == 0
    assert found["channels"][0]["std"] > 1


def test_correlation_is_numpys() -> None:
    latents = gaussian()
    latents[:, 2] = 0.6 * latents[:, 0] - 0.8 * latents[:, 1]
    expected = np.corrcoef(latents.transpose(1, 0, 2, 3).reshape(3, -1))
    np.testing.assert_allclose(np.array(channel_correlation(latents), float), expected, atol=1e-6)


def test_a_constant_channel_has_no_correlation_and_no_kurtosis() -> None:
    latents = gaussian()
    latents[:, 1] = 0.3
    matrix = channel_correlation(latents)
    assert matrix[1] == [None, None, None]
    assert matrix[0][1] is None
    assert matrix[0][0] == pytest.approx(1)
    assert channel_statistics(latents)["channels"][1]["kurtosis"] is None


def test_planted_faults_are_found() -> None:
    latents = gaussian(channels=4)
    latents[:, 1] = 0.001 * latents[:, 1]
    latents[:, 3] = -latents[:, 0] + 0.2 * latents[:, 2]
    found = findings(channel_statistics(latents), channel_correlation(latents), {"unevenness": 4.0})
    assert found[0].startswith("Channel 1 is dead")
    assert found[1].startswith("Channels 0 and 3 are correlated (-0.98")
    assert found[2].startswith("Interpolations jump: the largest step is 4.0 times")
    assert len(found) == 3


def test_nothing_wrong_is_nothing_found() -> None:
    latents = gaussian()
    assert findings(channel_statistics(latents), channel_correlation(latents), {"unevenness": 1.2}) == []


def test_histograms_are_densities() -> None:
    found = histograms(gaussian())
    edges = np.array(found["edges"])
    for row in found["density"]:
        assert (np.array(row) * np.diff(edges)).sum() == pytest.approx(0.998, abs=0.002)
    assert histograms(np.zeros((2, 1, 2, 2)))["density"][0][0] > 0


def linear(latents: np.ndarray) -> np.ndarray:
    return np.repeat(latents.transpose(0, 2, 3, 1), 3, axis=-1).astype(np.uint8)


def test_a_linear_decoder_walks_straight() -> None:
    starts, ends = np.zeros((2, 1, 2, 2), np.float32), np.full((2, 1, 2, 2), 80, np.float32)
    found, images = interpolate(linear, starts, ends, steps=4)
    assert images.shape == (2, 5, 2, 2, 3)
    assert images[0, :, 0, 0, 0].tolist() == [0, 20, 40, 60, 80]
    assert found["pairs"][0] == {"steps": [20, 20, 20, 20], "unevenness": 1, "detour": 1}


def test_a_jump_is_uneven_and_a_detour_is_long() -> None:
    starts, ends = np.zeros((1, 1, 2, 2), np.float32), np.full((1, 1, 2, 2), 80, np.float32)
    jump, _ = interpolate(lambda latents: linear(np.where(latents > 50, 80, 0)), starts, ends, steps=4)
    assert jump["unevenness"] == 4
    assert jump["detour"] == 1
    bend, _ = interpolate(lambda latents: linear(200 - np.abs(latents - 60)), starts, ends, steps=4)
    assert bend["detour"] == pytest.approx(80 / 40)  # 140 -> 200 -> 180


def test_equal_ends_have_no_detour() -> None:
    same = np.ones((1, 1, 2, 2), np.float32)
    found, _ = interpolate(linear, same, same)
    assert (found["detour"], found["unevenness"]) == (None, None)


def test_the_map_keeps_planted_clusters_apart() -> None:
    pytest.importorskip("sklearn")
    latents = gaussian(40, 2, 3)
    latents[20:] += 6
    first, again = tsne_map(latents, seed=3), tsne_map(latents, seed=3)
    assert first == again
    points = np.array(first["points"])
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(40)
    assert ((distance.argmin(1) < 20) == (np.arange(40) < 20)).all()


@pytest.mark.parametrize(
    ("latents", "reason"), [(gaussian(4), "4 images are too few"), (np.ones((9, 1, 2, 2)), "all latents are equal")]
)
def test_no_map_has_a_reason(latents: np.ndarray, reason: str) -> None:
    found = tsne_map(latents)
    assert found["points"] is None
    assert reason in found["reason"]


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((1, 2, 3, 3)), "n of 2 or more; got (1, 2, 3, 3)"),
        (np.zeros((4, 3)), "must be (n, z, h, w)"),
        (np.full((2, 1, 2, 2), np.nan), "NaN or infinity"),
    ],
)
def test_bad_latents_are_refused(latents: np.ndarray, message: str) -> None:
    for function in (channel_statistics, channel_correlation, tsne_map):
        with pytest.raises(ValueError, match=r"latents") as error:
            function(latents)
        assert message in str(error.value)


def test_the_whole_is_plain_data() -> None:
    import json

    latents = gaussian(12, 1, 2)
    labels = ["a", "b"] * 6
    result: dict[str, Any]
    result, strips = analyze_latents(100 + latents, linear, labels, pairs=2)
    assert strips.shape == (2, 9, 2, 2, 3)
    assert result["map"]["labels"] == labels
    json.dumps(result, allow_nan=False)
