"""What the workers are asked: every image of the grid from every variant, then each component on recorded inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import ParityError
from ldm_deploy.eval.grid import Grid
from ldm_deploy.eval.latency import LEAST_ROUNDS, Worker, WorkerError, interleaved, start_all, warm_up
from ldm_deploy.eval.parity import Probe, read_probes
from ldm_deploy.progress import task

BASELINE = "fp32-torch-cpu"
COMPONENT_ROUNDS = 30
COMPONENT_SECONDS = 6.0  # per component, all engines together
WARM_UP_STEPS = 4  # sampler steps of a warm-up image: the U-Net's calls are what has to settle

Record = dict[str, Any]


class Measured:
    """What the workers gave, by name of variant (or `BASELINE`)."""

    def __init__(self) -> None:
        self.images: dict[str, np.ndarray] = {}
        self.latency_ms: dict[str, list[float]] = {}
        self.memory_bytes: dict[str, int] = {}
        self.load_ms: dict[str, float | None] = {}
        self.component_ms: dict[str, dict[str, list[float]]] = {}  # component -> engine id (or BASELINE) -> samples
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
    if component == "unet" and batch == 1:
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
        found.load_ms = {worker.name: worker.load_ms for worker in workers}
        ready = _warm(workers, found, pairs[0], steps)

        def draw(worker: Worker, index: int) -> tuple[float, np.ndarray]:
            prompt, number = pairs[index]
            return worker.image(prompt, number, steps=steps)

        with task("drawing images", len(pairs) * len(ready)) as advance:
            drawn, failed = interleaved(ready, draw, len(pairs), seed=seed, after=advance)
        found.failed |= failed
        for name, results in drawn.items():
            found.latency_ms[name] = [milliseconds for milliseconds, _ in results]
            found.images[name] = np.stack([image for _, image in results])
        alive = [worker for worker in ready if worker.name in drawn]
        for worker in alive:
            found.memory_bytes[worker.name] = worker.peak_memory_bytes()
        with task("timing components", len(plan)) as advance:
            for component, (feeds, owners) in plan.items():
                found.component_ms[component] = _time_component(component, feeds, owners, alive, seed)
                advance()
    finally:
        for worker in workers:
            worker.stop()
    return found


def _warm(workers: Sequence[Worker], found: Measured, pair: tuple[str, int], steps: int | None) -> list[Worker]:
    """Warm up every loaded worker; returns those that drew."""
    ready = []
    few = min(steps or WARM_UP_STEPS, WARM_UP_STEPS)
    with task("warming up", len(workers)) as advance:
        for worker in workers:
            if worker.name not in found.failed:
                try:
                    warm_up(lambda worker=worker: worker.image(*pair, steps=few)[0])  # type: ignore[misc]
                    ready.append(worker)
                except WorkerError as error:
                    found.failed[worker.name] = str(error)
                    worker.stop()
            advance()
    return ready


def _time_component(
    component: str, feeds: dict[str, np.ndarray], owners: Mapping[str, str], alive: Sequence[Worker], seed: int
) -> dict[str, list[float]]:
    """engine id (and `BASELINE`) -> milliseconds per round. An engine that fails here is left out."""
    by_name = {worker.name: worker for worker in alive}
    engines = {engine: by_name[owner] for engine, owner in owners.items() if owner in by_name}
    if BASELINE in by_name:
        engines[BASELINE] = by_name[BASELINE]
    stands = [Stand(engine, worker, component, feeds) for engine, worker in engines.items()]
    stands = [stand for stand in stands if stand.warm()]
    samples, _ = interleaved(
        stands,
        lambda stand, _: stand.run(),
        COMPONENT_ROUNDS,
        seed=seed,
        time_limit_s=COMPONENT_SECONDS,
        least=LEAST_ROUNDS,
    )
    return samples


class Stand:
    """One engine inside a worker that holds a whole pipeline."""

    def __init__(self, name: str, worker: Worker, component: str, feeds: dict[str, np.ndarray]) -> None:
        self.name, self.worker, self.component = name, worker, component
        self.key = worker.put(feeds)

    def run(self) -> float:
        return self.worker.run(self.key, component=self.component)[0]

    def warm(self) -> bool:
        try:
            warm_up(self.run)
        except WorkerError:
            return False
        return True

    def stop(self) -> None:
        """The worker serves other components; it stays."""
