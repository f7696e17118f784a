"""Where U-Nets are compared: inputs along the teacher's own sampling trajectories, and the error of what is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_deploy.models.reference import Reference
from ldm_deploy.models.torch_engine import torch_pipeline

STEPS = 10  # of a trajectory, of a model that is not made for few

Inputs = tuple[Tensor, ...]  # of a U-Net, in the order of its signature


class _Listener:
    """A U-Net's engine that keeps what it is given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.feeds: list[Mapping[str, np.ndarray]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.feeds.append({name: value.copy() for name, value in feeds.items()})
        found: dict[str, np.ndarray] = self.engine.run(feeds)
        return found


def trajectory_points(teacher: Reference, count: int, seed: int) -> Inputs:
    """`count` inputs of the U-Net, drawn from what the teacher's own sampler asks it for its calibration prompts.

    A student of few steps is asked in each number of steps that it is made for.
    """
    pipeline = torch_pipeline(teacher)
    listener = _Listener(pipeline.components["unet"])
    pipeline = pipeline.with_engines({"unet": listener})
    prompts = teacher.model.get("prompts", {}).get("calibration") or [""]
    for steps in teacher.model.get("distilled", {}).get("steps", [STEPS]):
        pipeline.sample_latents(list(prompts), seed, steps=steps)
    names = teacher.signatures["unet"][0]
    rows = [np.concatenate([feeds[name] for feeds in listener.feeds]) for name in names]
    chosen = np.random.default_rng(seed).permutation(len(rows[0]))[:count]
    return tuple(torch.from_numpy(values[chosen]) for values in rows)


@torch.no_grad()
def prediction_error(unet: nn.Module, inputs: Inputs, wanted: Tensor) -> float:
    """Squared error of the prediction over the square of what is wanted: 0 is perfect, 1 is as bad as predicting 0."""
    return float((unet(*inputs) - wanted).square().mean() / wanted.square().mean())
