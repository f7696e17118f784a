"""What the workers are asked: every image of the grid from every variant, then each component on recorded inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import ParityError
from ldm_deploy.eval.grid import Grid
from ldm_deploy.eval.latency import Worker, WorkerError, interleaved, start_all, warm_up
from ldm_deploy.eval.parity import Probe, read_probes
from ldm_deploy.eval.speedup import FEWEST, speedup
from ldm_deploy.eval.stands import time_component
from ldm_deploy.eval.throughput import BATCHED, time_batches, time_images
from ldm_deploy.progress import note, task

BASELINE = "fp32-torch-cpu"
WARM_UP_STEPS = 4  # sampler steps of a warm-up image: the U-Net's calls are what has to settle

Record = dict[str, Any]
Drawn = tuple[float, np.ndarray]  # milliseconds, image


class Measured:
    """What the workers gave, by name of variant (or `BASELINE`)."""

    def __init__(self) -> None:
        self.images: dict[str, np.ndarray] = {}
        self.latency_ms: dict[str, list[float]] = {}
        self.memory_bytes: dict[str, int] = {}  # at the peak; the rest of `memory.MemoryLog.report` is in `memory`
        self.memory: dict[str, Record] = {}
        self.load_ms: dict[str, float | None] = {}
        self.cold_start_ms: dict[str, dict[str, float]] = {}  # see `Worker.start`; "first_image" besides
        self.component_ms: dict[str, dict[str, list[float]]] = {}  # component -> engine id (or BASELINE) -> samples
        self.component_batch_ms: dict[str, dict[int, dict[str, list[float]]]] = {}  # the same for each size of a batch
        self.batch_ms: dict[int, dict[str, list[float]]] = {}  # images in one call -> name -> samples
        self.clock: dict[str, str] = {}  # engine id (or BASELINE) -> what it was timed with
        self.processors: list[int] = []  # that the workers were kept on
        self.failed: dict[str, str] = {}


def component_plan(bundle: Mapping[str, Any], root: Path) -> dict[str, tuple[dict[str, np.ndarray], dict[str, str]]]:
    """component -> (feeds, {engine id: name of the first variant that has it}); without probes, no entry.

    `bundle`: the content of bundle.json in `root`.
    """
    owners: dict[str, str] = {}
    for variant in bundle["variants"]:
        for engine in variant["engines"]:
            owners.setdefault(engine, variant["name"])
    plan: dict[str, tuple[dict[str, np.ndarray], dict[str, str]]] = {}
    for engine in bundle["engines"]:
        component = engine["component"]
        if engine["id"] not in owners:
            continue
        if component not in plan:
            try:
                probes = read_probes(root / "probes" / f"{component}.safetensors")
            except ParityError:
                continue
            plan[component] = (component_feeds(component, probes), {})
        plan[component][1][engine["id"]] = owners[engine["id"]]
    return plan


def component_feeds(component: str, probes: Sequence[Probe]) -> dict[str, np.ndarray]:
    """What a component gets while one image is drawn: the first probe, which has the default size.

    The U-Net gets it twice: guidance asks for both predictions in one batch.
    """
    feeds = dict(probes[0].inputs)
    batch = next(iter(feeds.values())).shape[0]
    if component == "unet" and batch == 1 and "guidance_scale" not in feeds:  # a student is told the guidance instead
        feeds = {name: np.concatenate([value, value]) for name, value in feeds.items()}
    return feeds


def measure(
    specs: Mapping[str, Record],
    grid: Grid,
    plan: Mapping[str, tuple[dict[str, np.ndarray], dict[str, str]]],
    *,
    threads: int,
    seed: int,
    steps: int | None,
    timeout_s: float = 600.0,
) -> Measured:
    """Draw the grid and time the components with one worker per spec. What fails is in `failed`, with its reason."""
    found = Measured()
    workers = [Worker(name, spec, threads=threads, timeout_s=timeout_s) for name, spec in specs.items()]
    pairs = grid.pairs
    try:
        with task("loading variants", len(workers)) as advance:
            found.failed |= start_all(workers, advance)
        found.processors = next((worker.processors for worker in workers if worker.processors), [])
        found.load_ms = {worker.name: worker.load_ms for worker in workers}
        ready = _warm(workers, found, pairs[0], steps)

        def draw(worker: Worker, index: int) -> tuple[float, np.ndarray]:
            prompt, number = pairs[index]
            return worker.image(prompt, number, steps=steps)

        drawn, failed = draw_all(ready, draw, len(pairs), seed=seed)
        found.failed |= failed
        for name, results in drawn.items():
            found.latency_ms[name] = [milliseconds for milliseconds, _ in results]
            found.images[name] = np.stack([image for _, image in results])
        alive = [worker for worker in ready if worker.name in drawn]
        for worker in alive:
            memory = worker.memory()
            found.memory_bytes[worker.name] = memory.pop("peak_bytes")
            found.memory[worker.name] = memory
        with task("timing components", len(plan)) as advance:
            for component, (feeds, owners) in plan.items():
                engines = _holders(owners, alive)
                found.component_ms[component] = time_component(component, feeds, engines, seed=seed)
                found.clock |= {name: worker.clock for name, worker in engines.items()}
                if component in BATCHED:
                    found.component_batch_ms[component] = time_batches(component, feeds, engines, seed=seed)
                advance()
        with task("drawing several at once", 1) as advance:
            found.batch_ms = time_images(alive, pairs, found.latency_ms, steps, seed=seed)
            advance()
    finally:
        for worker in workers:
            worker.stop()
    return found


def draw_all(
    workers: Sequence[Worker], draw: Callable[[Worker, int], Drawn], count: int, *, seed: int
) -> tuple[dict[str, list[Drawn]], dict[str, str]]:
    """Every image of every worker, interleaved: name -> (milliseconds, image) in order, and why others failed.

    If a ratio to `BASELINE` changed during the run, so that nothing can be judged by it, everything is drawn once more
    and the second run is what counts.
    """

    def run() -> tuple[dict[str, list[Drawn]], dict[str, str]]:
        with task("drawing images", count * len(workers)) as advance:
            return interleaved(workers, draw, count, seed=seed, after=advance)

    drawn, failed = run()
    times = {name: [milliseconds for milliseconds, _ in results] for name, results in drawn.items()}
    baseline = times.pop(BASELINE, None)
    if baseline is None or len(baseline) < FEWEST:
        return drawn, failed
    ratios = [speedup(baseline, own, BASELINE, seed=seed) for own in times.values()]
    noise = next((ratio["noise"] for ratio in ratios if ratio["noise"] is not None), None)
    if noise is None:
        return drawn, failed
    note(f"{noise}: drawing once more")
    workers = [worker for worker in workers if worker.name not in failed]
    again, more = run()
    return again, failed | more


def _warm(workers: Sequence[Worker], found: Measured, pair: tuple[str, int], steps: int | None) -> list[Worker]:
    """The first image of every loaded worker, then its warm-up; returns those that drew."""
    ready = []
    few = min(steps or WARM_UP_STEPS, WARM_UP_STEPS)
    with task("warming up", len(workers)) as advance:
        for worker in workers:
            if worker.name not in found.failed:
                try:
                    first, _ = worker.image(*pair, steps=steps)
                    found.cold_start_ms[worker.name] = {**worker.cold_start_ms, "first_image": first}
                    warm_up(lambda worker=worker: worker.image(*pair, steps=few)[0])  # type: ignore[misc]
                    ready.append(worker)
                except WorkerError as error:
                    found.failed[worker.name] = str(error)
                    worker.stop()
            advance()
    return ready


def _holders(owners: Mapping[str, str], alive: Sequence[Worker]) -> dict[str, Worker]:
    """`BASELINE` and engine ids, each with the worker that holds it."""
    by_name = {worker.name: worker for worker in alive}
    names = {BASELINE: BASELINE, **owners}
    return {engine: by_name[owner] for engine, owner in names.items() if owner in by_name}
