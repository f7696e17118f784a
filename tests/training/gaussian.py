"""A teacher that is known exactly: data N(mu, s^2 I), for which denoiser, ODE and consistency function have formulas.

With x_t = sqrt(a) x_0 + sqrt(1-a) e, x_t is N(sqrt(a) mu, v), v = a s^2 + 1 - a. The posterior mean of x_0 is that of
two Gaussians, and the probability-flow ODE keeps (x_t - sqrt(a) mu) / sqrt(v) (Karras et al. 2022, arXiv:2206.00364,
appendix B: it moves along straight quantiles).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_deploy.training.consistency import Levels

MEAN, DEVIATION = 0.7, 0.6


def variance(levels: Levels, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    signal, spread = levels.at(timestep)
    return signal, spread, signal**2 * DEVIATION**2 + spread**2


def teacher(levels: Levels):
    """The exact denoiser, as a v-prediction: (sqrt(a) x - E[x_0 | x]) / sqrt(1 - a)."""

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        signal, spread, total = variance(levels, timestep)
        original = MEAN + signal * DEVIATION**2 / total * (sample - signal * MEAN)
        return (signal * sample - original) / spread

    return predict


def exact_solution(levels: Levels, sample: Tensor, timestep: Tensor, following: Tensor) -> Tensor:
    """Where the ODE leads from `timestep` to `following`; at 0 it is the consistency function."""
    signal, _, total = variance(levels, timestep)
    signal_after, _, total_after = variance(levels, following)
    return signal_after * MEAN + (total_after / total).sqrt() * (sample - signal * MEAN)


def exact_student(levels: Levels, wrong: float = 0.0):
    """The v-prediction whose consistency function is the exact one; `wrong` is added to what it draws."""

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        signal, spread = levels.at(timestep)
        c_skip, c_out = (table[timestep][:, None, None, None] for table in (levels.c_skip, levels.c_out))
        drawn = exact_solution(levels, sample, timestep, torch.zeros_like(timestep)) + wrong
        original = (drawn - c_skip * sample) / c_out.clamp(min=1e-12)
        return (signal * sample - original) / spread.clamp(min=1e-12)

    return predict
