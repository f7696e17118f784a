"""The configuration of a reference model and its training: frozen dataclasses, presets, TOML in, JSON out."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm_deploy.diffusion.objective import TIMESTEP_SAMPLINGS
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import ConfigError

LAYOUTS = ("compact", "sd1")  # see ldm_deploy.models.layers
CONDITIONINGS = ("captions", "labels", "none")


@dataclass(frozen=True)
class AutoencoderConfig:
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 8)
    num_res_blocks: int = 2
    z_channels: int = 4
    norm_groups: int = 32  # 0: 16 channels per group
    layout: str = "sd1"
    kind: str = "kl"  # or "vq": a codebook instead of a Gaussian
    codebook_size: int = 8192  # of kind "vq"
    dropout: float = 0.0  # share of each residual block's activations that a training step leaves out

    @property
    def channels(self) -> tuple[int, ...]:
        """Width of each level, from the image's resolution down."""
        return tuple(self.ch * factor for factor in self.ch_mult)

    @property
    def downsampling(self) -> int:
        return int(2 ** (len(self.ch_mult) - 1))


@dataclass(frozen=True)
class TextEncoderConfig:
    vocab_size: int = 2048
    context_length: int = 16
    width: int = 128
    layers: int = 3
    head_channels: int = 32
    pretrained: str = ""  # directory of a CLIP text model of transformers, used as it is instead of one of our own


@dataclass(frozen=True)
class UNetConfig:
    channels: tuple[int, ...] = (64, 96, 128)
    num_res_blocks: int = 1
    attention_levels: tuple[int, ...] = (1, 2)
    num_heads: tuple[int, ...] = (2, 3, 4)
    norm_groups: int = 0
    layout: str = "compact"


