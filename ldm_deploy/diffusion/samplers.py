"""Samplers: from the model's prediction at one timestep to the latents at the next.

numpy only. Coefficients are float64, latents keep their dtype (float32). One free function per sampler; each is handed
a_t = alphas_cumprod at the current and at the next timestep (a_next = 1 after the last step: no noise is left).
`SamplerRun` walks through the steps of any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import ConfigError

SAMPLERS = ("ddim", "ddpm", "dpmsolver++", "euler", "lcm")


def predicted_original(sample: np.ndarray, prediction: np.ndarray, a_t: float, prediction_type: str) -> np.ndarray:
    """The x_0 that a prediction at noise level a_t amounts to, shape of `sample`.

    epsilon: Ho et al. 2020, arXiv:2006.11239, eq. 15. v: Salimans and Ho 2022, arXiv:2202.00512, appendix D.
    """
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return np.sqrt(a_t) * sample - np.sqrt(1 - a_t) * prediction
    return (sample - np.sqrt(1 - a_t) * prediction) / np.sqrt(a_t)


def predicted_noise(sample: np.ndarray, prediction: np.ndarray, a_t: float, prediction_type: str) -> np.ndarray:
    """The noise that a prediction at noise level a_t amounts to, shape of `sample`; same sources."""
    if prediction_type == "sample":
        return (sample - np.sqrt(a_t) * prediction) / np.sqrt(1 - a_t)
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


def euler_step(
    sample: np.ndarray, prediction: np.ndarray, a_t: float, a_next: float, prediction_type: str
) -> np.ndarray:
    """One Euler step of the probability-flow ODE in sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 1), float64.

    With y = x / sqrt(a) and sigma = sqrt((1 - a) / a): y' = y + (sigma' - sigma) dy/dsigma. Carried out in y this is
    DDIM in other coordinates (Song et al. 2021, section 4.3); at a_t = 0, where y is infinite, DDIM's form is used.
    """
    if a_t == 0:
        return ddim_step(sample, prediction, a_t, a_next, prediction_type)
    sigma, sigma_next = math.sqrt((1 - a_t) / a_t), math.sqrt((1 - a_next) / a_next)
    scaled = sample / np.sqrt(a_t)
    slope = (scaled - predicted_original(sample, prediction, a_t, prediction_type)) / sigma
    return np.sqrt(a_next) * (scaled + (sigma_next - sigma) * slope)


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


def half_log_snr(a_t: float) -> float:
    """lambda = log(sqrt(a_t) / sqrt(1 - a_t)); minus infinity at a_t = 0, infinity at 1."""
    if a_t in (0, 1):
        return math.inf if a_t == 1 else -math.inf
    return 0.5 * math.log(a_t / (1 - a_t))


def dpmsolver_step(
    sample: np.ndarray,
    original: np.ndarray,
    a_t: float,
    a_next: float,
    earlier: tuple[np.ndarray, float] | None = None,
) -> np.ndarray:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2), float64.

    `original`: predicted x_0 at a_t; `earlier`: (predicted x_0, a) of the step before. First order without it, in the
    last step (a_next = 1) and where the step before started from pure noise (a = 0): its half log-SNR is infinite.
    """
    step_size = half_log_snr(a_next) - half_log_snr(a_t)
    direction = np.asarray(original, dtype=np.float64)
    if earlier is not None and a_next < 1 and earlier[1] > 0:
        ratio = (half_log_snr(a_t) - half_log_snr(earlier[1])) / step_size
        direction = original + (original - earlier[0]) / (2 * ratio)
    return math.sqrt((1 - a_next) / (1 - a_t)) * sample - math.sqrt(a_next) * math.expm1(-step_size) * direction


# The released values of Luo et al. 2023, arXiv:2310.04378, section 4.1.
LCM_SIGMA_DATA = 0.5
LCM_TIMESTEP_SCALING = 10.0


def consistency_scalings(timestep: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """(c_skip, c_out) of the consistency function c_skip x + c_out x_0 at a timestep, float64, shape of `timestep`.

    d^2 / (t^2 + d^2) and t / sqrt(t^2 + d^2) for the scaled timestep t: 1 and 0 at timestep 0, where the function must
    return what it is given (Song et al. 2023, arXiv:2303.01469, eq. 5; Luo et al. 2023, section 4.1).
    """
    scaled = np.asarray(timestep, dtype=np.float64) * LCM_TIMESTEP_SCALING
    total = scaled**2 + LCM_SIGMA_DATA**2
    return LCM_SIGMA_DATA**2 / total, scaled / np.sqrt(total)


def lcm_step(sample: np.ndarray, original: np.ndarray, timestep: int, a_next: float, noise: np.ndarray) -> np.ndarray:
    """One step of multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1), float64.

    The consistency function, noised again to a_next; for models distilled to be one. `noise` has no effect in the last
    step (a_next = 1).
    """
    c_skip, c_out = consistency_scalings(timestep)
    return np.sqrt(a_next) * (c_out * original + c_skip * sample) + np.sqrt(1 - a_next) * noise


class SamplerRun:
    """One walk of a sampler from noise to an image: `levels` are its steps, `step` takes one of them.

    `noise(index)` returns standard normal noise of the sample's shape for step `index`; deterministic samplers never
    ask for it.
    """

    def __init__(self, sampler: str, schedule: Schedule, steps: int, noise: Callable[[int], np.ndarray]) -> None:
        self.sampler = sampler
        self.levels = noise_levels(schedule, steps)
        self.prediction_type = schedule.prediction_type
        self._noise = noise
        self._earlier: tuple[np.ndarray, float] | None = None

    def step(self, index: int, sample: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """The sample at the next noise level, from the prediction at `levels[index]`; steps are taken in order."""
        timestep, a_t, a_next = self.levels[index]
        if self.sampler == "ddim":
            return ddim_step(sample, prediction, a_t, a_next, self.prediction_type)
        if self.sampler == "euler":
            return euler_step(sample, prediction, a_t, a_next, self.prediction_type)
        if self.sampler == "ddpm":
            return ddpm_step(sample, prediction, a_t, a_next, self.prediction_type, self._noise(index))
        original = predicted_original(sample, prediction, a_t, self.prediction_type)
        if self.sampler == "lcm":
            return lcm_step(sample, original, timestep, a_next, self._noise(index))
        earlier, self._earlier = self._earlier, (original, a_t)
        return dpmsolver_step(sample, original, a_t, a_next, earlier)


def step_coefficients(sampler: str, schedule: Schedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A deterministic sampler as tables: timesteps int64 (steps,) and coefficients float64 (steps, 5).

    next = c0 sample + c1 prediction + c2 earlier, original = c3 sample + c4 prediction, where `earlier` is the step
    before's `original`. Every such step is linear, so that the samplers above, given unit vectors, return them. Raises
    `ConfigError` for a sampler that draws noise on the way.
    """

    def no_noise(index: int) -> np.ndarray:
        raise ConfigError(f"sampler {sampler!r} draws noise at every step; here it must be ddim, dpmsolver++ or euler")

    run = SamplerRun(sampler, schedule, steps, no_noise)
    of_sample, of_prediction, of_earlier = np.eye(3)
    rows = []
    for index, (_, a_t, _) in enumerate(run.levels):
        if run._earlier is not None:
            run._earlier = of_earlier, run._earlier[1]
        original = predicted_original(of_sample, of_prediction, a_t, run.prediction_type)
        rows.append([*run.step(index, of_sample, of_prediction), *original[:2]])
    return np.array([timestep for timestep, _, _ in run.levels], np.int64), np.array(rows)


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
