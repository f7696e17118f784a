"""What is drawn, each prompt with the same seeds: by every variant, and to score a reference."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

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
    """The 24 shipped prompts of a report; `prompts` and `seeds` replace them."""
    shipped = _shipped()
    return Grid(
        tuple(_listed(shipped["prompts"]) if prompts is None else prompts),
        tuple(shipped["seeds"] if seeds is None else seeds),
    )


def retrieval_grid() -> Grid:
    """The 50 shipped prompts that a reference is scored on, those of the reports among them."""
    shipped = _shipped()
    return Grid((*_listed(shipped["prompts"]), *_listed(shipped["retrieval"])), tuple(shipped["seeds"]))


def _shipped() -> dict[str, Any]:
    return tomllib.loads((resources.files("ldm_deploy.eval") / "prompts.toml").read_text(encoding="utf-8"))


def _listed(groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [prompt for group in groups.values() for prompt in group]
