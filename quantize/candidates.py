"""Build INT8 engines of one component, judge each, keep the fastest that survives, the smaller one of equals.

Three judges, in this order: parity (is it the reference?), the graph read back (is it INT8 at all?), and an interleaved
measurement against the fp32 engine (do no harm).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import QuantizationError
from ldm_deploy.eval.latency import compare_engines
from ldm_deploy.eval.parity import ParityResult, Probe, compare_outputs, explain
from ldm_deploy.eval.speedup import speedup
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.images import ImageGate
from ldm_deploy.quantize.kit import Kit, is_large
from ldm_deploy.quantize.profile import slower_ops
from ldm_deploy.quantize.scheme import AnyRecipe
from ldm_deploy.quantize.sparing import spare

HELD_OUT = 8  # calibration samples that choose what is not a matter of speed, and do not enter the ranges
MINIMUM_SPEEDUP = 1.0  # the lower end of the 95 % interval must be above
ROUNDS = 40
TIME_LIMIT_S = 20.0  # of the measurement, per component
RECIPES_OF_LARGE = 2  # those with most INT8
SPARED_FOR_IMAGES = 2  # times that layers of one recipe are spared because images were not good enough


@dataclass
class Candidate:
    """One INT8 engine that was built, and what became of it."""

    name: str  # of the recipe
    path: Path
    recipe: AnyRecipe
    parity: ParityResult
    found: dict[str, int]  # nodes per precision, read back from what the runtime runs
    speedup: dict[str, Any] | None = None  # against the fp32 sibling
    comparisons: list[dict[str, Any]] = field(default_factory=list)  # against every sibling
    refused: str | None = None  # one sentence
    costly_ops: list[dict[str, Any]] = field(default_factory=list)
    size_bytes: int = 0


def quantize_component(
    component: str,
    kit: Kit,
    folder: Path,
    samples: Samples,
    probes: Sequence[Probe],
    limit: float,
    *,
    batch: int = 1,
    seed: int = 0,
    rounds: int = ROUNDS,
    size_limit: float = math.inf,
    refine: Callable[[Sequence[Candidate]], Candidate | None] | None = None,
    gate: ImageGate | None = None,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Candidate | None, list[Candidate]]:
    """The fastest engine that survives (or None), the smaller one of equals, and those refused, each with its reason.

    `limit`: largest relative error on `probes`; a recipe beyond it is tried again without its most sensitive nodes
    (`sparing.py`). `batch`: rows in one call of the measurement, as the pipeline makes it. `size_limit`: bytes; an
    engine beyond it is the one to keep only if all are.
    Recipes that survive but are slower than the best are neither. Files are written into `folder`.
    `refine` is given the correct engines once they are timed, and may return one more. `gate`: what images
    must keep. `advance` is called three times.
    """
    held_out, observed = split_samples(samples)
    folder.mkdir(parents=True, exist_ok=True)
    kit.calibrate(observed, held_out, folder)
    advance()
    alone: dict[str, float] = {}
    candidates = build_candidates(component, kit, folder, probes, limit, alone)
    advance()
    correct = [candidate for candidate in candidates if candidate.refused is None]
    feeds = batched(samples, batch)

    def judge() -> Candidate | None:
        """The best of those that are fast enough, measured anew."""
        judge_speed(component, kit, [one for one in correct if one.refused is None], feeds, seed=seed, rounds=rounds)
        return _best([one for one in correct if one.refused is None], size_limit)

    judge()
    more = None if refine is None else refine(correct)
    if more is not None:
        # All that may win once more, in one run: what is compared was measured together.
        correct.insert(0, more)
        candidates.append(more)
        judge()
    best = _best([one for one in correct if one.refused is None], size_limit)
    psnr_db = None
    if gate is not None and best is not None:
        fp32 = kit.open_spec(next(iter(kit.siblings().values())))
    while gate is not None and best is not None:
        psnr_db, asked = gate.psnr_db(component, fp32, kit.open(best.path, best.recipe)), gate.asked_db
        if psnr_db >= asked:
            break
        best.refused = (
            f"{component}: INT8 ({best.name}) draws images of {psnr_db:.1f} dB, {asked:.1f} are asked for "
            "(psnr_db_min of the budget, less what other components take)"
        )
        spared, psnr_db = _spared_for_images(component, kit, folder, best, probes, psnr_db - asked, alone), None
        if spared is not None:
            correct.append(spared)
            candidates.append(spared)
        best = judge() if spared is not None else _best([one for one in correct if one.refused is None], size_limit)
    if gate is not None:
        gate.settle(psnr_db)
    advance()
    return best, [candidate for candidate in candidates if candidate.refused is not None]


def _spared_for_images(
    component: str,
    kit: Kit,
    folder: Path,
    best: Candidate,
    probes: Sequence[Probe],
    missing_db: float,
    alone: dict[str, float],
) -> Candidate | None:
    """The same recipe with more layers in float: as many as bring its error down by what images lack, `missing_db` < 0.

    The error of images goes with that of the component. None if too many layers would be needed.
    """
    recipe, _, count = best.name.partition(", spared ")
    number = int(count or 0) + 1
    if number > SPARED_FOR_IMAGES:
        return None
    limit = best.parity.relative_error / best.parity.allowance * 10 ** (missing_db / 20)
    trial, all_layers = folder / f"spared{kit.suffix}", replace(best.recipe, keep_float=())
    spared = spare(kit, trial, all_layers, probes, limit, alone)
    if spared is None:
        return None
    for file in kit.files(trial):
        file.unlink()
    name = f"{recipe}, spared {number}"
    path = folder / f"{recipe}-{number}" / engine_name(component, kit)
    return _judged(
        component, kit, name, path, spared[0], *judge_parity(kit, path, spared[0], probes, best.parity.limit)
    )


def engine_name(component: str, kit: Kit) -> str:
    """Of the file in a bundle; candidates have it too, each in a folder of its own: what was judged is what is kept."""
    return f"{component}-int8{'' if kit.runtime == 'onnxruntime' else f'-{kit.runtime}'}{kit.suffix}"


def build_candidates(
    component: str, kit: Kit, folder: Path, probes: Sequence[Probe], limit: float, alone: dict[str, float]
) -> list[Candidate]:
    """One per recipe that finds something to quantize; those that are wrong, or INT8 in name only, are refused.

    `alone`: the errors of single layers, as far as they are found, see `spare`.
    """
    candidates: list[Candidate] = []
    same: set[tuple[Any, ...]] = set()
    for name, recipe in list(kit.recipes.items())[: RECIPES_OF_LARGE if is_large(kit) else None]:
        path = folder / name / engine_name(component, kit)
        chosen = kit.settle(recipe)
        layers = tuple(layer.name for layer in kit.layers(chosen))
        scaling = replace(chosen, op_types=(), keep_float=())
        if not layers or ((scaling, layers) in same and all(layers)):
            continue  # the graph has no op of this kind, or no other
        same.add((scaling, layers))
        parity, found = judge_parity(kit, path, chosen, probes, limit)
        milder = None if parity.passed else kit.milder(chosen)
        if milder is not None:
            better = judge_parity(kit, path, milder, probes, limit)
            if better[0].passed or (kit.spares_milder and better[0].relative_error < parity.relative_error):
                chosen, parity, found = milder, *better
        if not parity.passed:
            trial = folder / f"spared{kit.suffix}"
            spared = spare(kit, trial, chosen, probes, limit, alone)
            if spared is not None:
                chosen = spared[0]
                for file in kit.files(trial):
                    file.unlink()
                parity, found = judge_parity(kit, path, chosen, probes, limit)
        candidates.append(_judged(component, kit, name, path, chosen, parity, found))
    if not candidates:
        raise QuantizationError(f"{component} has nothing that a recipe could quantize; leave it out with --component")
    return candidates


def judge_parity(
    kit: Kit, path: Path, recipe: AnyRecipe, probes: Sequence[Probe], limit: float
) -> tuple[ParityResult, dict[str, int]]:
    """Build it and open it once: is it the reference, and what runs in which precision."""
    kit.build(path, recipe)
    engine = kit.open(path, recipe)
    return compare_outputs(engine, probes, limit), kit.found(path, engine)


def _judged(
    component: str, kit: Kit, name: str, path: Path, recipe: AnyRecipe, parity: ParityResult, found: dict[str, int]
) -> Candidate:
    """What was built at `path`, refused if it is wrong."""
    candidate = Candidate(name, path, recipe, parity, found)
    candidate.size_bytes = sum(file.stat().st_size for file in kit.files(path))
    candidate.refused = _wrong(component, kit, candidate)
    return candidate


def _wrong(component: str, kit: Kit, candidate: Candidate) -> str | None:
    if not candidate.parity.passed:
        return explain(candidate.parity, component, f"{component}-int8 ({candidate.name})")
    if not candidate.found.get("int8"):
        return (
            f"{component}: {kit.title} runs none of the nodes quantized by recipe {candidate.name} in INT8 "
            f"(read back: {candidate.found}); the fp32 engine is used"
        )
    return None


def _best(survivors: Sequence[Candidate], size_limit: float = math.inf) -> Candidate | None:
    """The fastest of those within `size_limit`, if there are any; of those not surely slower than it, the smallest."""
    survivors = [candidate for candidate in survivors if candidate.size_bytes <= size_limit] or survivors
    speedups = {candidate.name: candidate.speedup or {} for candidate in survivors}
    fastest = max((speedup["median"] for speedup in speedups.values()), default=0.0)
    level = [candidate for candidate in survivors if speedups[candidate.name]["ci95_high"] >= fastest]
    return min(level, key=lambda candidate: candidate.size_bytes, default=None)


def judge_speed(
    component: str,
    kit: Kit,
    candidates: Sequence[Candidate],
    feeds: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
) -> None:
    """Measure all candidates and their siblings in one interleaved run; refuse those not surely faster than each.

    Of a large component two engines are held at once: each candidate meets each sibling in a run of its own.
    """
    if not candidates:
        return
    siblings = kit.siblings()
    specs = {candidate.name: kit.spec(candidate.path, candidate.recipe) for candidate in candidates}
    runs: list[dict[str, Any]] = [siblings | specs]
    if is_large(kit):
        runs = [{sibling: siblings[sibling], name: specs[name]} for name in specs for sibling in siblings]
    for candidate in candidates:
        candidate.comparisons = []
    for run in runs:
        measured = compare_engines(run, feeds, rounds=rounds, threads=kit.threads, seed=seed, time_limit_s=TIME_LIMIT_S)
        first, *others = (name for name in run if name in siblings)
        if first in measured["failed"]:
            raise QuantizationError(f"{component}: engine {first} cannot be measured: {measured['failed'][first]}")
        samples = measured.get("samples_ms", {})
        for candidate in candidates:
            name = candidate.name
            if name in measured["failed"]:
                candidate.refused = f"{component}: INT8 ({name}) fails: {measured['failed'][name]}"
            elif name in run:
                candidate.comparisons.append(measured["speedup"][name])
                candidate.comparisons += [
                    speedup(samples[other], samples[name], other, seed=seed) for other in others if other in samples
                ]
    for candidate in candidates:
        if candidate.refused is not None:
            continue
        candidate.speedup = candidate.comparisons[0]
        for comparison in candidate.comparisons:
            if comparison["ci95_low"] <= MINIMUM_SPEEDUP:
                _explain_slowness(component, kit, candidate, comparison, feeds)
                break


def _explain_slowness(
    component: str, kit: Kit, candidate: Candidate, comparison: Mapping[str, Any], feeds: Mapping[str, np.ndarray]
) -> None:
    """Name the ops that take longer than in the sibling, from both kernel profiles."""
    versus = str(comparison["versus"])
    before = kit.profile(kit.siblings()[versus], feeds)
    costly = slower_ops(before, kit.profile(kit.spec(candidate.path, candidate.recipe), feeds))
    candidate.costly_ops = [cost.to_dict() for cost in costly]
    named = ", ".join(f"{cost.op} {cost.ms:.2f} ms" for cost in costly[:3])
    candidate.refused = (
        f"{component}: INT8 ({candidate.name}) is not faster than {versus.partition('-')[0]}: "
        f"{comparison['median']:.2f}x ({comparison['ci95_low']:.2f} to {comparison['ci95_high']:.2f}); "
        f"time goes to {named or 'the same ops as before'}"
    )


def split_samples(samples: Samples) -> tuple[Samples, Samples]:
    """Every n-th sample is held out (so all timesteps are in both parts); small sets serve as both."""
    count = len(samples)
    if count < 2 * HELD_OUT:
        return samples, samples
    held = set(range(0, count, count // HELD_OUT))
    return Samples(samples.arrays, sorted(held)), Samples(samples.arrays, [i for i in range(count) if i not in held])


def batched(samples: Samples, batch: int) -> dict[str, np.ndarray]:
    """`batch` samples from the middle of the set as one call."""
    rows = np.resize(np.arange(len(samples) // 2, len(samples)), batch)
    indices = [samples.indices[int(row)] for row in rows]
    return {name: np.ascontiguousarray(value[indices]) for name, value in samples.arrays.items()}
