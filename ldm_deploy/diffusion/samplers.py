"""Samplers: from the model's prediction at one timestep to the latents at the next.

numpy only. Coefficients are float64, latents keep their dtype (float32). One free function per sampler; each is handed
a_t = alphas_cumprod at the current and at the next timestep (a_next = 1 after the last step: no noise is left).
"""

from __future__ import annotations

import numpy as np

from ldm_deploy.diffusion.schedule import Schedule

SAMPLERS = ("ddim", "ddpm")


def predicted_original(sample: np.ndarray, prediction: np.ndarray, a_t: float, prediction_type: str) -> np.ndarray:
    """The x_0 that a prediction at noise level a_t amounts to, shape of `sample`.

    epsilon: Ho et al. 2020, arXiv:2006.11239, eq. 15. v: Salimans and Ho 2022, arXiv:2202.00512, appendix D.
    """
    if prediction_type == "v_prediction":
        return np.sqrt(a_t) * sample - np.sqrt(1 - a_t) * prediction
    return (sample - np.sqrt(1 - a_t) * prediction) / np.sqrt(a_t)


def predicted_noise(sample: np.ndarray, prediction: np.ndarray, a_t: float, prediction_type: str) -> np.ndarray:
    """The noise that a prediction at noise level a_t amounts to, shape of `sample`; same sources."""
    if prediction_type == "v_prediction":
        return np.sqrt(a_t) * prediction + np.sqrt(1 - a_t) * sample
    return prediction


def ddim_step(
    sample: np.ndarray, prediction: np.ndarray, a_t: float, a_next: float, prediction_type: str
) -> np.ndarray:
    """One deterministic step (Song et al. 2021, arXiv:2010.02502, eq. 12 with sigma = 0), float64."""
    original = predicted_original(sample, prediction, a_t, prediction_type)
    noise = predicted_noise(sample, prediction, a_t, prediction_type)
    return np.sqrt(a_next) * original + np.sqrt(1 - a_next) * noise


def ddpm_step(
    sample: np.ndarray, prediction: np.ndarray, a_t: float, a_next: float, prediction_type: str, noise: np.ndarray
) -> np.ndarray:
    """One ancestral step (Ho et al. 2020, eq. 6 and 7, with the smaller variance), float64.

    `noise`: standard normal, shape of `sample`; it has no effect in the last step (a_next = 1).
    """
    original = predicted_original(sample, prediction, a_t, prediction_type)
    alpha = a_t / a_next
    mean = np.sqrt(a_next) * (1 - alpha) / (1 - a_t) * original + np.sqrt(alpha) * (1 - a_next) / (1 - a_t) * sample
    variance = (1 - a_next) / (1 - a_t) * (1 - alpha)
    return mean + np.sqrt(variance) * noise


def noise_levels(schedule: Schedule, steps: int) -> list[tuple[int, float, float]]:
    """(timestep, a_t, a_next) of each step. a_next is that of the next timestep visited, 1 after the last.

    diffusers' DDIMScheduler takes a_next at t - T // steps, the same wherever `steps` divides T. Where it does not,
    that is a timestep the model is never asked about: of 400 steps of 1000 each would remove too little noise, and of
    7 the last would leave some. So we part from it there, as its own DDPMScheduler does.
    """
    timesteps = schedule.timesteps(steps)
    levels = [float(schedule.alphas_cumprod[timestep]) for timestep in timesteps]
    return [
        (int(timestep), level, following)
        for timestep, level, following in zip(timesteps, levels, [*levels[1:], 1.0], strict=True)
    ]
