"""How far compressed components lead the sampler astray, step by step: timestep_error.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.eval.metrics import psnr_db_of
from ldm_deploy.eval.parity import Runnable
from ldm_deploy.quantize.calibration import fitting_prompts
from ldm_deploy.quantize.drawing import figure

if TYPE_CHECKING:
    from ldm_deploy.runtime.bundle import Bundle
    from ldm_deploy.runtime.pipeline import Pipeline

PROMPTS, SEEDS, STEPS = 2, (0, 1), 20
DRAWN_WITH = ("text_encoder", "unet")  # what a latent depends on


class Recorder:
    """A U-Net that keeps its calls: [(feeds, prediction)]."""

    def __init__(self, engine: Runnable) -> None:
        self.engine = engine
        self.calls: list[tuple[dict[str, np.ndarray], np.ndarray]] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self.engine.run(feeds)
        self.calls.append(({name: np.array(value) for name, value in feeds.items()}, outputs["prediction"]))
        return outputs


def measure_timestep_error(
    bundle: Bundle, variants: Sequence[str], *, versus: str, seed: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """The content of timestep_error.json: `variants` of a bundle against its variant `versus`.

    One series per component that a latent depends on and that a variant has in another engine, and `all` where there
    are several. Predictions are compared on the reference's own latents; latents, after each has gone its own way.
    """
    from ldm_deploy.eval.grid import load_grid
    from ldm_deploy.progress import task
    from ldm_deploy.runtime.pipeline import load

    reference = load(bundle.root, variant=versus, threads=threads)
    grid = load_grid((bundle.data["model"].get("prompts") or {}).get("report"))
    prompts = fitting_prompts(reference, grid.prompts)[:PROMPTS]
    steps = min(STEPS, reference.steps)
    recorder = Recorder(reference.components["unet"])
    latents = _latents(reference.with_engines({"unet": recorder}), prompts, steps)
    series = []
    plan = [
        (component, variant, replaced)
        for variant in variants
        for component, replaced in _replacements(bundle, variant, versus).items()
    ]
    with task("error at every timestep", len(plan)) as advance:
        for component, variant, replaced in plan:
            other = load(bundle.root, variant=variant, threads=threads)
            engines = {name: other.components[name] for name in replaced}
            record = next(
                bundle.engines[name]
                for name in bundle.variants[variant].engines
                if bundle.engines[name].component == (component if component != "all" else "unet")
            )
            series.append(
                {
                    "component": component,
                    "engine": variant if component == "all" else record.id,
                    "precision": record.precision,
                    "runtime": record.runtime,
                    "device": record.device,
                    "versus": versus,
                    "steps": _compare(reference, engines, recorder, latents, prompts, steps, seed),
                }
            )
            advance()
    return {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": {
            "sampler": reference.sampler,
            "steps": steps,
            "guidance_scale": float(reference.guidance_scale),
            "prompts": prompts,
            "seeds": list(SEEDS),
        },
        "series": series,
    }


def write_study(name: str, content: Mapping[str, Any], folder: Path) -> Path:
    """Check a study against its schema and write `<name>.json` in `folder`."""
    from ldm_deploy.artifact import atomic_write_json
    from ldm_deploy.eval.studies import check_study

    path = folder / f"{name}.json"
    check_study(name, content, str(path))
    atomic_write_json(path, content)
    return path


def _replacements(bundle: Bundle, variant: str, versus: str) -> dict[str, list[str]]:
    """component (or "all") -> components that differ from `versus` in this series."""
    own, base = (
        {bundle.engines[name].component: name for name in bundle.variants[which].engines} for which in (variant, versus)
    )
    different = [name for name in DRAWN_WITH if name in own and own[name] != base.get(name)]
    series = {name: [name] for name in different}
    return series if len(different) < 2 else {**series, "all": different}


def _latents(pipeline: Pipeline, prompts: Sequence[str], steps: int) -> list[np.ndarray]:
    """The latents after every step: (prompts x seeds, z, h, w) each."""
    kept: list[np.ndarray] = []
    pairs = [(prompt, seed) for prompt in prompts for seed in SEEDS]
    pipeline.sample_latents(
        [prompt for prompt, _ in pairs], seed=[seed for _, seed in pairs], steps=steps,
        on_step=lambda index, timestep, latents: kept.append(np.array(latents)),
    )  # fmt: skip
    return kept


def _compare(
    reference: Pipeline,
    engines: Mapping[str, Runnable],
    recorder: Recorder,
    latents: Sequence[np.ndarray],
    prompts: Sequence[str],
    steps: int,
    seed: int,
) -> list[dict[str, Any]]:
    changed = reference.with_engines(dict(engines))
    own = _latents(changed, prompts, steps)
    states = None
    if "text_encoder" in engines:
        pairs = [prompt for prompt in prompts for _ in SEEDS]
        guided = len(recorder.calls[0][1]) == 2 * len(pairs)
        ids = reference.tokenizer.encode([*([""] * len(pairs) if guided else []), *pairs])
        states = engines["text_encoder"].run({"input_ids": ids})
    unet = changed.components["unet"]
    found = []
    for index, (feeds, prediction) in enumerate(recorder.calls):
        given = {**feeds, **states} if states is not None else feeds
        answer = unet.run(given)["prediction"]
        found.append(
            {
                "timestep": int(feeds["timestep"][0]),
                "prediction_psnr_db": figure(_psnr_rows(prediction, answer, len(latents[index])), seed=seed),
                "latent_psnr_db": figure(_psnr_rows(latents[index], own[index], len(latents[index])), seed=seed),
                "reason": None,
            }
        )
    return found


def _psnr_rows(reference: np.ndarray, candidate: np.ndarray, count: int) -> list[float]:
    """PSNR in dB per trajectory; with guidance both halves of the batch belong to it. Peak: the reference's range."""
    values = []
    for row in range(count):
        first, second = reference[row::count].astype(np.float64), candidate[row::count].astype(np.float64)
        peak = float(np.ptp(first)) or 1.0  # a constant has no range; only its equal is like it
        values.append(float(psnr_db_of(float(np.mean((first - second) ** 2)), peak=peak)))
    return values
