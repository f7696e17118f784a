"""How a small decoder is distilled: a frozen dataclass and its presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_deploy.config import StageConfig, read_preset
from ldm_deploy.errors import ConfigError

ERRORS = ("l1+mse", "log-mse")


@dataclass(frozen=True)
class DecoderConfig:
    """What decides what the distillation of a decoder produces, except the teacher and the data.

    A weight of 0 leaves its term out.
    """

    training: StageConfig
    widths: tuple[int, ...] = (64, 32)  # channels per level from the latent's resolution up; see SmallDecoder
    blocks: tuple[int, ...] = (2, 2)  # residual blocks per level
    encoder: bool = False  # distil a small encoder of the same widths, too
    latent_noise: float = 0.1  # most noise that is added to a latent, in standard deviations of latents
    error: str = "l1+mse"  # absolute plus squared, or "log-mse": the logarithm of each image's squared error
    teacher_weight: float = 1.0  # of the errors against the teacher's decodes; 0: it is not asked for any
    image_weight: float = 1.0  # of the errors against the image that was encoded
    perceptual_weight: float = 0.1  # of the perceptual distance, to the teacher's decodes if it is asked for them
    perceptual_backbone: str = "squeeze"  # or alex, vgg
    gan_weight: float = 0.0
    disc_start: int = 0  # step
    disc_layers: int = 3
    disc_channels: int = 32
    photo_fraction: float = 0.25  # of a batch: crops of the free photographs beside the given images
    seed: int = 0
    autocast_bf16: bool = True

    def __post_init__(self) -> None:
        self.training.check("training")
        if self.training.resolutions or self.training.grow_at:
            raise ConfigError("training.resolutions and training.grow_at are not for a decoder; leave them out")
        if len(self.blocks) != len(self.widths) or not self.widths or min(self.widths) < 1 or min(self.blocks) < 0:
            raise ConfigError(
                f"widths is {list(self.widths)} and blocks {list(self.blocks)}; "
                "give both for each level: widths of 1 or more, blocks of 0 or more"
            )
        weights = ("teacher_weight", "image_weight", "perceptual_weight", "gan_weight")
        for name in ("latent_noise", *weights, "disc_start"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 0 or more")
        if not (self.teacher_weight or self.image_weight):
            raise ConfigError(
                "teacher_weight and image_weight are 0, so that there is nothing to draw; give one of them"
            )
        if self.error not in ERRORS:
            raise ConfigError(f"error is {self.error!r}; allowed: {', '.join(ERRORS)}")
        for name in ("disc_layers", "disc_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 <= self.photo_fraction <= 1:
            raise ConfigError(f"photo_fraction is {self.photo_fraction}; allowed: 0 to 1")
        if self.perceptual_backbone not in ("squeeze", "alex", "vgg"):
            raise ConfigError(f"perceptual_backbone is {self.perceptual_backbone!r}; allowed: squeeze, alex, vgg")

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


# (steps, batch, learning rate). The shipped reference: hours on two cores, minutes on one large GPU. "sd1": a decoder
# that enlarges eight times, as that of Stable Diffusion 1.x, on a node of GPUs.
PRESETS: dict[str, DecoderConfig] = {
    "cpu":  DecoderConfig(StageConfig(12000,  16, 2.0e-3, preview_every=1000), (48, 32), (2, 3), error="log-mse",
                          latent_noise=0.05, teacher_weight=0.0, perceptual_weight=3.0),
    "gpu":  DecoderConfig(StageConfig(15000, 128, 2.0e-3, checkpoint_every=500), (48, 32), (2, 3), error="log-mse",
                          latent_noise=0.05, teacher_weight=0.0, perceptual_weight=3.0, autocast_bf16=False),
    "sd1":  DecoderConfig(StageConfig(50000,  64, 5.0e-4, preview_every=5000, checkpoint_every=1000),
                          (64, 64, 64), (3, 3, 3), perceptual_backbone="vgg", gan_weight=0.1, disc_start=10000),
    "tiny": DecoderConfig(StageConfig(    4,   2, 1.0e-3, checkpoint_every=2), (8, 8), (1, 1), perceptual_weight=0.0,
                          autocast_bf16=False),
}  # fmt: skip


def load_decoder_config(source: str | Path) -> DecoderConfig:
    """A preset by its name, or a TOML file; in the file `preset` names what it starts from ("cpu" if absent).

    Raises `ConfigError` as `ldm_deploy.config.load_config` does.
    """
    found: DecoderConfig = read_preset(source, PRESETS, "cpu")
    return found
