"""Scales, zero points and ranges."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_deploy.quantize.observe import BINS
from ldm_deploy.quantize.scheme import (
    RANGE_METHODS,
    activation_scale,
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
    with pytest.raises(ValueError, match="'entropy' is unknown; allowed: minmax, mse"):
        choose_range(np.ones(8, np.int64), np.linspace(0, 1, 9), "entropy")
