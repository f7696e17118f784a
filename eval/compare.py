"""Every variant of a bundle against the fp32 torch reference: same prompts, same seeds, in interleaved rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import ArtifactError, EvaluationError
from ldm_deploy.eval.budget import Budget, load_budget
from ldm_deploy.eval.choose import choose, judge_variant
from ldm_deploy.eval.grid import Grid, load_grid
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.machine import conditions, machine, usable_threads
from ldm_deploy.eval.measure import BASELINE, Measured, component_plan, measure
from ldm_deploy.eval.reconstruction import open_originals, reconstruct_all
from ldm_deploy.eval.regression import Stored, add_regression, check_comparable
from ldm_deploy.eval.rows import add_comparisons, add_quality, add_refused, baseline_row, variant_row
from ldm_deploy.eval.studies import read_studies

PROTOCOL = {
    "batch": 1,
    "latency": "one worker process per variant, one active at a time, spinning off; after warm-up every image of the "
    "grid is one sample, drawn by all in random order",
    "peak_memory": "largest resident set of the worker's own process after loading and drawing",
    "cold_start": "a fresh process, files in the page cache: interpreter, imports, opening the engines, first image",
    "throughput": "rows or images of one call per second; the U-Net has two rows per guided image",
}

Record = dict[str, Any]


class Evaluation(dict[str, Any]):
    """The content of report.json. What else report.html shows stays beside it.

    `images[name]` uint8 (n, H, W, 3) in the order of `grid`, which is None where nothing is drawn; `studies`: see
    `studies.read_studies`.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        images: Mapping[str, np.ndarray],
        grid: Grid | None,
        studies: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(content)
        self.images = dict(images)
        self.grid = grid
        self.studies = dict(studies or {})


def evaluate_bundle(
    bundle: Path,
    *,
    reference: Path | None = None,
    budget: Budget | None = None,
    threads: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    timeout_s: float = 600.0,
    images: Path | str | None = None,
    against: Stored | None = None,
) -> Evaluation:
    """Measure and judge every variant of a bundle directory; returns the content of report.json. A bundle of one
    component is judged as in `single.py`.

    `reference`: the directory of the fp32 model (the shipped one if it is the bundle's parent and none is given).
    `seed` decides the order of the rounds and the bootstrap, not the images. `steps` overrides what the variants ask.
    `images`: of the user's own, for every autoencoder to reconstruct (see `open_originals`). `against`: an earlier
    result, which the gates of `regression.py` compare this one with. What fails is a row with its reason. Raises
    `BundleError` for a bundle and `ArtifactError` for a given reference that cannot be read, `DataError` for images,
    and `EvaluationError` for a stored result that does not compare.
    """
    from ldm_deploy.runtime.bundle import read_bundle

    started = datetime.now(UTC)
    data = read_bundle(bundle).data
    if data["model"] is None:
        if any(given is not None for given in (reference, images, against)):
            raise EvaluationError(
                f"bundle {bundle} holds a component and draws nothing; --reference, --data and --against are for a "
                "whole model: leave them out"
            )
        from ldm_deploy.eval.single import evaluate_single

        return evaluate_single(bundle, budget=budget, threads=threads, seed=seed, timeout_s=timeout_s)
    studies = read_studies(bundle)
    grid = load_grid(prompts or data["model"].get("prompts", {}).get("report"), seeds)
    threads = threads or usable_threads()
    before, now = machine(threads), conditions()
    source, no_baseline = find_reference(data.get("parents", {}).get("reference"), reference)
    originals = None if images is None else open_originals(images, data["model"])
    sampling = sampling_of(data, source)
    parent = {"name": data.get("name"), "digest": data.get("parents", {}).get("reference")}
    protocol = {
        "prompts_sha256": grid.prompts_sha256,
        "prompts": list(grid.prompts),
        "seeds": list(grid.seeds),
        **sampling,
        "steps": steps or sampling["steps"],
        "size": list(data["model"]["default_size"]),
        "threads": threads,
        "order_seed": seed,
        **PROTOCOL,
    }
    if against is not None:
        check_comparable(against, parent, protocol)
    specs: dict[str, Record] = {}
    if source is not None:
        specs[BASELINE] = {"kind": "reference", "path": str(source)}
    for variant in data["variants"]:
        specs[variant["name"]] = {"kind": "variant", "bundle": str(bundle), "variant": variant["name"]}
    plan = component_plan(data, bundle)
    found = measure(specs, grid, plan, threads=threads, seed=seed, steps=steps, timeout_s=timeout_s)
    after = conditions()
    budget = budget or load_budget(None)
    judged = judge(data, bundle, found, grid, budget, baseline_row(source, no_baseline, found), seed)
    if originals is not None:
        rebuilt = reconstruct_all(bundle, data, source, originals, threads=threads, seed=seed)
        for row in (judged["baseline"], *judged["variants"]):
            row["reconstruction"] = rebuilt.get(row["name"])
    content = {
        "format": 1,
        "created": started.isoformat(timespec="seconds"),
        "duration_s": round((datetime.now(UTC) - started).total_seconds(), 1),
        "source": parent,
        "protocol": protocol,
        "machine": {
            **before,
            "load_average_after": after["load_average"],
            "conditions": {"before": now, "after": after},
            "processors": found.processors,
        },
        "default_variant": data.get("default_variant"),
        **judged,
    }
    if against is not None:
        add_regression(content, against, budget, seed)
    return Evaluation(content, found.images, grid, studies)


