"""What `optimize` is going to do, and about how long it takes: the model's own speed, measured, times what will be run.

The factors are estimates from a few runs on two cores; nothing was fitted, and they may be off by several times.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_deploy.models.sources import load_source
from ldm_deploy.progress import duration

IMAGES = 48  # of the report's grid
CALIBRATION_ROWS = 760  # rows that trajectories put through the U-Net, see quantize/calibration.py
SAMPLES = 52  # of them that are kept and observed
STUDY_IMAGES, STUDY_STEPS = 4, 20  # see quantize/refine.py


@dataclass(frozen=True)
class Step:
    """One stage. `seconds`: an estimate."""

    stage: str
    what: str
    seconds: float


@dataclass(frozen=True)
class Unit:
    """How fast the model is in torch on this machine: seconds for one row through U-Net and decoder."""

    unet_s: float
    decoder_s: float
    parameters: int
    layers: Mapping[str, int]  # component -> convolutions and linear layers
    steps: int
    components: int


def measure_unit(source: str | Path, threads: int | None = None) -> Unit:
    """Load the model in torch and draw with it for a moment."""
    from torch import nn

    from ldm_deploy.models.torch_engine import torch_pipeline

    model = load_source(source)
    pipeline = torch_pipeline(model, threads)
    latents = pipeline.sample_latents("", steps=1)  # warm-up

    def taken(call: Any) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    rows = 1 if pipeline.guidance_scale == 1 else 2
    one, four = (taken(lambda steps=steps: pipeline.sample_latents("", steps=steps)) for steps in (1, 4))
    pipeline.decode(latents)
    modules = model.components()
    layers = {
        name: sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in module.modules())
        for name, module in modules.items()
    }
    parameters = sum(weight.numel() for module in modules.values() for weight in module.parameters())
    return Unit(
        max(four - one, 0.0) / 3 / rows, taken(lambda: pipeline.decode(latents)), parameters, layers,
        pipeline.steps, len(modules),
    )  # fmt: skip


def plan(unit: Unit, targets: Mapping[str, Sequence[str]], *, builds: int = 0) -> list[Step]:
    """`targets`: target -> precisions that are exported for it; `builds`: of the search, per component and target."""
    million = unit.parameters / 1e6
    engines = unit.components * sum(len(precisions) for precisions in targets.values())
    steps = [
        Step("export", f"{engines} engines, each compared with torch", 10 + engines * (4 + 0.1 * million)),
        Step("calibrate", f"{CALIBRATION_ROWS} rows of sampler trajectories", 2 + CALIBRATION_ROWS * unit.unet_s),
    ]
    trial = 2 + 0.05 * million + STUDY_IMAGES * (2 * STUDY_STEPS * unit.unet_s + unit.decoder_s)
    for target in targets:
        passes = 4 if target == "onnxruntime-cpu" else 6
        observed = passes * SAMPLES * (unit.unet_s + unit.decoder_s)
        layers = sum(unit.layers.get(name, 0) for name in ("unet", "vae_decoder"))
        compiled = 2.0 * layers if target == "openvino-cpu" else 0.0  # to find those that stay in float
        steps.append(
            Step(
                f"quantize {target}",
                "U-Net, decoder and encoder, each recipe built, compared and timed",
                60 + observed + million + compiled,
            )
        )
        if builds:
            steps.append(Step(f"study {target}", f"about {layers} layers, each quantized alone", layers * trial))
            steps.append(Step(f"search {target}", f"at most {builds} builds per component", 2 * builds * (trial + 8)))
    variants = 1 + sum(len(precisions) + 1 for precisions in targets.values())
    image_s = 2 * unit.steps * unit.unet_s + unit.decoder_s
    steps.append(
        Step(
            "evaluate",
            f"{IMAGES} images from each of up to {variants} variants",
            30 + variants * (IMAGES + 20) * image_s,
        )
    )
    return steps


def print_plan(steps: Sequence[Step]) -> dict[str, Any]:
    """Print one line per stage and the sum; returns them as data."""
    for step in steps:
        print(f"{step.stage:28} about {duration(step.seconds):>12}  {step.what}")
    total = sum(step.seconds for step in steps)
    print(f"{'in all':28} about {duration(total):>12}  (a rough estimate; a stage that is there is reused)")
    return {"format": 1, "steps": [asdict(step) for step in steps], "seconds": total}
