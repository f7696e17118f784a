"""Which parts of a U-Net can go: by the quality that is lost for the time that is won, both measured.

Quality is the error of the prediction along sampling trajectories, relative to the teacher's prediction. Parts go one
by one, each the cheapest in quality per millisecond once those before it are gone, until what is left is fast enough.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ldm_deploy.errors import TrainingError
from ldm_deploy.models.unet import UNet
from ldm_deploy.progress import task
from ldm_deploy.training.points import Inputs, prediction_error
from ldm_deploy.training.teaching import count_flops

ROUNDS = 25  # interleaved passes per part


@dataclass(frozen=True)
class Removal:
    """One part, and how things stand when it is gone: `error` of the prediction, `speedup` of the U-Net."""

    name: str
    error: float
    saved: float  # milliseconds or FLOPs that its going saves, those before it being gone
    speedup: float


@dataclass(frozen=True)
class Choice:
    """`baseline`: milliseconds or FLOPs of the U-Net as it was."""

    cost: str
    baseline: float
    removals: tuple[Removal, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Choice:
        return cls(data["cost"], data["baseline"], tuple(Removal(**entry) for entry in data["removals"]))


def without(unet: UNet, *names: str) -> UNet:
    """A copy with these parts removed."""
    pruned = copy.deepcopy(unet)
    for name in names:
        pruned.remove(name)
    return pruned


@torch.no_grad()
def measure_ms(modules: Mapping[str, nn.Module], inputs: Inputs, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of a pass of each, one list entry per round; in every round each has its turn."""
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    found: dict[str, list[float]] = {name: [] for name in modules}
    for turn in range(rounds + 2):
        for name, module in modules.items():
            wait()
            start = time.perf_counter()
            module(*inputs)
            wait()
            if turn >= 2:  # the first two warm up
                found[name].append(1000 * (time.perf_counter() - start))
    return found


def costs(modules: Mapping[str, nn.Module], inputs: Inputs, cost: str) -> dict[str, float]:
    """Of a pass with one prompt: median milliseconds, or FLOPs."""
    one = tuple(value[:1] for value in inputs)
    if cost == "flops":
        return {name: float(count_flops(module, *one)) for name, module in modules.items()}
    return {name: statistics.median(times) for name, times in measure_ms(modules, one).items()}


def choose(
    unet: UNet,
    inputs: Inputs,
    wanted_speedup: float,
    cost: str,
    measure: Callable[[Mapping[str, nn.Module], Inputs, str], Mapping[str, float]] = costs,
    *,
    keep: Sequence[str] = (),
) -> Choice:
    """Remove parts, none of `keep`, until the U-Net is `wanted_speedup` times as fast. `measure`: what modules cost, by
    name.

    Raises `TrainingError` if it never is, with all that helps removed, and for a name in `keep` that no part has.
    """
    unknown = [name for name in keep if name not in (*unet.removable(), *unet.removed)]
    if unknown:
        raise TrainingError(f"keep has {unknown[0]!r}, which no part is called; parts: {', '.join(unet.removable())}")
    with torch.no_grad():
        wanted = unet(*inputs)
    removals: list[Removal] = []
    left, error = unet, 0.0
    with task("choosing what to remove", len(unet.removable())) as advance:
        while True:
            candidates = {name: without(left, name) for name in left.removable() if name not in keep}
            # What a part saves depends on what else is gone, and on the minute: measured again, side by side.
            found = measure({"whole": unet, "left": left, **candidates}, inputs, cost)
            saved = {name: found["left"] - found[name] for name in candidates if found[name] < found["left"]}
            if not saved:
                reached = found["whole"] / found["left"]
                raise TrainingError(
                    f"with everything removed that costs time the U-Net is {reached:.2f} times as fast, and speedup is "
                    f"{wanted_speedup:g}; lower speedup" + (f", or keep less than {', '.join(keep)}" if keep else "")
                )
            errors = {name: prediction_error(candidates[name], inputs, wanted) for name in saved}
            # Quality per time won; of parts whose loss is nothing, the one that wins most.
            prices = {name: (max(errors[name] - error, 0.0) / saved[name], -saved[name]) for name in saved}
            best = min(prices, key=prices.__getitem__)
            left, error = candidates[best], errors[best]
            removals.append(Removal(best, error, saved[best], found["whole"] / found[best]))
            advance(1)
            if removals[-1].speedup >= wanted_speedup:
                return Choice(cost, found["whole"], tuple(removals))
