"""Build INT8 engines of one component, judge each, keep the fastest that survives, the smaller one of equals.

Three judges, in this order: parity (is it the reference?), the graph read back (is it INT8 at all?), and an interleaved
measurement against the fp32 engine (do no harm).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import QuantizationError
from ldm_deploy.eval.latency import compare_engines
from ldm_deploy.eval.parity import ParityResult, Probe, compare_outputs, explain
from ldm_deploy.onnx_graph import precision_found
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.observe import Histogram
from ldm_deploy.quantize.onnxruntime_cpu import RECIPES, has_vnni, observe_graph, quantize_graph
from ldm_deploy.quantize.profile import profile_ops, slower_ops
from ldm_deploy.quantize.scheme import RANGE_METHODS, Recipe
from ldm_deploy.quantize.sparing import spare
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

BASELINE = "fp32-onnxruntime-cpu"
HELD_OUT = 8  # calibration samples that choose the range method and do not enter the ranges
MINIMUM_SPEEDUP = 1.0  # the lower end of the 95 % interval must be above
ROUNDS = 40
TIME_LIMIT_S = 20.0  # of the measurement, per component


@dataclass
class Candidate:
    """One INT8 engine that was built, and what became of it."""

    name: str  # of the recipe
    path: Path
    recipe: Recipe
    parity: ParityResult
    found: dict[str, int]  # nodes per precision, read back from the graph that ONNX Runtime runs
    speedup: dict[str, Any] | None = None
    refused: str | None = None  # one sentence
    costly_ops: list[dict[str, Any]] = field(default_factory=list)


def quantize_component(
    component: str,
    model_path: Path,
    folder: Path,
    samples: Samples,
    probes: Sequence[Probe],
    limit: float,
    *,
    batch: int = 1,
    recipes: Mapping[str, Recipe] = RECIPES,
    seed: int = 0,
    threads: int | None = None,
    rounds: int = ROUNDS,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Candidate | None, list[Candidate]]:
    """The fastest engine that survives (or None), the smaller one of equals, and those refused, each with its reason.

    `limit`: largest relative error on `probes`; a recipe beyond it is tried again without its most sensitive nodes
    (`sparing.py`). `batch`: rows in one call of the measurement, as the pipeline makes it.
    Recipes that survive but are slower than the best are neither. Files are written into `folder`.
    `advance` is called three times.
    """
    held_out, observed = _split(samples)
    histograms = observe_graph(model_path, observed, threads=threads)
    advance()
    reduce_range = has_vnni() is False
    method = _range_method(model_path, folder, recipes, histograms, held_out, reduce_range, threads)
    candidates: list[Candidate] = []
    for name, recipe in recipes.items():
        path = folder / f"{component}-{name}.onnx"
        chosen = replace(recipe, range_method=method, reduce_range=reduce_range)
        try:
            quantize_graph(model_path, path, (), chosen, histograms=histograms)
        except QuantizationError:
            continue  # the graph has no op of this kind
        parity = compare_outputs(OnnxRuntimeEngine(path, threads=threads), probes, limit)
        if not parity.passed:
            spared = spare(model_path, folder / "spared.onnx", chosen, histograms, probes, limit, threads=threads)
            if spared is not None:
                (folder / "spared.onnx").replace(path)
                chosen, parity = spared
        candidates.append(Candidate(name, path, chosen, parity, precision_found(path)))
    if not candidates:
        raise QuantizationError(f"{component} has nothing that a recipe could quantize; leave it out with --component")
    advance()
    for candidate in candidates:
        if not candidate.parity.passed:
            candidate.refused = explain(candidate.parity, component, f"{component}-int8 ({candidate.name})")
        elif not candidate.found.get("int8"):
            candidate.refused = (
                f"{component}: ONNX Runtime runs none of the nodes quantized by recipe {candidate.name} in INT8 "
                f"(read back: {candidate.found}); the fp32 engine is used"
            )
    correct = [candidate for candidate in candidates if candidate.refused is None]
    judge_speed(component, model_path, correct, _feeds(samples, batch), seed=seed, threads=threads, rounds=rounds)
    advance()
    survivors = [candidate for candidate in correct if candidate.refused is None]
    return _best(survivors), [candidate for candidate in candidates if candidate.refused is not None]


def _best(survivors: Sequence[Candidate]) -> Candidate | None:
    """The fastest; of those that are not surely slower than it, the smallest file."""
    speedups = {candidate.name: candidate.speedup or {} for candidate in survivors}
    fastest = max((speedup["median"] for speedup in speedups.values()), default=0.0)
    level = [candidate for candidate in survivors if speedups[candidate.name]["ci95_high"] >= fastest]
    return min(level, key=lambda candidate: candidate.path.stat().st_size, default=None)


def judge_speed(
    component: str,
    baseline: Path,
    candidates: Sequence[Candidate],
    feeds: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    threads: int | None = None,
    rounds: int = ROUNDS,
) -> None:
    """Measure all candidates and the fp32 engine in one interleaved run; refuse those that are not surely faster."""
    if not candidates:
        return
    paths = {BASELINE: baseline, **{candidate.name: candidate.path for candidate in candidates}}
    specs = {name: {"kind": "engine", "runtime": "onnxruntime", "path": str(path)} for name, path in paths.items()}
    measured = compare_engines(specs, feeds, rounds=rounds, threads=threads, seed=seed, time_limit_s=TIME_LIMIT_S)
    if BASELINE in measured["failed"]:
        raise QuantizationError(f"{component}: the fp32 engine cannot be measured: {measured['failed'][BASELINE]}")
    for candidate in candidates:
        if candidate.name in measured["failed"]:
            candidate.refused = f"{component}: INT8 ({candidate.name}) fails: {measured['failed'][candidate.name]}"
            continue
        candidate.speedup = measured["speedup"][candidate.name]
        if candidate.speedup["ci95_low"] <= MINIMUM_SPEEDUP:
            _explain_slowness(component, baseline, candidate, feeds, threads)


def _explain_slowness(
    component: str, baseline: Path, candidate: Candidate, feeds: Mapping[str, np.ndarray], threads: int | None
) -> None:
    """Name the ops that take longer than in the fp32 engine, from both kernel profiles."""
    assert candidate.speedup is not None
    before = profile_ops(baseline, feeds, threads=threads)
    costly = slower_ops(before, profile_ops(candidate.path, feeds, threads=threads))
    candidate.costly_ops = [cost.to_dict() for cost in costly]
    named = ", ".join(f"{cost.op} {cost.ms:.2f} ms" for cost in costly[:3])
    speedup = candidate.speedup
    candidate.refused = (
        f"{component}: INT8 ({candidate.name}) is not faster than fp32: {speedup['median']:.2f}x "
        f"({speedup['ci95_low']:.2f} to {speedup['ci95_high']:.2f}); time goes to {named or 'the same ops'}; "
        "the fp32 engine is used"
    )


def _split(samples: Samples) -> tuple[Samples, Samples]:
    """Every n-th sample is held out (so all timesteps are in both parts); small sets serve as both."""
    count = len(samples)
    if count < 2 * HELD_OUT:
        return samples, samples
    held = set(range(0, count, count // HELD_OUT))
    return Samples(samples.arrays, sorted(held)), Samples(samples.arrays, [i for i in range(count) if i not in held])


def _feeds(samples: Samples, batch: int) -> dict[str, np.ndarray]:
    """`batch` samples from the middle of the set as one call."""
    rows = np.resize(np.arange(len(samples) // 2, len(samples)), batch)
    indices = [samples.indices[int(row)] for row in rows]
    return {name: np.ascontiguousarray(value[indices]) for name, value in samples.arrays.items()}


def _range_method(
    model_path: Path,
    folder: Path,
    recipes: Mapping[str, Recipe],
    histograms: Mapping[str, Histogram],
    held_out: Samples,
    reduce_range: bool,
    threads: int | None,
) -> str:
    """The way to choose ranges that errs least on samples which the ranges have not seen."""
    reference = OnnxRuntimeEngine(model_path, threads=threads)
    probes = [Probe(feeds, reference.run(feeds)) for feeds in held_out]
    errors: dict[str, float] = {}
    for method in RANGE_METHODS:
        recipe = replace(next(iter(recipes.values())), range_method=method, reduce_range=reduce_range)
        path = folder / "ranges.onnx"
        try:
            quantize_graph(model_path, path, (), recipe, histograms=histograms)
        except QuantizationError:
            return RANGE_METHODS[0]
        result = compare_outputs(OnnxRuntimeEngine(path, threads=threads), probes, np.inf)
        path.unlink()
        errors[method] = float(np.sqrt(np.mean(np.square(result.errors))))
    return min(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)
