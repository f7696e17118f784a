"""How a student of few steps is trained: a frozen dataclass and its presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_deploy.config import StageConfig, read_preset
from ldm_deploy.errors import ConfigError

METHODS = ("consistency", "progressive")
SNR_WEIGHTINGS = ("truncated", "snr+1")  # see `ldm_deploy.training.progressive`


@dataclass(frozen=True)
class StepsConfig:
    """`training.steps` are those of consistency distillation; of progressive distillation, those of each stage."""

    training: StageConfig
    method: str = "consistency"
    # Steps that the student draws in: of "consistency" each of these, of "progressive" the last one only.
    steps: tuple[int, ...] = (1, 2, 4, 8)
    # Steps of the teacher's sampler between pure noise and an image. A multiple of `steps`, so that every timestep the
    # student meets later is one that it was trained on.
    solver_steps: int = 40
    guidance_min: float = 2.0  # the student's guidance scale is drawn between these two; both 1: no guidance
    guidance_max: float = 8.0
    target_decay: float = 0.95  # of the average that the student is compared with; of consistency
    huber_c: float = 1e-3  # disagreement, in standard deviations of latents, below which the loss is a square
    snr_weighting: str = "truncated"  # of progressive
    lora_rank: int = 0  # above 0: train adapters of the attention and the guidance embedding only
    seed: int = 0
    autocast_bf16: bool = True

    @property
    def has_guidance(self) -> bool:
        return (self.guidance_min, self.guidance_max) != (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; allowed: {', '.join(METHODS)}")
        if self.snr_weighting not in SNR_WEIGHTINGS:
            raise ConfigError(f"snr_weighting is {self.snr_weighting!r}; allowed: {', '.join(SNR_WEIGHTINGS)}")
        if not self.steps or min(self.steps) < 1 or list(self.steps) != sorted(set(self.steps)):
            raise ConfigError(f"steps is {list(self.steps)}; give rising numbers of 1 or more, as [1, 2, 4, 8]")
        for count in self.steps:
            if self.solver_steps % count or self.solver_steps <= count:
                raise ConfigError(f"solver_steps is {self.solver_steps}; give a multiple of each of {list(self.steps)}")
        ratio = self.solver_steps // self.steps[-1]
        if self.method == "progressive" and ratio & (ratio - 1):
            raise ConfigError(
                f"solver_steps is {self.solver_steps}; halving must lead to {self.steps[-1]}, as from "
                f"{self.steps[-1] * 8} (method progressive)"
            )
        if self.has_guidance and not 0 <= self.guidance_min < self.guidance_max < float("inf"):
            raise ConfigError(
                f"guidance_min is {self.guidance_min} and guidance_max {self.guidance_max}; "
                "give two numbers of 0 or more, the smaller one first (1 and 1: no guidance)"
            )
        for name, value in (("target_decay", self.target_decay), ("training.ema_decay", self.training.ema_decay)):
            if not 0 <= value < 1:
                raise ConfigError(f"{name} is {value}; give 0 to below 1: at 1 the average never leaves its start")
        if self.huber_c < 0:
            raise ConfigError(f"huber_c is {self.huber_c}; give 0 or more")
        if self.lora_rank < 0 or (self.lora_rank and self.method == "progressive"):
            raise ConfigError(
                f"lora_rank is {self.lora_rank} and method {self.method!r}; give 0 (train the whole), or with "
                "'consistency' more"
            )
        for name in ("steps", "batch_size", "checkpoint_every", "accumulation"):
            if getattr(self.training, name) < 1:
                raise ConfigError(f"training.{name} is {getattr(self.training, name)}; give 1 or more")
        if self.training.accumulation > self.training.batch_size:
            raise ConfigError(
                f"training.accumulation is {self.training.accumulation}; a batch of {self.training.batch_size} has "
                "no more parts than images"
            )
        if self.training.resolutions or self.training.restarts:
            raise ConfigError("training.resolutions and training.restarts are not for a student; leave them out")

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}


def _stage(steps: int, batch_size: int, learning_rate: float, **others: Any) -> StageConfig:
    return StageConfig(steps, batch_size, learning_rate, **{"weight_decay": 0.0, **others})


# (steps, batch, learning rate), steps of each stage where there are several. The shipped reference: hours on two cores,
# minutes on one large GPU. "sd1": a model of the size of Stable Diffusion 1.x on a node of GPUs; its adapters: Luo et
# al. 2023, arXiv:2311.05556.
PRESETS: dict[str, StepsConfig] = {
    "cpu":      StepsConfig(_stage(10000,  32, 3.0e-4)),
    "gpu":      StepsConfig(_stage(18300, 256, 5.0e-4, checkpoint_every=700)),
    "sd1":      StepsConfig(_stage(10000, 256, 2.0e-5, gradient_checkpointing=True, checkpoint_every=500)),
    "sd1-lora": StepsConfig(_stage( 5000, 256, 1.0e-4, gradient_checkpointing=True, checkpoint_every=500),
                            lora_rank=64),
    "cpu-progressive": StepsConfig(_stage(2500, 32, 3.0e-4), "progressive", (4,), 32),
    "gpu-progressive": StepsConfig(_stage(2500, 512, 5.0e-4, checkpoint_every=500), "progressive", (4,), 32),
    "tiny":     StepsConfig(_stage(    4,   2, 1.0e-3, checkpoint_every=2), solver_steps=8, steps=(1, 2, 4),
                            autocast_bf16=False),
}  # fmt: skip


def load_steps_config(source: str | Path) -> StepsConfig:
    """A preset by its name, or a TOML file; in the file `preset` names what it starts from ("cpu" if absent).

    Raises `ConfigError` as `ldm_deploy.config.load_config` does.
    """
    found: StepsConfig = read_preset(source, PRESETS, "cpu")
    return found
