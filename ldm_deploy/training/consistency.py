"""Consistency distillation: the student's function, the teacher's step along the ODE, and the loss between them.

Song et al. 2023, arXiv:2303.01469; in latent space with guidance, Luo et al. 2023, arXiv:2310.04378. Tensors are
float32 (batch, channels, h, w), timesteps int64 (batch). Timestep 0 stands for "no noise is left", where samplers end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_deploy.diffusion.samplers import consistency_scalings
from ldm_deploy.diffusion.schedule import Schedule

# (sample, timestep) -> prediction; captions and guidance are bound
Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Levels:
    """Tables by timestep, float32 (T,), on one device: sqrt(a_t), sqrt(1 - a_t), c_skip and c_out."""

    signal: Tensor
    spread: Tensor
    c_skip: Tensor
    c_out: Tensor
    kind: str  # of prediction

    @classmethod
    def of(cls, schedule: Schedule, device: torch.device | str = "cpu") -> Levels:
        clean = schedule.alphas_cumprod.copy()
        clean[0] = 1.0
        c_skip, c_out = consistency_scalings(np.arange(len(clean)))
        signal, spread, skip, out = (
            torch.from_numpy(table).float().to(device) for table in (np.sqrt(clean), np.sqrt(1 - clean), c_skip, c_out)
        )
        return cls(signal, spread, skip, out, schedule.prediction_type)

    def at(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), (batch, 1, 1, 1)."""
        return self.signal[timestep][:, None, None, None], self.spread[timestep][:, None, None, None]

    def noised(self, latent: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        signal, spread = self.at(timestep)
        return signal * latent + spread * noise

    def original(self, sample: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """x_0 as in `diffusion.samplers.predicted_original`."""
        signal, spread = self.at(timestep)
        if self.kind == "sample":
            return prediction
        if self.kind == "v_prediction":
            return signal * sample - spread * prediction
        return (sample - spread * prediction) / signal

    def noise(self, sample: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The noise as in `diffusion.samplers.predicted_noise`."""
        signal, spread = self.at(timestep)
        if self.kind == "sample":
            return (sample - signal * prediction) / spread
        if self.kind == "v_prediction":
            return signal * prediction + spread * sample
        return prediction

    def ddim_step(self, sample: Tensor, prediction: Tensor, timestep: Tensor, following: Tensor) -> Tensor:
        """The solver of the teacher's ODE (Luo et al. 2023, eq. 15; Song et al. 2021, arXiv:2010.02502, eq. 12)."""
        signal, spread = self.at(following)
        original = self.original(sample, prediction, timestep)
        return signal * original + spread * self.noise(sample, prediction, timestep)

    def consistent(self, sample: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """The consistency function c_skip x + c_out x_0 (Song et al. 2023, eq. 5)."""
        c_skip, c_out = (table[timestep][:, None, None, None] for table in (self.c_skip, self.c_out))
        return c_skip * sample + c_out * self.original(sample, prediction, timestep)


def solver_grid(schedule: Schedule, steps: int) -> np.ndarray:
    """The timesteps between which the teacher's solver steps, and 0 after them: int64 (steps + 1,), descending.

    Luo et al. 2023, section 4.3, "skipping-step": the neighbours that must agree are one step of a sampler apart.
    """
    total = schedule.num_train_timesteps
    trailing = np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1
    return np.append(np.maximum(trailing, 1), 0)


def pseudo_huber(first: Tensor, second: Tensor, c: float) -> Tensor:
    """sqrt(mean (a - b)^2 + c^2) - c of each image, (batch,) (Song and Dhariwal 2023, arXiv:2310.14189, eq. 8; both
    sides divided by the root of the number of elements)."""
    return (first - second).square().mean(dim=(1, 2, 3)).add(c**2).sqrt() - c


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598), `scale` (batch,); 1: none."""
    return unconditional + scale[:, None, None, None] * (conditional - unconditional)


def consistency_loss(
    student: Predict,
    target: Predict,
    teacher: Predict,
    latent: Tensor,
    noise: Tensor,
    timestep: Tensor,
    following: Tensor,
    levels: Levels,
    c: float,
) -> Tensor:
    """What the student says at `timestep` against what its own average says one solver step further: (batch,).

    Luo et al. 2023, eq. 16 (Song et al. 2023, eq. 7). `teacher` predicts with guidance. Gradients reach `student` only.
    """
    sample = levels.noised(latent, noise, timestep)
    with torch.no_grad():
        nearer = levels.ddim_step(sample, teacher(sample, timestep), timestep, following)
        wanted = levels.consistent(nearer, target(nearer, following), following)
    return pseudo_huber(levels.consistent(sample, student(sample, timestep), timestep), wanted, c)
