"""Trials of the quality gate for `gate_power.py`: a fault planted in the shipped reference's engines, or none.

A trial draws eight images with six steps and judges them as `ldm-deploy eval --against` does: figures per image against
the fp32 reference in torch, paired with the stored figures of the same variant, 99 % intervals, the tolerances of
eval/budgets.toml. `elsewhere` stands for another machine, on which `image_change_max` is not judged: 48 images, and the
U-Net's input is multiplied by 1 ± 1e-7, the rounding of another order of summation.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from planted_faults import scale_a_layer, shift_a_colour, swap_two_channels

from ldm_deploy.eval.budget import check_limits, load_budget
from ldm_deploy.eval.grid import Grid, load_grid
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.measure import BASELINE, Measured
from ldm_deploy.eval.regression import compare_rows
from ldm_deploy.eval.rows import add_quality, empty_row
from ldm_deploy.runtime.engines import Engine, OnnxRuntimeEngine
from ldm_deploy.runtime.pipeline import Pipeline, load

THREADS = 1
STEPS = 6
FAULTS = {
    "a scale off by 10 %": scale_a_layer,
    "two channels swapped": swap_two_channels,
    "half a grey level": shift_a_colour,
}
QUALITY = ("psnr_db_drop_max", "ssim_drop_max", "lpips_rise_max", "colour_change_max", "image_change_max")
FLOAT_NOISE = 1e-7


@dataclass
class Bench:
    """One variant of the shipped reference, and what it is compared with."""

    bundle: Path
    variant: str
    grid: Grid
    baseline: np.ndarray
    pipeline: Pipeline
    stored: dict[str, Any]

    def draw(self, pipeline: Pipeline) -> np.ndarray:
        prompts, seeds = (list(column) for column in zip(*self.grid.pairs, strict=True))
        parts = [
            pipeline(prompts[start : start + 8], seed=seeds[start : start + 8], steps=STEPS)
            for start in range(0, len(prompts), 8)
        ]
        return np.concatenate(parts)

    def row(self, images: np.ndarray) -> dict[str, Any]:
        """The variant's row of report.json, as far as images go."""
        found = Measured()
        found.images = {BASELINE: self.baseline, self.variant: images}
        row = empty_row(self.variant, "onnxruntime", "cpu", self.variant.partition("-")[0])
        add_quality(row, found, self.grid, Lpips(), seed=0)
        return row


class Jittered:
    """An engine whose input has the noise of another order of summation."""

    def __init__(self, engine: Engine, rng: np.random.Generator) -> None:
        self.engine, self.rng = engine, rng

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        sample = feeds["sample"]
        noise = 1 + FLOAT_NOISE * self.rng.standard_normal(sample.shape)
        return self.engine.run({**feeds, "sample": (sample * noise).astype(np.float32)})


@functools.cache
def bench(folder: Path, variant: str, images: int) -> Bench:
    """Made by the first trial: the bundle in `folder` takes some minutes, the rest seconds."""
    from ldm_deploy.export.export import export_source
    from ldm_deploy.models.sources import load_source, resolve_source
    from ldm_deploy.models.torch_engine import torch_pipeline
    from ldm_deploy.quantize.quantize import quantize_bundle

    folder.mkdir(parents=True, exist_ok=True)
    bundle = folder / "quality"
    if not (bundle / "bundle.json").is_file():
        with tempfile.TemporaryDirectory(dir=folder) as exported:
            plain = Path(exported, "plain")
            export_source("reference", plain, variants=[("fp32", "onnxruntime-cpu")], threads=THREADS)
            quantize_bundle(plain, bundle, budget=load_budget(), threads=THREADS)
    whole = load_grid()
    grid = whole if images == len(whole.pairs) else Grid(whole.prompts[:: len(whole.prompts) // images], (0,))
    made = Bench(bundle, variant, grid, np.empty(0), load(bundle, variant=variant, threads=THREADS, spinning=False), {})
    made.baseline = made.draw(torch_pipeline(load_source(resolve_source("reference")), THREADS))
    made.stored = made.row(made.draw(made.pipeline))
    return made


def judge_quality(
    folder: Path, variant: str, fault: str | None, seed: int, *, elsewhere: bool = False
) -> dict[str, Any]:
    """A trial: what the gates say of the variant with a fault planted, or with none on another number of threads."""
    import onnx

    made = bench(folder, variant, 48 if elsewhere else 8)
    rng = np.random.default_rng([seed, len(fault or ""), elsewhere])
    start = time.perf_counter()
    pipeline, where, what = made.pipeline, "", ""
    if fault is None:
        pipeline = load(made.bundle, variant=variant, threads=2, spinning=False)
    else:
        paths = {name: Path(engine.path) for name, engine in made.pipeline.components.items() if name != "vae_encoder"}
        models = {name: onnx.load(path) for name, path in paths.items()}
        where, what = FAULTS[fault](models, rng)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "planted.onnx")
            onnx.save(models[where], file)
            pipeline = pipeline.with_engines({where: OnnxRuntimeEngine(file, threads=THREADS, spinning=False)})
    if elsewhere:
        pipeline = pipeline.with_engines({"unet": Jittered(pipeline.components["unet"], rng)})
    row = made.row(made.draw(pipeline))
    conditions = {"same_machine": not elsewhere, "other_versions": {}}
    found = compare_rows(made.stored, row, conditions)
    gates = [gate for gate in check_limits(load_budget().tolerances_for(variant), found) if gate.name in QUALITY]
    counted = {gate.result for gate in gates if gate.required or gate.result == "fail"}
    return {
        "result": next(result for result in ("fail", "not measured", "pass") if result in counted),
        "seconds": time.perf_counter() - start,
        "component": where,
        "planted": what,
        "gates": {gate.name: gate.result for gate in gates},
        "values": {gate.name: gate.value for gate in gates},
    }
