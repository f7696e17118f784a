"""What is quantized and how: the recipe, and the arithmetic of scales and zero points.

Affine quantization as ONNX's QuantizeLinear defines it: q = saturate(round(x / scale) + zero_point)
(Jacob et al. 2018, arXiv:1712.05877, section 2.1). Activations unsigned and asymmetric, weights signed and symmetric
per output channel: the pair that ONNX Runtime's CPU kernels run natively.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RANGE_METHODS = ("minmax", "mse", "percentile-99.999", "percentile-99.99", "entropy")
LEVELS = 256
# Of scales per channel, see `channel_scales`.
HEADROOM = 1.5
LEAST_GAIN = 3.0


@dataclass(frozen=True)
class Recipe:
    """Which nodes of a graph become INT8. The defaults are for ONNX Runtime on a CPU; see `onnxruntime_cpu.py`."""

    op_types: tuple[str, ...] = ("Conv", "MatMul")
    min_channels: int = 8  # a convolution with fewer in- or output channels (the first, the last) stays float
    quantize_outputs: tuple[str, ...] = ("Conv",)  # ops whose INT8 kernel can only write INT8
    by_channel: bool = False  # outputs of convolutions with a scale per channel, where `channel_scales` has them
    range_method: str = "minmax"  # one of RANGE_METHODS
    keep_float: tuple[str, ...] = ()  # names of nodes that are not quantized
    reduce_range: bool = False  # 7-bit weights: without VNNI the 8-bit products saturate in 16-bit sums

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class OpenVinoRecipe:
    """Which layers of an OpenVINO graph become INT8, and what all others compute in; see `openvino_cpu.py`."""

    op_types: tuple[str, ...] = ("Convolution", "MatMul", "attention")  # kinds of `openvino_graph.Layer`
    min_channels: int = 8  # a layer with fewer in- or output channels (the first, the last convolution) stays float
    smooth_quant_alpha: float | None = (
        None  # SmoothQuant of the MatMuls (Xiao et al. 2022, arXiv:2211.10438); None: off
    )
    symmetric: bool = False  # activations without zero point: coarser where they are one-sided, faster on some CPUs
    rest: str = "fp32"  # or "bf16"
    keep_float: tuple[str, ...] = ()  # names of layers that are not quantized
    reduce_range: bool = False  # 7-bit weights, as in `Recipe`

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


AnyRecipe = Recipe | OpenVinoRecipe


def activation_scale(low: float | np.ndarray, high: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (uint8), of the shape of `low`, that cover [low, high] and hold 0 exactly."""
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    scale = np.where(high > low, (high - low) / (LEVELS - 1), 1.0).astype(np.float32)
    zero_point = np.clip(np.round(-low / scale.astype(np.float64)), 0, LEVELS - 1)
    return scale, zero_point.astype(np.uint8)


