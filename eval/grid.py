"""What every variant draws: the 24 prompts of eval/prompts.toml, each with the same seeds."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from ldm_deploy.errors import EvaluationError


@dataclass(frozen=True)
class Grid:
    """Images in order: all seeds of the first prompt, then of the second."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompts or not self.seeds:
            raise EvaluationError("nothing to draw: give at least one prompt and one seed")

    @property
    def pairs(self) -> list[tuple[str, int]]:
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    @property
    def prompts_sha256(self) -> str:
        """Of the prompts in order, each ended by a newline, UTF-8."""
        return hashlib.sha256("".join(f"{prompt}\n" for prompt in self.prompts).encode()).hexdigest()


def load_grid(prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> Grid:
    """The shipped grid; `prompts` and `seeds` replace its parts."""
    text = (resources.files("ldm_deploy.eval") / "prompts.toml").read_text(encoding="utf-8")
    shipped = tomllib.loads(text)
    listed = [prompt for group in shipped["prompts"].values() for prompt in group]
    return Grid(
        tuple(listed if prompts is None else prompts),
        tuple(shipped["seeds"] if seeds is None else seeds),
    )
