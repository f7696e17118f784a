"""How a U-Net is prepared for INT8: a frozen dataclass and its presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm_deploy.config import StageConfig, read_preset
from ldm_deploy.errors import ConfigError
from ldm_deploy.training.imitation_config import ImitationConfig
from ldm_deploy.training.simulated import LAYERS


@dataclass(frozen=True)
class Int8Config(ImitationConfig):
    """What decides the result, except the teacher and the data."""

    task_weight: float = 0.0
    autocast_bf16: bool = False  # the rounding is that of fp32
    layers: tuple[str, ...] = ("conv", "linear")
    keep: tuple[str, ...] = ()  # names of layers, or of parts with all their layers, that stay in float

    def __post_init__(self) -> None:
        self.check("INT8")
        unknown = [name for name in self.layers if name not in LAYERS]
        if unknown or not self.layers:
            raise ConfigError(f"layers is {list(self.layers)}; allowed: one or more of {', '.join(LAYERS)}")


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
