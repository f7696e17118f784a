"""What a denoiser is asked in training: which timesteps, with which noise, how much each error counts. numpy only."""

from __future__ import annotations

import numpy as np

from ldm_deploy.errors import ConfigError

TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")


def snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Signal-to-noise ratio a_t / (1 - a_t), float64 (T,) (Kingma et al. 2021, arXiv:2107.00630, eq. 2)."""
    levels = np.asarray(alphas_cumprod, dtype=np.float64)
    return levels / (1 - levels)


def min_snr_weights(alphas_cumprod: np.ndarray, gamma: float, prediction_type: str) -> np.ndarray:
    """Weight of the squared error of a prediction at each timestep, float64 (T,).

    Hang et al. 2023, arXiv:2303.09556, section 3.4: min(SNR, gamma) for x_0, that over SNR for epsilon and over SNR + 1
    for v. They suggest gamma = 5. Raises `ConfigError` for epsilon where there is no signal at all.
    """
    ratio = snr(alphas_cumprod)
    capped = np.minimum(ratio, gamma)
    if prediction_type == "sample":
        return capped
    if prediction_type == "v_prediction":
        return capped / (ratio + 1)
    if (ratio == 0).any():
        raise ConfigError("min-SNR weights of an epsilon prediction need signal at every timestep; predict v instead")
    return capped / ratio


def sample_timesteps(draw: np.random.Generator, count: int, total: int, sampling: str) -> np.ndarray:
    """Timesteps to train on: int64 (count,) in [0, total).

    "uniform", or "logit_normal": t / T = sigmoid(u) with u standard normal, which favours the middle (Esser et al.
    2024, arXiv:2403.03206, eq. 19 with m = 0, s = 1).
    """
    if sampling == "uniform":
        return draw.integers(total, size=count)
    fraction = 1 / (1 + np.exp(-draw.standard_normal(count)))
    return np.minimum((fraction * total).astype(np.int64), total - 1)


def offset_noise(draw: np.random.Generator, shape: tuple[int, int, int, int], strength: float) -> np.ndarray:
    """Standard normal noise, float32 (batch, channels, h, w), plus `strength` times one normal number per channel.

    Lets a model change the mean of an image, which plain noise hardly touches (Guttenberg 2023, "Diffusion with offset
    noise"). A schedule that ends without signal needs it less.
    """
    noise = draw.standard_normal(shape, dtype=np.float32)
    if strength:
        noise += np.float32(strength) * draw.standard_normal((*shape[:2], 1, 1), dtype=np.float32)
    return noise
