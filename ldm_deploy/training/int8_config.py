"""How a U-Net is prepared for INT8: a frozen dataclass and its presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_deploy.config import StageConfig, read_preset
from ldm_deploy.errors import ConfigError
from ldm_deploy.training.simulated import LAYERS


@dataclass(frozen=True)
class Int8Config:
    """What decides the result, except the teacher and the data; weights as in `prune_config.PruneConfig`."""

    training: StageConfig
    layers: tuple[str, ...] = ("conv", "linear")
    keep: tuple[str, ...] = ()  # names of layers, or of parts with all their layers, that stay in float
    points: int = 64  # of sampling trajectories: for the ranges of what layers read
    task_weight: float = 0.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    caption_dropout: float = 0.1
    seed: int = 0
    autocast_bf16: bool = False  # the rounding is that of fp32

    def __post_init__(self) -> None:
        self.training.check("training")
        if self.training.resolutions or self.training.grow_at:
            raise ConfigError("training.resolutions and training.grow_at are not for INT8; leave them out")
        unknown = [name for name in self.layers if name not in LAYERS]
        if unknown or not self.layers:
            raise ConfigError(f"layers is {list(self.layers)}; allowed: one or more of {', '.join(LAYERS)}")
        if self.points < 1:
            raise ConfigError(f"points is {self.points}; give 1 or more")
        for name in ("task_weight", "output_weight", "feature_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more")
        if not (self.task_weight or self.output_weight or self.feature_weight):
            raise ConfigError("task_weight, output_weight and feature_weight are all 0; there is nothing to learn")
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"caption_dropout is {self.caption_dropout}; allowed: 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


# (steps, batch, learning rate), as in `decoder_config`.
PRESETS: dict[str, Int8Config] = {
    "cpu":  Int8Config(StageConfig( 400,  32, 1.0e-4, warmup_steps=20, weight_decay=0.0, ema_decay=0.98)),
    "gpu":  Int8Config(StageConfig(2000, 256, 2.0e-4, weight_decay=0.0, ema_decay=0.995, checkpoint_every=500)),
    "sd1":  Int8Config(StageConfig(2000,  64, 5.0e-6, weight_decay=0.0, gradient_checkpointing=True,
                                   checkpoint_every=200)),
    "tiny": Int8Config(StageConfig(   4,   2, 1.0e-3, checkpoint_every=2), points=8),
}  # fmt: skip


def load_int8_config(source: str | Path) -> Int8Config:
    """A preset by its name, or a TOML file; in the file `preset` names what it starts from ("cpu" if absent).

    Raises `ConfigError` as `ldm_deploy.config.load_config` does.
    """
    found: Int8Config = read_preset(source, PRESETS, "cpu")
    return found
