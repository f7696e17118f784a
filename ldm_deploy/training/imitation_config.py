"""What the trainings of pruned and of quantized U-Nets have in common: a frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ldm_deploy.config import StageConfig
from ldm_deploy.errors import ConfigError


@dataclass(frozen=True)
class ImitationConfig:
    """The three weights are of the terms of Kim et al. 2023, arXiv:2305.15798, eq. 1 to 4, who have 1 everywhere."""

    training: StageConfig
    points: int = 64  # inputs of the U-Net from sampling trajectories, on which it is measured before training
    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    caption_dropout: float = 0.1
    seed: int = 0
    autocast_bf16: bool = True

    def check(self, what: str) -> None:
        """Raises `ConfigError`; `what`: is trained."""
        self.training.check("training")
        if self.training.resolutions or self.training.grow_at:
            raise ConfigError(f"training.resolutions and training.grow_at are not for {what}; leave them out")
        if self.points < 1:
            raise ConfigError(f"points is {self.points}; give 1 or more")
        weights = ("task_weight", "output_weight", "feature_weight")
        for name in weights:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more")
        if not any(getattr(self, name) for name in weights):
            raise ConfigError("task_weight, output_weight and feature_weight are all 0; there is nothing to learn")
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"caption_dropout is {self.caption_dropout}; allowed: 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}
