"""What differs between runtimes when a component is quantized: one kit per runtime, with these methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm_deploy.eval.parity import Runnable
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.profile import NodeTimes, OpCost
from ldm_deploy.quantize.scheme import AnyRecipe

Spec = dict[str, Any]  # of a worker, see `eval.latency.Worker`
LARGE_BYTES = 2**30  # of the files of an fp32 engine


@dataclass(frozen=True)
class LayerInfo:
    """A layer that can be quantized by itself. `name` is unique in its graph."""

    name: str
    op: str


class Kit(Protocol):
    """Quantizes one fp32 file. `calibrate` comes first; all else may follow in any order."""

    model_path: Path  # the fp32 file
    runtime: str
    title: str  # of the runtime, for people
    suffix: str  # of the file that the runtime opens
    recipes: Mapping[str, AnyRecipe]  # from most to least INT8
    threads: int | None
    spares_milder: bool  # a milder recipe that errs too much, too, is the one that layers are spared of

    def calibrate(self, observed: Samples, held_out: Samples, folder: Path) -> None:
        """Observe activations on `observed`; choose on `held_out` what is not a matter of speed."""

    def settle(self, recipe: AnyRecipe) -> AnyRecipe:
        """The recipe with what `calibrate` chose."""

    def milder(self, recipe: AnyRecipe) -> AnyRecipe | None:
        """The same layers in INT8, and all else finer: what is tried first where a recipe errs too much."""

    def layers(self, recipe: AnyRecipe) -> list[LayerInfo]:
        """What the recipe brings to INT8, in the order of the graph."""

    def build(self, path: Path, recipe: AnyRecipe) -> None:
        """Write the engine to `path`. Raises `QuantizationError` if the recipe quantizes nothing."""

    def files(self, path: Path) -> list[Path]:
        """Everything `build` wrote, `path` first."""

    def open(self, path: Path, recipe: AnyRecipe, *, trial: bool = False) -> Runnable:
        """`trial`: it is asked a few times only, so nothing is prepared that pays off later."""

    def found(self, path: Path, engine: Runnable) -> dict[str, int]:
        """Convolutions and products per precision, read back from what the runtime runs. `engine`: what `open` gave."""

    def spec(self, path: Path, recipe: AnyRecipe) -> Spec: ...

    def siblings(self) -> dict[str, Spec]:
        """What an INT8 engine must not be slower than, fp32 first: `<precision>-<target>` -> spec."""

    def base(self, recipe: AnyRecipe) -> Spec:
        """The engine in which the recipe quantizes nothing: what one quantized layer is compared with."""

    def node_times(self, spec: Spec, feeds: Mapping[str, np.ndarray], runs: int) -> list[NodeTimes]:
        """Milliseconds of every kernel, one dict per run."""

    def open_spec(self, spec: Spec) -> Runnable: ...

    def profile(self, spec: Spec, feeds: Mapping[str, np.ndarray]) -> list[OpCost]:
        """Kernel time per op type."""


def is_large(kit: Kit) -> bool:
    """Whether an engine takes minutes to make and gigabytes to hold: less is tried then, and less held at once."""
    return sum(file.stat().st_size for file in kit.files(kit.model_path)) > LARGE_BYTES
