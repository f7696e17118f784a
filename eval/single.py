"""A bundle of one component, judged like a whole model: its engines against its fp32 one, and against torch's outputs.

What draws nothing has no images: PSNR is that of the outputs on the probes, and limits on anything else of an image do
not apply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.artifact import file_digest
from ldm_deploy.errors import EngineError, EvaluationError
from ldm_deploy.eval.budget import Budget, Limits, load_budget
from ldm_deploy.eval.choose import choose, judge_variant
from ldm_deploy.eval.compare import Evaluation
from ldm_deploy.eval.latency import Worker, WorkerError, start_all, summary
from ldm_deploy.eval.machine import conditions, machine, usable_threads
from ldm_deploy.eval.measure import Measured, component_feeds
from ldm_deploy.eval.metrics import bootstrap_ci, psnr_db_of
from ldm_deploy.eval.parity import Probe, Runnable, read_probes
from ldm_deploy.eval.quality import nothing_measured
from ldm_deploy.eval.rows import add_comparisons, add_refused, component_row, empty_row
from ldm_deploy.eval.speedup import speedup
from ldm_deploy.eval.stands import time_component
from ldm_deploy.eval.studies import read_studies
from ldm_deploy.progress import task

if TYPE_CHECKING:
    from ldm_deploy.runtime.bundle import Bundle

APPLY = ("psnr_db_min", "worst_psnr_db_min", "speedup_min", "peak_memory_max", "size_max")
PROTOCOL = {
    "latency": "one worker process per engine, one active at a time, spinning off; calls with the first probe, in "
    "random order",
    "peak_memory": "largest resident set of the worker's own process after loading and those calls",
}

Row = dict[str, Any]


class OfOutputs(Budget):
    """A budget of which what needs images is left out."""

    def limits_for(self, variant: str) -> Limits:
        limits = super().limits_for(variant)
        kept = {name: limit for name, limit in limits.limits.items() if name in APPLY}
        return replace(limits, limits=kept, required=tuple(name for name in limits.required if name in kept))


def evaluate_single(
    bundle: Path, *, budget: Budget | None = None, threads: int | None = None, seed: int = 0, timeout_s: float = 600.0
) -> Evaluation:
    """Measure and judge every engine of a bundle that holds one component; returns the content of report.json.

    A row per engine, named `<precision>-<runtime>-<device>`; the baseline is the fp32 engine, which has a row as well.
    Raises `BundleError` for a bundle that cannot be read, `EvaluationError` for one with several components or without
    an fp32 engine, `ParityError` for probes that are not there.
    """
    from ldm_deploy.runtime.bundle import read_bundle

    started = datetime.now(UTC)
    opened = read_bundle(bundle)
    data = opened.data
    engines = {f"{one['precision']}-{one['runtime']}-{one['device']}": one for one in data["engines"]}
    components = sorted({engine["component"] for engine in data["engines"]})
    if len(components) != 1:
        raise EvaluationError(
            f"bundle {bundle} holds {', '.join(components) or 'nothing'} and no whole model; a report is of one "
            "component: export each into a directory of its own"
        )
    first = next((name for name, engine in engines.items() if engine["precision"] == "fp32"), None)
    if first is None:
        raise EvaluationError(f"bundle {bundle} has no fp32 engine to compare with; export it in fp32, too")
    (component,) = components
    file = bundle / "probes" / f"{component}.safetensors"
    probes = read_probes(file)
    feeds = component_feeds(component, probes)
    threads = threads or usable_threads()
    before, now = machine(threads), conditions()
    found = measure_engines(bundle, engines, first, component, feeds, threads=threads, seed=seed, timeout_s=timeout_s)
    after = conditions()

    timed = first in found.latency_ms
    baseline: Row = {
        "name": first,
        "status": "ok" if timed else "failed",
        "reason": None if timed else found.failed.get(first, "it was not timed"),
        "latency_ms": summary(found.latency_ms[first]) if timed else None,
        "load_ms": found.load_ms.get(first),
        "peak_memory_bytes": found.memory_bytes.get(first),
        "size_bytes": engines[first]["size_bytes"],
        "stored_bytes": None,
        "components": [],
    }
    rows = [_row(name, engine, opened, found, first, probes, threads, seed) for name, engine in engines.items()]
    for row in rows:
        add_comparisons(row, rows, found, seed)
    rows = add_refused(rows, data.get("refused", []))
    limits = OfOutputs(**vars(budget or load_budget(None)))
    for row in rows:
        judge_variant(row, baseline, limits)
    chosen, why = choose(rows, baseline)
    shape = next(iter(feeds.values())).shape
    content = {
        "format": 1,
        "created": started.isoformat(timespec="seconds"),
        "duration_s": round((datetime.now(UTC) - started).total_seconds(), 1),
        "source": {"name": data.get("name"), "digest": data["parents"].get("reference") or data["parents"]["module"]},
        "protocol": {
            "component": component,
            "prompts_sha256": file_digest(file).removeprefix("sha256:"),  # of the probes, which stand for prompts
            "prompts": [],
            "seeds": [],
            "probes": len(probes),
            "sampler": None,
            "steps": None,
            "guidance_scale": None,
            "size": [int(side) for side in (1, 1, *shape)[-2:]],
            "batch": int(shape[0]) if shape else 1,
            "threads": threads,
            "order_seed": seed,
            **PROTOCOL,
        },
        "machine": {
            **before,
            "load_average_after": after["load_average"],
            "conditions": {"before": now, "after": after},
            "processors": found.processors,
        },
        "default_variant": None,
        "budget": {"path": limits.path, "digest": limits.digest},
        "baseline": baseline,
        "variants": rows,
        "chosen": chosen,
        "why": why,
    }
    return Evaluation(content, {}, None, read_studies(bundle))


def measure_engines(
    bundle: Path,
    engines: Mapping[str, Mapping[str, Any]],
    first: str,
    component: str,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int,
    seed: int,
    timeout_s: float,
) -> Measured:
    """Latency and memory of every engine in a worker of its own; `first` is what the others are compared with."""
    found = Measured()
    order = [first, *(name for name in engines if name != first)]
    workers = [
        Worker(
            name, {"kind": "engine", "bundle": str(bundle), "engine": engines[name]["id"]}, threads=threads,
            timeout_s=timeout_s,
        )
        for name in order
    ]  # fmt: skip
    try:
        with task("loading engines", len(workers)) as advance:
            found.failed |= start_all(workers, advance)
        ready = {worker.name: worker for worker in workers if worker.name not in found.failed}
        found.processors = next((worker.processors for worker in ready.values() if worker.processors), [])
        found.load_ms = {name: worker.load_ms for name, worker in ready.items()}
        for name, worker in list(ready.items()):
            try:
                worker.run(worker.put(feeds), component=component)
            except WorkerError as error:
                found.failed[name] = str(error)
                del ready[name]
        with task(f"timing {component}", 1) as advance:
            found.latency_ms = time_component(component, feeds, ready, seed=seed)
            advance()
        for name in found.latency_ms:
            memory = ready[name].memory()
            found.memory_bytes[name] = memory.pop("peak_bytes")
            found.memory[name] = memory
        timed = {engines[name]["id"]: name for name in found.latency_ms}
        found.component_ms = {component: {key: found.latency_ms[name] for key, name in timed.items()}}
        found.clock = {key: ready[name].clock for key, name in timed.items()}
    finally:
        for worker in workers:
            worker.stop()
    return found


def output_psnr_db(engine: Runnable, probes: Sequence[Probe]) -> np.ndarray:
    """Of each probe in dB: the reference's range over the root mean square error; of several outputs, the worst's.

    float64 (probes,). Equal outputs count as `IDENTICAL_DB`; what is not finite stays so. A reference that is the same
    everywhere has its absolute value as range.
    """
    values = []
    for probe in probes:
        outputs = engine.run(probe.inputs)
        each = []
        for name, wanted in probe.outputs.items():
            error = float(np.mean(np.square(np.float64(outputs[name]) - np.float64(wanted))))
            each.append(float(psnr_db_of(error, peak=float(np.ptp(wanted)) or float(np.abs(wanted).max()))))
        values.append(np.min(each))
    return np.array(values)


def _row(
    name: str, engine: Mapping[str, Any], bundle: Bundle, found: Measured, first: str, probes: Sequence[Probe],
    threads: int, seed: int,
) -> Row:  # fmt: skip
    from ldm_deploy.runtime.engines import open_engine

    row = empty_row(name, engine["runtime"], engine["device"], engine["precision"])
    row |= {
        "size_bytes": engine["size_bytes"],
        "quality": nothing_measured("a component draws no images", None),
        "components": [component_row(engine, bundle.data, found, seed)],
    }
    if name not in found.latency_ms:
        return row | {"status": "failed", "reason": found.failed.get(name, "it was not timed")}
    row |= {
        "latency_ms": summary(found.latency_ms[name]),
        "load_ms": found.load_ms[name],
        "peak_memory_bytes": found.memory_bytes[name],
        "memory": found.memory[name],
    }
    if first in found.latency_ms:
        row["speedup"] = speedup(found.latency_ms[first], found.latency_ms[name], first, seed=seed)
    try:
        values = output_psnr_db(open_engine(bundle.engines[engine["id"]], bundle.root, threads=threads), probes)
    except EngineError as error:
        return row | {"status": "failed", "reason": str(error)}
    if not np.isfinite(values).all():
        return row | {"status": "failed", "reason": f"{name} gives what is not finite on a recorded input"}
    interval = bootstrap_ci(values, np.mean, seed=seed)
    row["quality"]["psnr_db"] = {
        "mean": float(values.mean()),
        "worst": float(values.min()),
        "ci95": list(interval) if interval else None,
        "n": len(values),
        "reason": None,
        "of": "outputs on the probes, peak: their range",
    }
    return row
