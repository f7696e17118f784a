"""The noise schedule: which noise level belongs to which timestep, and which timesteps a sampler visits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from ldm_deploy.errors import ConfigError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


@dataclass(frozen=True)
class Schedule:
    """Variance-preserving: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, arXiv:2006.11239, eq. 4).

    The fields carry the names of diffusers' scheduler configuration. `alphas_cumprod` is a_t. "squaredcos_cap_v2" is
    the cosine schedule, which has no beta_start and beta_end. `shift` divides the signal-to-noise ratio by shift^2:
    latents d times as wide as those the schedule was made for keep their look at shift = d, as neighbouring pixels
    that say the same average the noise away.
    """

    beta_schedule: str = "scaled_linear"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "v_prediction"
    rescale_zero_terminal_snr: bool = True
    timestep_spacing: str = "trailing"
    shift: float = 1.0
    steps_offset: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (
            ("beta_schedule", BETA_SCHEDULES),
            ("prediction_type", PREDICTION_TYPES),
            ("timestep_spacing", TIMESTEP_SPACINGS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"schedule: {name} is {value!r}; allowed: {', '.join(allowed)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"schedule: beta_start {self.beta_start} and beta_end {self.beta_end} "
                "must satisfy 0 < beta_start <= beta_end < 1"
            )
        if not 0 < self.shift < math.inf:
            raise ConfigError(f"schedule: shift is {self.shift}; give a number above 0 (1: none)")
        if self.steps_offset < 0:
            raise ConfigError(f"schedule: steps_offset is {self.steps_offset}; give 0 or more (Stable Diffusion: 1)")
        if self.num_train_timesteps < 2:
            raise ConfigError(f"schedule: num_train_timesteps is {self.num_train_timesteps}; give 2 or more")
        if self.rescale_zero_terminal_snr and self.prediction_type == "epsilon":
            raise ConfigError(
                "schedule: rescale_zero_terminal_snr needs prediction_type = 'v_prediction' or 'sample': "
                "at the last timestep there is no signal for an epsilon prediction to recover"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """Build from JSON; unknown keys are refused (`ConfigError`)."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"schedule: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """a_t for t = 0 … T-1: float64 (T,), strictly decreasing, in [0, 1)."""
        total = self.num_train_timesteps
        if self.beta_schedule == "linear":  # Ho et al. 2020, section 4
            betas = np.linspace(self.beta_start, self.beta_end, total)
        elif self.beta_schedule == "scaled_linear":
            # Linear in sqrt(beta) (Rombach et al. 2022, arXiv:2112.10752, released code).
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, total) ** 2
        else:  # Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17, betas capped at 0.999 as in their section 3.2
            level = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
        alphas_cumprod = np.cumprod(1.0 - betas)
        # Hoogeboom et al. 2023, arXiv:2301.11093, section 3.1: log SNR - 2 log shift.
        alphas_cumprod = alphas_cumprod / (self.shift**2 + (1 - self.shift**2) * alphas_cumprod)
        if not self.rescale_zero_terminal_snr:
            return alphas_cumprod
        # Lin et al. 2023, arXiv:2305.08891, algorithm 1: shift sqrt(a_t) to end at 0, scale it to keep the first.
        root = np.sqrt(alphas_cumprod)
        return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    def timesteps(self, steps: int) -> np.ndarray:
        """The timesteps a sampler of `steps` steps visits: int64 (steps,), descending.

        "trailing" always starts at T-1, as a zero-terminal-SNR schedule needs (Lin et al. 2023, section 3.3);
        "leading" starts at T//steps * (steps - 1) + steps_offset, which is 1 in Stable Diffusion 1.x; "linspace" goes
        from T-1 to 0, both included.
        """
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise ConfigError(f"steps is {steps}; allowed: 1 to {total}, the timesteps the model was trained on")
        if self.timestep_spacing == "trailing":
            return np.round(np.arange(total, 0, -total / steps)).astype(np.int64)[:steps] - 1
        if self.timestep_spacing == "linspace":
            return np.round(np.linspace(0, total - 1, steps)[::-1]).astype(np.int64)
        return np.minimum(np.arange(steps)[::-1] * (total // steps) + self.steps_offset, total - 1).astype(np.int64)
