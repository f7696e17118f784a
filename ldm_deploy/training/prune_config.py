"""How a U-Net is pruned and what it learns afterwards: a frozen dataclass and its presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_deploy.config import StageConfig, read_preset
from ldm_deploy.errors import ConfigError

COSTS = ("milliseconds", "flops")


@dataclass(frozen=True)
class PruneConfig:
    """What decides what pruning produces, except the teacher, the data and, with cost "milliseconds", the machine.

    The three weights are of the terms of Kim et al. 2023, arXiv:2305.15798, eq. 1 to 4, who have 1 everywhere.
    """

    training: StageConfig
    speedup: float = 1.5  # of the U-Net, at which no more is removed
    cost: str = (
        "milliseconds"  # measured on this machine in torch, block off against on; or "flops", which any can count
    )
    # Never removed. What a U-Net remembers lies in its innermost level; the error of the prediction does not see it go.
    keep: tuple[str, ...] = ("innermost",)
    points: int = 64  # of sampling trajectories, on which the error of what is left is measured
    task_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    caption_dropout: float = 0.1
    seed: int = 0
    autocast_bf16: bool = True

    def __post_init__(self) -> None:
        self.training.check("training")
        if self.training.resolutions or self.training.grow_at:
            raise ConfigError("training.resolutions and training.grow_at are not for pruning; leave them out")
        if not 1 < self.speedup < math.inf:
            raise ConfigError(f"speedup is {self.speedup}; give more than 1")
        if self.cost not in COSTS:
            raise ConfigError(f"cost is {self.cost!r}; allowed: {', '.join(COSTS)}")
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


# (steps, batch, learning rate), as in `decoder_config`. "sd1" follows Kim et al. 2023, section 4.1.
PRESETS: dict[str, PruneConfig] = {
    "cpu":  PruneConfig(StageConfig(10000,  32, 5.0e-4)),
    "gpu":  PruneConfig(StageConfig( 5000, 256, 1.0e-3, checkpoint_every=500), speedup=1.8),
    "sd1":  PruneConfig(StageConfig(50000, 256, 5.0e-5, gradient_checkpointing=True, checkpoint_every=500)),
    "tiny": PruneConfig(StageConfig(    4,   2, 1.0e-3, checkpoint_every=2), cost="flops", points=8,
                        autocast_bf16=False),
}  # fmt: skip


def load_prune_config(source: str | Path) -> PruneConfig:
    """A preset by its name, or a TOML file; in the file `preset` names what it starts from ("cpu" if absent).

    Raises `ConfigError` as `ldm_deploy.config.load_config` does.
    """
    found: PruneConfig = read_preset(source, PRESETS, "cpu")
    return found
