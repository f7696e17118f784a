"""Scales, zero points and ranges."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_deploy.quantize import scheme
from ldm_deploy.quantize.observe import BINS
from ldm_deploy.quantize.scheme import (
    HEADROOM,
    RANGE_METHODS,
    activation_scale,
    channel_scales,
    choose_range,
    quantize_bias,
    quantize_weight,
)


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (-0.278, 12), (0.5, 2), (-4, -1), (0, 1e-6)])
def test_range_is_covered_and_zero_is_exact(low: float, high: float) -> None:
    scale, zero_point = activation_scale(low, high)
    grid = (np.arange(256) - int(zero_point)) * np.float64(scale)
    assert 0.0 in grid
    assert grid[0] <= low + scale / 2
    assert grid[-1] >= high - scale / 2
    assert zero_point.dtype == np.uint8


def test_empty_range_has_a_usable_scale() -> None:
    assert activation_scale(0, 0)[0] == 1


def test_weights_are_within_half_a_step_of_their_own_channel() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 5, 3, 3)) * np.geomspace(1e-3, 1e3, 6)[:, None, None, None]
    weight[2] = 0
    for axis in (0, 1):
        quantized, scale = quantize_weight(weight, axis)
        shape = [-1 if index == axis else 1 for index in range(4)]
        error = np.abs(quantized * scale.reshape(shape).astype(np.float64) - weight)
        assert (error <= scale.reshape(shape) * 0.5001).all()
        assert quantized.min() >= -127
    assert np.abs(quantize_weight(weight, 0, reduce_range=True)[0]).max() == 64


def test_bias_is_on_the_accumulators_scale_and_saturates() -> None:
    quantized, scale = quantize_bias(np.array([1.0, -2.0, 5.0]), np.array(0.5), np.array([0.01, 0.02, 1e-30]))
    np.testing.assert_allclose(scale[:2], [0.005, 0.01], rtol=1e-6)
    np.testing.assert_array_equal(quantized, [200, -200, np.iinfo(np.int32).max])


def histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.histogram(values, BINS)


def test_methods_on_a_tensor_with_one_outlier() -> None:
    values = np.random.default_rng(0).standard_normal(100_000)
    values[0] = 12
    ranges = {method: choose_range(*histogram(values), method) for method in RANGE_METHODS}
    assert ranges["minmax"][1] == 12
    assert 3 < ranges["percentile-99.99"][1] < 6
    assert 3 < ranges["mse"][1] < 11

    def error(low: float, high: float) -> float:
        scale, zero_point = activation_scale(low, high)
        codes = np.clip(np.round(values / scale) + zero_point, 0, 255)
        return float(np.mean(((codes - zero_point) * scale - values) ** 2))

    errors = {method: error(*ranges[method]) for method in RANGE_METHODS}
    assert min(errors, key=lambda method: errors[method]) == "mse"
    assert errors["mse"] < 0.9 * errors["minmax"]


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_constant_tensors_and_unused_histograms_are_left_alone(method: str) -> None:
    edges = np.linspace(0, 1, 9)
    assert choose_range(np.zeros(8, np.int64), edges, method) == (0, 1)


def test_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="'cosine' is unknown; allowed: minmax, mse"):
        choose_range(np.ones(8, np.int64), np.linspace(0, 1, 9), "cosine")


def reference_divergence(counts: np.ndarray, kept: int) -> float:
    """Migacz's algorithm for a one-sided histogram, bin by bin: `kept` bins, `kept` a multiple of 256."""
    true = counts[:kept].astype(float)
    true[-1] += counts[kept:].sum()
    rounded = np.zeros(kept)
    width = kept // 256
    for level in range(256):
        bins = range(level * width, (level + 1) * width)
        filled = [index for index in bins if counts[index] > 0]
        for index in filled:
            rounded[index] = sum(counts[other] for other in bins) / len(filled)
    true, rounded = true / true.sum(), rounded / rounded.sum()
    return sum(p * np.log(p / max(q, 1e-12)) for p, q in zip(true, rounded, strict=True) if p > 0)


def test_entropy_is_the_divergence_of_migacz() -> None:
    values = np.abs(np.random.default_rng(1).standard_normal(200_000)) ** 1.5
    counts, edges = np.histogram(values, BINS, range=(0.0, float(values.max())))
    centers = (edges[:-1] + edges[1:]) / 2
    for kept in (512, 1024, 2048):
        found = scheme._divergence(counts, centers, 0.0, float(edges[kept]))
        assert found == pytest.approx(reference_divergence(counts, kept), rel=1e-6)
    low, high = choose_range(counts, edges, "entropy")
    costs = {kept: reference_divergence(counts, kept) for kept in range(512, 2049, 256)}
    best = min(costs, key=lambda kept: costs[kept])
    assert low == 0.0
    assert edges[best - 256] <= high <= edges[min(best + 256, BINS)]


def test_channels_of_different_size_get_scales_of_their_own() -> None:
    low, high = -np.geomspace(0.1, 10, 16), np.geomspace(0.1, 10, 16)
    found = channel_scales(low, high, (-10.0, 10.0))
    assert found is not None
    scale, zero_point = found
    np.testing.assert_allclose(scale, HEADROOM * (high - low) / 255, rtol=1e-6)
    assert (np.abs(zero_point.astype(int) - 128) <= 1).all()
    assert channel_scales(low, high, (-4.0, 4.0)) is None
    assert channel_scales(np.full(16, -1.0), np.full(16, 1.0), (-1.0, 1.0)) is None