@dataclass(frozen=True)
class StageConfig:
    """One training stage.

    Learning rate: linear warm-up, then a cosine to zero at `steps`; at each step of `restarts` the cosine has reached
    zero and starts again at the full rate. `accumulation`: parts into which a batch is cut, whose gradients are summed
    before the step; `gradient_checkpointing`: compute activations again instead of keeping them (Chen et al. 2016,
    arXiv:1604.06174). Both save memory, cost time and change no result. Images have `resolutions[i]` pixels before step
    `grow_at[i]`, and the configuration's after the last (Karras et al. 2018, arXiv:1710.10196, without their growth of
    layers).
    """

    steps: int
    batch_size: int  # of all processes together
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999  # of the averaged parameters, which are what is written
    clip_norm: float = 1.0  # of all gradients together
    checkpoint_every: int = 200  # steps
    preview_every: int = 0  # steps between two sample grids with held-out figures; 0: none
    restarts: tuple[int, ...] = ()
    accumulation: int = 1
    gradient_checkpointing: bool = False
    resolutions: tuple[int, ...] = ()
    grow_at: tuple[int, ...] = ()

    def resolution(self, step: int, final: int) -> int:
        """Height and width in pixels at `step`; `final` after the last growth."""
        return next((size for size, end in zip(self.resolutions, self.grow_at, strict=True) if step < end), final)

    def check(self, name: str) -> None:
        """Raises `ConfigError` in the words of the section `name`."""
        for key in ("steps", "batch_size", "checkpoint_every", "accumulation"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{name}.{key} is {getattr(self, key)}; give 1 or more")
        if self.accumulation > self.batch_size:
            raise ConfigError(
                f"{name}.accumulation is {self.accumulation}; "
                f"a batch of {self.batch_size} has no more parts than images"
            )
        bounds = (0, *self.restarts, self.steps)
        if any(later <= earlier for earlier, later in itertools.pairwise(bounds)):
            raise ConfigError(f"{name}.restarts is {list(bounds[1:-1])}; give rising steps between 0 and {bounds[-1]}")

    def check_growth(self, name: str, final: int, multiple: int) -> None:
        """Raises `ConfigError` in the words of the section `name`; `final` and `multiple` in pixels."""
        bounds = (0, *self.grow_at, self.steps)
        if any(later <= earlier for earlier, later in itertools.pairwise(bounds)):
            raise ConfigError(f"{name}.grow_at is {list(self.grow_at)}; give rising steps between 0 and {self.steps}")
        if len(self.resolutions) != len(self.grow_at):
            raise ConfigError(
                f"{name} has {len(self.resolutions)} resolutions and {len(self.grow_at)} steps in grow_at; "
                "give each resolution the step at which it ends"
            )
        if any(later <= earlier for earlier, later in itertools.pairwise((0, *self.resolutions, final))):
            raise ConfigError(f"{name}.resolutions is {list(self.resolutions)}; give rising ones below {final}")
        for size in self.resolutions:
            if size % multiple:
                raise ConfigError(f"{name}.resolutions has {size}; each must be a multiple of {multiple}")


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """What the autoencoder is trained for, beside absolute and squared error; a weight of 0 leaves the term out."""

    perceptual_weight: float = 0.0
    perceptual_backbone: str = "squeeze"  # or alex, vgg
    kl_weight: float = 3e-7  # per nat and image
    commitment_weight: float = 0.25
    codebook_averaged: bool = False  # entries follow the mean of their latents instead of a gradient
    restart_codes_after: int = 0  # steps without use; 0: never
    gan_weight: float = 0.0
    disc_start: int = 0  # step
    disc_layers: int = 3
    disc_channels: int = 64
    disc_norm: str = "group"  # or batch, none
    disc_spectral_norm: bool = False
    gradient_penalty: float = 0.0  # weight of R1


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the denoiser is asked; what the values mean and where they are from: `ldm_deploy.diffusion.objective`."""

    timestep_sampling: str = "uniform"
    min_snr_gamma: float = 0.0  # 0: every timestep's error counts alike
    offset_noise: float = 0.0


@dataclass(frozen=True)
class Config:
    """Everything that decides what a training run produces, except its data."""

    name: str
    autoencoder_training: StageConfig
    diffusion_training: StageConfig
    resolution: int = 64
    seed: int = 0
    autoencoder: AutoencoderConfig = field(default_factory=lambda: AutoencoderConfig(32, (1, 2, 3), 1, 4, 0, "compact"))
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: Schedule = field(default_factory=Schedule)
    autoencoder_loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    photo_fraction: float = 0.25  # of an autoencoder batch: crops of the free photographs beside the given images
    conditioning: str = "captions"  # or "labels": the name of a class; or "none"
    lora_rank: int = 0  # above 0: train adapters of the U-Net's attention, on given weights, instead of the whole
    caption_dropout: float = 0.1  # for guidance: Ho and Salimans 2022, arXiv:2207.12598
    autocast_bf16: bool = True

    @property
    def size_multiple(self) -> int:
        """Image heights and widths must be multiples of this (pixels)."""
        return int(self.autoencoder.downsampling * 2 ** (len(self.unet.channels) - 1))

    def __post_init__(self) -> None:
        for section, model in (("autoencoder", self.autoencoder), ("unet", self.unet)):
            widths = list(model.channels)
            if not widths or min(widths) < 1:
                raise ConfigError(f"{section}: the levels have {widths} channels; give 1 or more, for each level")
            if model.layout not in LAYOUTS:
                raise ConfigError(f"{section}.layout is {model.layout!r}; allowed: {', '.join(LAYOUTS)}")
            if model.norm_groups < 0 or any(width % (model.norm_groups or 1) for width in widths):
                raise ConfigError(
                    f"{section}: the levels have {widths} channels, and norm_groups is {model.norm_groups}; "
                    "each width must be a multiple of it (0: 16 channels per group)"
                )
        if self.resolution % self.size_multiple or self.resolution < self.size_multiple:
            raise ConfigError(
                f"resolution is {self.resolution}; it must be a multiple of {self.size_multiple} "
                f"(autoencoder {self.autoencoder.downsampling} x U-Net {2 ** (len(self.unet.channels) - 1)})"
            )
        levels = range(len(self.unet.channels))
        if len(self.unet.num_heads) != len(levels):
            raise ConfigError(
                f"unet.num_heads is {list(self.unet.num_heads)}; give one number for each of the {len(levels)} levels"
            )
        for level in self.unet.attention_levels:
            if level not in levels:
                raise ConfigError(f"unet.attention_levels names level {level}; the levels are {list(levels)}")
            if self.unet.num_heads[level] < 1 or self.unet.channels[level] % self.unet.num_heads[level]:
                raise ConfigError(
                    f"unet.channels[{level}] is {self.unet.channels[level]}, no multiple of num_heads[{level}] "
                    f"{self.unet.num_heads[level]}; change one of them"
                )
        if self.text_encoder.width % self.text_encoder.head_channels:
            raise ConfigError(
                f"text_encoder.width is {self.text_encoder.width}, no multiple of head_channels "
                f"{self.text_encoder.head_channels}; change one of them"
            )
        for where, value, allowed in (
            ("conditioning", self.conditioning, CONDITIONINGS),
            ("autoencoder.kind", self.autoencoder.kind, ("kl", "vq")),
            ("autoencoder_loss.disc_norm", self.autoencoder_loss.disc_norm, ("group", "batch", "none")),
            (
                "autoencoder_loss.perceptual_backbone",
                self.autoencoder_loss.perceptual_backbone,
                ("squeeze", "alex", "vgg"),
            ),
        ):
            if value not in allowed:
                raise ConfigError(f"{where} is {value!r}; allowed: {', '.join(allowed)}")
        for name, value in asdict(self.autoencoder_loss).items():
            least = 1 if name in ("disc_layers", "disc_channels") else 0
            if not isinstance(value, str) and not least <= value < math.inf:
                raise ConfigError(f"autoencoder_loss.{name} is {value}; give {least} or more")
        if self.autoencoder.codebook_size < 2:
            raise ConfigError(f"autoencoder.codebook_size is {self.autoencoder.codebook_size}; give 2 or more")
        if self.objective.timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise ConfigError(
                f"objective.timestep_sampling is {self.objective.timestep_sampling!r}; "
                f"allowed: {', '.join(TIMESTEP_SAMPLINGS)}"
            )
        for name in ("min_snr_gamma", "offset_noise"):
            if not 0 <= getattr(self.objective, name) < math.inf:
                raise ConfigError(f"objective.{name} is {getattr(self.objective, name)}; give 0 (off) or more")
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank is {self.lora_rank}; give 0 (train the whole) or more")
        if self.text_encoder.pretrained and self.conditioning != "captions":
            raise ConfigError(
                f"text_encoder.pretrained is {self.text_encoder.pretrained!r} and conditioning is "
                f"{self.conditioning!r}; a pretrained text encoder reads captions: change one of them"
            )
        if not 0 <= self.autoencoder.dropout < 1:
            raise ConfigError(f"autoencoder.dropout is {self.autoencoder.dropout}; allowed: 0 to below 1")
        for name in ("photo_fraction", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 0 to 1")
        for stage in ("autoencoder_training", "diffusion_training"):
            getattr(self, stage).check(stage)
        self.autoencoder_training.check_growth("autoencoder_training", self.resolution, self.autoencoder.downsampling)
        self.diffusion_training.check_growth("diffusion_training", self.resolution, self.size_multiple)

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


# stages: (steps, batch, learning rate) of the autoencoder, then of diffusion; models where they differ from the default
PRESETS: dict[str, Config] = {
    "reference": Config("reference", StageConfig(6400, 16, 2.0e-3), StageConfig(20000, 32, 1.0e-3),
                        autoencoder=AutoencoderConfig(32, (1, 2, 3), 1, 6, 8, "sd1"),
                        unet=UNetConfig((64, 80, 112), 1, (1, 2), (4, 5, 7), 16, "sd1")),
    "quick":     Config("quick",     StageConfig( 450, 16, 2.0e-3), StageConfig( 500, 16, 1.0e-3)),
    "tiny":      Config("tiny",      StageConfig(   4,  2, 1.0e-3), StageConfig(   4,  2, 1.0e-3), resolution=32,
                        autoencoder=AutoencoderConfig(8, (1, 1, 2), 1, 4, 0, "compact"),
                        unet=UNetConfig((16, 32), num_heads=(1, 2), attention_levels=(1,)),
                        text_encoder=TextEncoderConfig(512, 16, 32, 1, 16)),
}  # fmt: skip


def load_config(source: str | Path) -> Config:
    """A preset by its name, or a TOML file. In the file `preset` names what it starts from ("reference" if absent).

    Raises `ConfigError` for an unknown preset, a file that does not parse, an unknown key or a value out of range.
    """
    found: Config = read_preset(source, PRESETS, "reference")
    return found


def read_preset(source: str | Path, presets: Mapping[str, Any], default: str) -> Any:
    """One of `presets`, frozen dataclasses, by its name, or a TOML file that changes one (`default` if it names none).

    Raises `ConfigError` as `load_config`.
    """
    if str(source) in presets:
        return presets[str(source)]
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"configuration {str(source)!r} is no file and no preset; presets: {', '.join(presets)}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} is no valid TOML: {error}") from None
    preset = values.pop("preset", default)
    if preset not in presets:
        raise ConfigError(f"configuration {path}: preset is {preset!r}; allowed: {', '.join(presets)}")
    return _replace(presets[preset], values, f"configuration {path}")


def _replace(config: Any, values: dict[str, Any], where: str) -> Any:
    """A copy of a dataclass with nested values replaced; types must match what is there."""
    known = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    kinds = {entry.name: entry.type for entry in dataclasses.fields(config)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {name!r}{hint}")
        old = known[name]
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {name} is {value!r}; give a table [{name}]")
            changes[name] = _replace(old, value, f"{where}: [{name}]")
        elif isinstance(old, tuple):
            item_type, called = (str, "texts") if kinds[name] == "tuple[str, ...]" else (int, "integers")
            if not isinstance(value, list) or not all(type(item) is item_type for item in value):
                raise ConfigError(f"{where}: {name} is {value!r}; give a list of {called}")
            changes[name] = tuple(value)
        elif type(old) is float and type(value) in (int, float):
            changes[name] = float(value)
        elif type(value) is type(old):
            changes[name] = value
        else:
            kind = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[type(old)]
            raise ConfigError(f"{where}: {name} is {value!r}; give {kind}, as {old!r}")
    return dataclasses.replace(config, **changes)
