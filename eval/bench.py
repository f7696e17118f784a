"""Latency of what is in a bundle: every engine on a recorded input, every variant end to end. No torch, no gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_deploy.errors import BundleError
from ldm_deploy.eval.latency import Worker, compare_engines, interleaved, machine, start_all, summary
from ldm_deploy.eval.metrics import ratio_ci
from ldm_deploy.eval.parity import read_probes
from ldm_deploy.progress import task

PROMPT = "red apple"


def bench_bundle(
    bundle: Path,
    *,
    threads: int | None = None,
    seed: int = 0,
    engine_rounds: int = 30,
    image_rounds: int = 5,
    time_limit_s: float = 20.0,
) -> dict[str, Any]:
    """Measure a bundle in interleaved rounds, one worker process per engine, one active at a time.

    Engines of one component run on the first of the bundle's probes with the default size; variants draw `PROMPT`
    with their own steps. `time_limit_s` bounds each component, and the variants together. Returns `machine`,
    `components` and `variants`; each row has `latency_ms`, and `speedup` against the first row of its kind (fp32
    comes first), or a `reason` where it could not be measured. Raises `BundleError` for a damaged bundle.
    """
    from ldm_deploy.runtime.bundle import read_bundle

    data = read_bundle(bundle).data
    by_component: dict[str, list[dict[str, Any]]] = {}
    for engine in sorted(data["engines"], key=lambda engine: engine["precision"] != "fp32"):
        by_component.setdefault(engine["component"], []).append(engine)
    components: list[dict[str, Any]] = []
    with task("measuring", len(by_component) + image_rounds) as advance:
        for component, engines in by_component.items():
            specs = {
                engine["id"]: {
                    "kind": "engine",
                    "runtime": engine["runtime"],
                    "path": str(bundle / engine["files"][0]),
                }
                for engine in engines
            }
            feeds = _feeds(bundle, component)
            limits: dict[str, Any] = {"rounds": engine_rounds, "time_limit_s": time_limit_s}
            found = compare_engines(specs, feeds, threads=threads, seed=seed, **limits)
            rows = _rows(specs, found["latency_ms"], found["speedup"], found["failed"])
            components += [{"component": component, **row} for row in rows]
            advance()
        variants = _bench_variants(bundle, data, threads, seed, image_rounds, time_limit_s, advance)
    return {
        "format": 1,
        "bundle": str(bundle),
        "machine": machine(threads),
        "prompt": PROMPT,
        "components": components,
        "variants": variants,
    }


def _feeds(bundle: Path, component: str) -> dict[str, Any]:
    path = bundle / "probes" / f"{component}.safetensors"
    if not path.is_file():
        raise BundleError(f"{bundle} has no inputs to measure {component} with ({path} is missing); export it again")
    return read_probes(path)[0].inputs


def _bench_variants(
    bundle: Path, data: dict[str, Any], threads: int | None, seed: int, rounds: int, time_limit_s: float, advance: Any
) -> list[dict[str, Any]]:
    ordered = sorted(data["variants"], key=lambda variant: not variant["name"].startswith("fp32"))
    names = [variant["name"] for variant in ordered]
    workers = [
        Worker(name, {"kind": "variant", "bundle": str(bundle.absolute()), "variant": name}, threads=threads)
        for name in names
    ]
    try:
        failed = start_all(workers)
        ready = [worker for worker in workers if worker.name not in failed]
        for worker in ready:
            worker.image(PROMPT, seed, steps=2)  # the first images pay for memory and threads
        times, broken = interleaved(
            ready, lambda worker, _: worker.image(PROMPT, seed)[0], rounds, seed=seed, time_limit_s=time_limit_s
        )
    finally:
        for worker in workers:
            worker.stop()
    advance(rounds)
    latency = {name: summary(samples) for name, samples in times.items()}
    first = names[0] if names else ""
    speedup = {
        name: {**ratio_ci(times[first], samples, seed=seed), "versus": first}
        for name, samples in times.items()
        if name != first and first in times
    }
    return _rows(names, latency, speedup, {**failed, **broken})


def _rows(names: Any, latency: dict[str, Any], speedup: dict[str, Any], failed: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "latency_ms": latency.get(name), "speedup": speedup.get(name), "reason": failed.get(name)}
        for name in names
    ]


def print_bench(result: dict[str, Any]) -> None:
    """A table on standard output."""
    threads = result["machine"]["threads"]
    print(f"{result['machine']['cpu']}, {threads} threads; ms: median (5 % to 95 %)")
    for title, rows in (("engines", result["components"]), ("images", result["variants"])):
        print(title)
        for row in rows:
            print(f"  {row['name']:40} {_cells(row)}")


def _cells(row: dict[str, Any]) -> str:
    latency, speedup = row["latency_ms"], row["speedup"]
    if latency is None:
        return f"not measured: {row['reason']}"
    text = f"{latency['median']:9.2f} ({latency['p5']:.2f} to {latency['p95']:.2f})"
    if speedup is None:
        return text
    low, high = speedup["ci95_low"], speedup["ci95_high"]
    interval = "one sample" if low is None else f"{low:.2f} to {high:.2f}"
    return f"{text}  {speedup['median']:.2f} times as fast as {speedup['versus']} ({interval})"