def channel_scales(
    low: np.ndarray, high: np.ndarray, whole: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scales and zero points (C,) for the channels of an activation, or None where they are not worth it.

    `low`, `high`: (C,), what each channel was seen to hold; `whole`: the interval that one scale for all would cover.
    A channel's extremes are exceeded by the next caption far sooner than a tensor's: `HEADROOM` times as much is
    covered. The noise of rounding, step² / 12 (Widrow 1956), must then be `LEAST_GAIN` times less, on the mean.
    """
    scale, zero_point = activation_scale(HEADROOM * low, HEADROOM * high)
    single, _ = activation_scale(*whole)
    gain = float(single) ** 2 / float(np.mean(np.square(scale, dtype=np.float64)))
    return (scale, zero_point) if gain >= LEAST_GAIN else None


def quantize_weight(weight: np.ndarray, axis: int, *, reduce_range: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights and one float32 scale per channel of `axis`, symmetric: w is about q · scale.

    Channels of zeros get scale 1. `reduce_range` uses [-64, 64] instead of [-127, 127].
    """
    limit = 64 if reduce_range else 127
    others = tuple(index for index in range(weight.ndim) if index != axis)
    largest = np.abs(weight).max(axis=others).astype(np.float64)
    scale = np.where(largest > 0, largest / limit, 1.0).astype(np.float32)
    shape = [-1 if index == axis else 1 for index in range(weight.ndim)]
    quantized = np.clip(np.round(weight / scale.reshape(shape)), -limit, limit).astype(np.int8)
    return quantized, scale


def quantize_bias(bias: np.ndarray, input_scale: np.ndarray, weight_scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 bias on the accumulator's own scale, input_scale · weight_scale (Jacob et al. 2018, eq. 11)."""
    scale = (np.float64(input_scale) * weight_scale.astype(np.float64)).astype(np.float32)
    limits = np.iinfo(np.int32)
    # A dead channel (tiny scale) would overflow: saturate, as the kernel would.
    quantized = np.clip(np.round(bias.astype(np.float64) / np.maximum(scale, 1e-38)), limits.min, limits.max)
    return quantized.astype(np.int32), scale


def choose_range(histogram: np.ndarray, edges: np.ndarray, method: str) -> tuple[float, float]:
    """The interval to represent, from a histogram of everything a tensor held.

    "minmax": all of it. "percentile-P": leaves out (100 - P) / 2 percent at either end. Of 80 intervals that shrink
    towards zero: "mse": the one whose 8-bit grid has the least expected squared error, clipping included; "entropy":
    the one whose rounded histogram tells least from the true one (Kullback-Leibler divergence; Migacz 2017, "8-bit
    inference with TensorRT").
    """
    low, high = float(edges[0]), float(edges[-1])
    total = histogram.sum()
    if method == "minmax" or total == 0 or high <= low:
        return low, high
    if method.startswith("percentile-"):
        tail = (100.0 - float(method.removeprefix("percentile-"))) / 200.0
        cumulative = np.cumsum(histogram) / total
        first = int(np.searchsorted(cumulative, tail))
        last = int(np.searchsorted(cumulative, 1.0 - tail))
        return float(edges[first]), float(edges[min(last + 1, len(edges) - 1)])
    costs = {"mse": _squared_error, "entropy": _divergence}
    if method not in costs:
        raise ValueError(f"range method {method!r} is unknown; allowed: {', '.join(RANGE_METHODS)}")
    centers = (edges[:-1] + edges[1:]) / 2
    return min(_shrinking(low, high), key=lambda interval: costs[method](histogram, centers, *interval))


def _shrinking(low: float, high: float) -> list[tuple[float, float]]:
    """The widest first. The end nearer to zero (SiLU's -0.28) is short already and is kept."""
    keep_low, keep_high = abs(low) < 0.25 * high, abs(high) < 0.25 * -low
    return [
        (low if keep_low else low * shrink, high if keep_high else high * shrink)
        for shrink in np.linspace(1.0, 0.2, 80).tolist()
    ]


def _squared_error(histogram: np.ndarray, centers: np.ndarray, low: float, high: float) -> float:
    step = (max(high, 0.0) - min(low, 0.0)) / (LEVELS - 1)
    outside = np.maximum(centers - high, 0) + np.maximum(low - centers, 0)
    return float((histogram * np.where(outside > 0, outside**2, step**2 / 12)).sum())


def _divergence(histogram: np.ndarray, centers: np.ndarray, low: float, high: float) -> float:
    """Of the histogram with what is outside put into the end bins, from what rounding leaves of it: each level's share
    spread over the bins that it holds."""
    inside = (centers >= low) & (centers <= high)
    if not inside.any():
        return np.inf
    counts = histogram[inside].astype(np.float64)
    true = counts.copy()
    true[0] += histogram[centers < low].sum()
    true[-1] += histogram[centers > high].sum()
    level = np.minimum(((centers[inside] - low) * (LEVELS / (high - low))).astype(np.int64), LEVELS - 1)
    bins = np.bincount(level, weights=counts > 0, minlength=LEVELS)
    share = np.bincount(level, weights=counts, minlength=LEVELS) / np.maximum(bins, 1)
    rounded = np.where(counts > 0, share[level], 0.0)
    true, rounded = true / true.sum(), rounded / max(rounded.sum(), 1.0)
    held = true > 0
    return float((true[held] * np.log(true[held] / np.maximum(rounded[held], 1e-12))).sum())
