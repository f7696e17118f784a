"""The whole road: a reference goes in, a bundle with the fastest variant that keeps the budget comes out.

Beside `cli` this is the one module of the core that knows the stages.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_deploy.artifact import (
    atomic_write_json,
    check_replaceable,
    content_key,
    file_digest,
    staged_directory,
)
from ldm_deploy.cache import made_with, user_cache
from ldm_deploy.errors import StageMissingError
from ldm_deploy.progress import note

# What is tried for a target, beside what quantization makes of it.
PRECISIONS = {"onnxruntime-cpu": ("fp32",), "openvino-cpu": ("fp32", "bf16")}


def optimize(
    source: str | Path,
    out: Path,
    *,
    targets: Sequence[str] = ("onnxruntime-cpu",),
    budget: Path | None = None,
    builds: int = 0,
    ray: str | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> dict[str, Any]:
    """Export, quantize, evaluate and bundle `source` (see `models.sources`) for `targets`; returns the report.

    `builds`: of the mixed-precision search, per component and target; 0 leaves it out. `ray`: address
    of a cluster that draws for it.
    Stages are kept in `<out>.stages/` under the digest of everything that went in, so that the same command, started
    again after it was killed, goes on where it stopped. `out` appears, or is replaced, only when it is complete.
    """
    from ldm_deploy.eval.budget import load_budget
    from ldm_deploy.eval.compare import evaluate_bundle
    from ldm_deploy.eval.lpips_distance import backbones_there
    from ldm_deploy.eval.machine import machine
    from ldm_deploy.eval.report import write_report
    from ldm_deploy.export.export import export_source
    from ldm_deploy.models.sources import resolve_source, source_digest
    from ldm_deploy.quantize.quantize import quantize_bundle

    check_targets(targets)
    check_replaceable(out)
    limits = load_budget(budget)
    reference = resolve_source(source)
    stages = out.with_name(out.name + ".stages")
    fingerprint = machine(threads)["fingerprint"]

    variants = [(precision, target) for target in targets for precision in PRECISIONS[target]]
    exported = stages / "exported"
    ingredients = {"seed": seed, **made_with(threads, fingerprint)}
    key = _stage(
        exported,
        {"source": source_digest(reference), "variants": variants, **ingredients},
        lambda directory: export_source(
            reference, directory, variants=variants, seed=seed, threads=threads, cache=user_cache()
        ),
    )
    quantized = exported
    calibration: Path | None = None  # drawn once, for all targets
    for target in dict.fromkeys(targets):
        before, quantized = quantized, stages / f"quantized-{target}"
        key = _stage(
            quantized,
            {"exported": key, "target": target, "budget": limits.digest, "builds": builds, **ingredients},
            functools.partial(
                quantize_bundle, before, target=target, budget=limits, calibration=calibration, builds=builds,
                ray=ray, seed=seed, threads=threads,
            ),
        )  # fmt: skip
        drawn = quantized.with_name(f"{quantized.name}.calibration.npz")
        calibration = calibration or (drawn if drawn.is_file() else None)
    evaluated = stages / "report"

    def evaluate(directory: Path) -> None:
        report = evaluate_bundle(quantized, reference=reference, budget=limits, threads=threads, seed=seed)
        with staged_directory(directory) as staging:
            write_report(report, staging)

    _stage(
        evaluated,
        {
            "bundle": key,
            "budget": limits.digest,
            "machine": fingerprint,
            "threads": threads,
            "lpips": backbones_there(),  # fetched since the last run, they turn "not measured" into a figure
        },
        evaluate,
    )
    report: dict[str, Any] = json.loads((evaluated / "report.json").read_text(encoding="utf-8"))
    _assemble(quantized, evaluated, report["chosen"], out)
    return report


def check_targets(targets: Sequence[str]) -> None:
    """Raises `StageMissingError` for a target that `optimize` does not have."""
    for target in targets:
        if target not in PRECISIONS:
            raise StageMissingError(f"target {target!r} is not built yet; there is: {', '.join(PRECISIONS)}")


def show_plan(
    source: str | Path, targets: Sequence[str], *, builds: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """Print what `optimize` would do, with a time estimate; nothing is written. Returns the plan as data."""
    from ldm_deploy.plan import measure_unit, plan, print_plan

    check_targets(targets)
    chosen = {target: PRECISIONS[target] for target in dict.fromkeys(targets)}
    return print_plan(plan(measure_unit(source, threads), chosen, builds=builds))


def _stage(directory: Path, ingredients: Mapping[str, Any], build: Callable[[Path], object]) -> str:
    """Build `directory`, or reuse what an earlier run left there for the same ingredients. Returns their key.

    The receipt `<directory>.json` is written last and holds the key and the digest of every file: without it, or with
    any byte changed, the stage is built anew.
    """
    key = content_key(ingredients)
    receipt = directory.with_name(directory.name + ".json")
    if _receipt(directory, key) == _read(receipt):
        note(f"{directory.name}: unchanged, reused")
        return key
    receipt.unlink(missing_ok=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    build(directory)
    atomic_write_json(receipt, _receipt(directory, key))
    return key


def _receipt(directory: Path, key: str) -> dict[str, Any]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {"key": key, "files": {path.relative_to(directory).as_posix(): file_digest(path) for path in files}}


def _read(receipt: Path) -> Any:
    try:
        return json.loads(receipt.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _assemble(candidates: Path, evaluated: Path, chosen: str | None, out: Path) -> None:
    """The bundle an application ships: every proven engine, the report, and the chosen variant as the default."""
    from ldm_deploy.runtime.bundle import read_bundle, write_bundle

    bundle = read_bundle(candidates)
    with staged_directory(out) as staging:
        for name in bundle.data["files"]:
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(candidates / name, target)
        shutil.copytree(evaluated, staging / "report")
        write_bundle(staging, {**bundle.data, "default_variant": chosen or bundle.data["default_variant"]})
