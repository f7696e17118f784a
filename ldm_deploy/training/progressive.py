"""Progressive distillation: what one step must be to equal two of the teacher's, and how much its error counts.

Salimans and Ho 2022, arXiv:2202.00512. Tensors as in `consistency.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_deploy.training.consistency import Levels, Predict


def two_step_original(
    teacher: Predict, sample: Tensor, timestep: Tensor, middle: Tensor, following: Tensor, levels: Levels
) -> Tensor:
    """The x_0 with which one DDIM step from `timestep` to `following` ends where two of the teacher's do.

    Their algorithm 2 and appendix G: x = (z'' - (s''/s) z) / (a'' - (s''/s) a), here with signal a and spread s.
    """
    halfway = levels.ddim_step(sample, teacher(sample, timestep), timestep, middle)
    end = levels.ddim_step(halfway, teacher(halfway, middle), middle, following)
    (signal, spread), (signal_after, spread_after) = levels.at(timestep), levels.at(following)
    ratio = spread_after / spread
    return (end - ratio * sample) / (signal_after - ratio * signal)


def snr_weights(levels: Levels, timestep: Tensor, weighting: str) -> Tensor:
    """Weight of the squared error of x_0, (batch,): max(SNR, 1), or SNR + 1, which makes it the error of v.

    Their section 4, "truncated SNR" and "SNR + 1": the plain SNR is 0 at the first step, which then learns nothing.
    """
    signal, spread = (value.flatten() for value in levels.at(timestep))
    snr = (signal / spread).square()
    return torch.clamp(snr, min=1) if weighting == "truncated" else snr + 1


def original_loss(
    student: Predict, wanted: Tensor, sample: Tensor, timestep: Tensor, levels: Levels, weighting: str
) -> Tensor:
    """Weighted squared error of the student's x_0, (batch,)."""
    original = levels.original(sample, student(sample, timestep), timestep)
    error = (original - wanted).square().mean(dim=(1, 2, 3))
    return snr_weights(levels, timestep, weighting) * error
