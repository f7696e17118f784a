"""Final images with one component's engine replaced: what quantization costs is seen there, not in a layer's output."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.eval.machine import usable_threads
from ldm_deploy.eval.metrics import bootstrap_ci, psnr_db_each
from ldm_deploy.eval.parity import Runnable
from ldm_deploy.quantize.calibration import PROMPTS, CalibrationSet
from ldm_deploy.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from ldm_deploy.runtime.bundle import Bundle

PEAK = 255.0
SEEDS = (0, 1)  # with which every prompt is drawn


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


@dataclass(frozen=True)
class Studio:
    """What a node needs to draw as `Drawing` does: it opens the variant of the bundle itself. Hashable."""

    bundle: Path
    variant: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    threads: int  # of an engine

    def open(self) -> Drawing:
        from ldm_deploy.runtime.pipeline import load

        pipeline = load(self.bundle, variant=self.variant, threads=self.threads)
        return Drawing(pipeline, self.prompts, self.seeds, self.steps)


def studio_of(
    bundle: Bundle, target: str, data: CalibrationSet, threads: int | None, *, prompts: int, steps: int | None = None
) -> Studio:
    """What the fp32 variant of a target draws, with `steps` at most (None: its own).

    Prompts are the first of calibration's: those of the report are not to be tuned for.
    """
    variant = f"fp32-{target}"
    own = int(next(one["steps"] for one in bundle.data["variants"] if one["name"] == variant))
    chosen = tuple(data.details.get("prompts") or PROMPTS)[:prompts]
    return Studio(bundle.root.resolve(), variant, chosen, SEEDS, min(steps or own, own), threads or usable_threads())


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
