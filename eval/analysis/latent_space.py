"""What an autoencoder's latent space looks like: statistics per channel, dead and correlated ones, smoothness, a map.

Latents are posterior means, float (n, z, h, w), unscaled: what the encoder returns before `scale_factor`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Burda et al. 2016, arXiv:1509.00519, section 5.2: a unit is active if Var_x(E_q[u | x]) > 0.01.
ACTIVE_VARIANCE = 0.01
STRONG_CORRELATION = 0.5  # of two channels: worth a line in the findings
UNEVEN_STEP = 3.0  # the largest step of an interpolation in units of its mean
LATENT_DIMENSIONS = 50  # t-SNE sees the first principal components only (van der Maaten and Hinton 2008, section 4.2)
SMALLEST_MAP = 5  # images


def channel_statistics(latents: np.ndarray) -> dict[str, Any]:
    """Mean, standard deviation, excess kurtosis and active units of every channel, over all images and positions.

    `kurtosis` is the fourth standardized moment minus 3: 0 for a Gaussian, as `scipy.stats.kurtosis`; None for a
    channel that is constant. `active_share`: the share of a channel's h·w units that are active (`ACTIVE_VARIANCE`,
    variance over images with divisor n). Raises `ValueError` for fewer than two images or values that are not finite.
    """
    check_latents(latents)
    count, channels, height, width = latents.shape
    values = latents.astype(np.float64)
    per_channel = values.transpose(1, 0, 2, 3).reshape(channels, -1)
    mean = per_channel.mean(axis=1)
    centred = per_channel - mean[:, None]
    variance = (centred**2).mean(axis=1)
    fourth = (centred**4).mean(axis=1)
    active = values.var(axis=0) > ACTIVE_VARIANCE  # (z, h, w)
    constant = is_constant(mean, variance)
    rows = [
        {
            "channel": channel,
            "mean": float(mean[channel]),
            "std": float(np.sqrt(variance[channel])),
            "kurtosis": None if constant[channel] else float(fourth[channel] / variance[channel] ** 2 - 3),
            "active_share": float(active[channel].mean()),
        }
        for channel in range(channels)
    ]
    return {
        "images": count,
        "shape": [channels, height, width],
        "units": channels * height * width,
        "active_units": int(active.sum()),
        "active_variance_above": ACTIVE_VARIANCE,
        "channels": rows,
    }


def channel_correlation(latents: np.ndarray) -> list[list[float | None]]:
    """Pearson correlation of every pair of channels over images and positions (z, z); None beside a constant one."""
    check_latents(latents)
    channels = latents.shape[1]
    values = latents.astype(np.float64).transpose(1, 0, 2, 3).reshape(channels, -1)
    mean = values.mean(axis=1)
    centred = values - mean[:, None]
    covariance = centred @ centred.T / values.shape[1]
    variance = covariance.diagonal()
    constant = is_constant(mean, variance)
    scale = np.sqrt(np.where(constant, 1, variance))
    matrix = covariance / scale[:, None] / scale[None]
    return [
        [None if constant[a] or constant[b] else float(np.clip(matrix[a, b], -1, 1)) for b in range(channels)]
        for a in range(channels)
    ]


def histograms(latents: np.ndarray, bins: int = 48) -> dict[str, Any]:
    """Densities of all channels over common bins, which reach from the 0.1th to the 99.9th percentile of all values."""
    check_latents(latents)
    low, high = np.percentile(latents, [0.1, 99.9])
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    channels = latents.transpose(1, 0, 2, 3).reshape(latents.shape[1], -1)
    density = [np.histogram(values, edges)[0] / (values.size * (edges[1] - edges[0])) for values in channels]
    return {"edges": edges.tolist(), "density": [row.tolist() for row in density]}


def interpolate(
    decode: Callable[[np.ndarray], np.ndarray], starts: np.ndarray, ends: np.ndarray, steps: int = 8
) -> tuple[dict[str, Any], np.ndarray]:
    """Walk in straight lines between pairs of latents and watch how evenly the image changes.

    `starts`, `ends`: (pairs, z, h, w). `decode`: latents (k, z, h, w) -> uint8 (k, H, W, 3). A step's length is the
    root mean squared pixel difference of neighbouring images (grey levels). For each pair `unevenness` is the largest
    step over the mean one (1: even; many: a jump), `detour` the sum of the steps over the distance of the two ends
    (1: a straight line in pixel space, 1 for a linear decoder; None where the ends are the same image). Returns these
    and the images, uint8 (pairs, steps + 1, H, W, 3). A walk through pixels as in Karras et al. 2019, arXiv:1812.04948,
    section 4.1, without its network.
    """
    if starts.shape != ends.shape or starts.ndim != 4 or len(starts) == 0:
        raise ValueError(f"starts and ends must both be (pairs, z, h, w); got {starts.shape} and {ends.shape}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; give 1 or more")
    fractions = np.linspace(0, 1, steps + 1, dtype=np.float32)[:, None, None, None]
    rows, strips = [], []
    for start, end in zip(starts, ends, strict=True):
        images = decode((1 - fractions) * start[None] + fractions * end[None])
        values = images.astype(np.float64)
        lengths = np.sqrt(((values[1:] - values[:-1]) ** 2).mean(axis=(1, 2, 3)))
        direct = float(np.sqrt(((values[-1] - values[0]) ** 2).mean()))
        mean = float(lengths.mean())
        rows.append(
            {
                "steps": lengths.tolist(),
                "unevenness": None if mean == 0 else float(lengths.max() / mean),
                "detour": None if direct == 0 else float(lengths.sum() / direct),
            }
        )
        strips.append(images)
    return {
        "pairs": rows,
        "unevenness": _mean([row["unevenness"] for row in rows]),
        "detour": _mean([row["detour"] for row in rows]),
    }, np.stack(strips)


def tsne_map(latents: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """A map of the latents in two dimensions: t-SNE (van der Maaten and Hinton 2008) on the principal components.

    Returns `points` [[x, y], ...] and `perplexity`; `points` is None with a `reason` where there are too few images or
    scikit-learn is absent. Only neighbourhoods in it mean something, neither axes nor distances between groups do.
    """
    check_latents(latents)
    count = len(latents)
    if count < SMALLEST_MAP:
        return {"points": None, "reason": f"{count} images are too few for a map; give {SMALLEST_MAP} or more"}
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError:
        return {"points": None, "reason": "scikit-learn is not installed; install ldm-deploy[train]"}
    flat = latents.reshape(count, -1).astype(np.float64)
    if not (flat != flat[0]).any():
        return {"points": None, "reason": "all latents are equal: the encoder ignores its input"}
    components = min(LATENT_DIMENSIONS, count, flat.shape[1])
    reduced = PCA(components, random_state=seed).fit_transform(flat) if components < flat.shape[1] else flat
    perplexity = min(30.0, (count - 1) / 3)
    start = "pca" if reduced.shape[1] >= 2 else "random"
    points = TSNE(perplexity=perplexity, init=start, random_state=seed).fit_transform(reduced)
    return {"points": points.astype(float).tolist(), "perplexity": perplexity, "seed": seed, "reason": None}


def findings(
    statistics: dict[str, Any], correlation: list[list[float | None]], smoothness: dict[str, Any]
) -> list[str]:
    """What a reader should know, one sentence each; empty if nothing stands out."""
    found = []
    for row in statistics["channels"]:
        if row["active_share"] == 0:
            found.append(f"Channel {row['channel']} is dead: none of its units has a variance above {ACTIVE_VARIANCE}.")
    for a, line in enumerate(correlation):
        for b, value in enumerate(line[:a]):
            if value is not None and abs(value) >= STRONG_CORRELATION:
                found.append(f"Channels {b} and {a} are correlated ({value:+.2f}): they carry some of the same.")
    if (smoothness.get("unevenness") or 0) >= UNEVEN_STEP:
        found.append(
            f"Interpolations jump: the largest step is {smoothness['unevenness']:.1f} times the mean one on average."
        )
    return found


def analyze_latents(
    latents: np.ndarray,
    decode: Callable[[np.ndarray], np.ndarray],
    labels: Sequence[str] | None,
    seed: int = 0,
    pairs: int = 4,
) -> tuple[dict[str, Any], np.ndarray]:
    """All of the above as plain data, and the images of the interpolations. `labels` colour the map."""
    check_latents(latents)
    order = np.random.default_rng(seed).permutation(len(latents))
    pairs = min(pairs, len(latents) // 2)
    smoothness, strips = interpolate(decode, latents[order[:pairs]], latents[order[pairs : 2 * pairs]])
    statistics, correlation = channel_statistics(latents), channel_correlation(latents)
    return {
        "findings": findings(statistics, correlation, smoothness),
        **statistics,
        "correlation": correlation,
        "histograms": histograms(latents),
        "interpolation": smoothness,
        "map": {**tsne_map(latents, seed), "labels": None if labels is None else list(labels)},
    }, strips


def check_latents(latents: np.ndarray) -> None:
    """Raises `ValueError` unless `latents` is (n, z, h, w) with two images or more and every value finite."""
    if latents.ndim != 4 or len(latents) < 2 or 0 in latents.shape:
        raise ValueError(f"latents must be (n, z, h, w) with n of 2 or more; got {latents.shape}")
    if not np.isfinite(latents).all():
        raise ValueError("the latents hold NaN or infinity; the autoencoder diverged in training")


def is_constant(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Channels whose variance is nothing but rounding."""
    return np.asarray(variance <= 1e-12 * np.maximum(mean**2, 1e-12))


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
