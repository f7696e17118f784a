"""How a U-Net is pruned and what it learns afterwards: a frozen dataclass and its presets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ldm_deploy.config import StageConfig, read_preset
from ldm_deploy.errors import ConfigError
from ldm_deploy.training.imitation_config import ImitationConfig

COSTS = ("milliseconds", "flops")


@dataclass(frozen=True)
class PruneConfig(ImitationConfig):
    """What decides what pruning produces, except the teacher, the data and, with cost "milliseconds", the machine."""

    speedup: float = 1.5  # of the U-Net, at which no more is removed
    cost: str = (
        "milliseconds"  # measured on this machine in torch, block off against on; or "flops", which any can count
    )
    # Never removed. What a U-Net remembers lies in its innermost level; the error of the prediction does not see it go.
    keep: tuple[str, ...] = ("innermost",)

    def __post_init__(self) -> None:
        self.check("pruning")
        if not 1 < self.speedup < math.inf:
            raise ConfigError(f"speedup is {self.speedup}; give more than 1")
        if self.cost not in COSTS:
            raise ConfigError(f"cost is {self.cost!r}; allowed: {', '.join(COSTS)}")


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