def judge(
    data: Mapping[str, Any], root: Path, found: Measured, grid: Grid, budget: Budget, baseline: Record, seed: int = 0
) -> Record:
    """From measurements to report.json's `baseline`, `variants`, `chosen` and `why`. `data`: bundle.json in `root`."""
    rows = [variant_row(data, root, variant, found, seed) for variant in data["variants"]]
    lpips: dict[str, Lpips] = {}
    for row in rows:
        backbone = budget.limits_for(row["name"]).lpips_backbone
        if backbone not in lpips:
            lpips[backbone] = Lpips(backbone)
        add_quality(row, found, grid, lpips[backbone], seed)
        add_comparisons(row, rows, found, seed)
    rows = add_refused(rows, data.get("refused", []))
    for row in rows:
        judge_variant(row, baseline, budget)
    chosen, why = choose(rows, baseline)
    return {
        "budget": {"path": budget.path, "digest": budget.digest},
        "baseline": baseline,
        "variants": rows,
        "chosen": chosen,
        "why": why,
    }


def find_reference(wanted: str | None, given: Path | None) -> tuple[Path | None, str | None]:
    """(directory of the fp32 model with the digest `wanted`, None), or (None, why there is no baseline)."""
    from ldm_deploy.models.sources import resolve_source, source_digest

    try:
        path = resolve_source("reference" if given is None else given)
        digest = source_digest(path)
    except ArtifactError as error:
        if given is not None:
            raise
        return None, f"the reference {wanted} is not here ({error}); give its directory with --reference"
    if wanted is not None and digest != wanted:
        whose = "the shipped reference" if given is None else f"the reference {path}"
        return None, f"the bundle was made from {wanted}, {whose} is {digest}; give the right one with --reference"
    return path, None


def sampling_of(data: Mapping[str, Any], source: Path | None) -> Record:
    """sampler, steps and guidance_scale of the baseline; without one, of the bundle's default variant."""
    keys = ("sampler", "steps", "guidance_scale")
    if source is not None:
        from ldm_deploy.models.sources import read_sampling

        return {key: read_sampling(source).get(key) for key in keys}
    variants: dict[str, Record] = {variant["name"]: variant for variant in data["variants"]}
    default = variants.get(data.get("default_variant") or "") or next(iter(variants.values()), {})
    return {key: default.get(key) for key in keys}
