"""Final images with one component's engine replaced: what quantization costs is seen there, not in a layer's output."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_deploy.eval.metrics import bootstrap_ci, psnr_db_each
from ldm_deploy.eval.parity import Runnable
from ldm_deploy.runtime.pipeline import Pipeline

PEAK = 255.0


@dataclass(frozen=True)
class Drawing:
    """Draws the same images again and again: every prompt with every seed, the whole trajectory, as one batch."""

    pipeline: Pipeline
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int | None = None  # None: the pipeline's own

    def images(self, component: str, engine: Runnable) -> np.ndarray:
        """uint8 (n, H, W, 3): all seeds of the first prompt, then of the second."""
        pipeline = self.pipeline.with_engines({component: engine})
        if component == "vae_decoder":
            return pipeline.decode(self._latents)  # which do not depend on it
        prompts, seeds = self._pairs()
        return pipeline(prompts, seed=seeds, steps=self.steps)

    @functools.cached_property
    def _latents(self) -> np.ndarray:
        prompts, seeds = self._pairs()
        return self.pipeline.sample_latents(prompts, seed=seeds, steps=self.steps)

    def _pairs(self) -> tuple[list[str], list[int]]:
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        return [prompt for prompt, _ in pairs], [seed for _, seed in pairs]

    def protocol(self) -> dict[str, Any]:
        """As the studies in a bundle describe it."""
        return {
            "sampler": self.pipeline.sampler,
            "steps": self.steps or self.pipeline.steps,
            "guidance_scale": float(self.pipeline.guidance_scale),
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
        }


def image_quality(reference: np.ndarray, candidate: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """PSNR in dB of uint8 images, as a study has it: mean, worst, ci95, n."""
    return figure(psnr_db_each(reference, candidate, peak=PEAK), seed=seed)


def figure(values_db: Sequence[float] | np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Mean, worst, 95 % interval and number of values in dB."""
    values = np.asarray(values_db, np.float64)
    interval = bootstrap_ci(values, seed=seed)
    return {
        "mean": float(values.mean()),
        "worst": float(values.min()),
        "ci95": None if interval is None else [float(end) for end in interval],
        "n": len(values),
    }
