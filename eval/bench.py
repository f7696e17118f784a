"""Latency of what is in a bundle: every engine on a recorded input, every variant end to end. No torch, no gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_deploy.eval.grid import Grid
from ldm_deploy.eval.latency import summary
from ldm_deploy.eval.machine import machine, usable_threads
from ldm_deploy.eval.measure import component_plan, measure
from ldm_deploy.eval.rows import process_figures, timing_figures
from ldm_deploy.eval.speedup import speedup
from ldm_deploy.eval.tables import format_bytes, format_cold_start, format_memory, format_throughput

PROMPT = "red apple"
IMAGES = 5  # per variant


def bench_bundle(
    bundle: Path, *, threads: int | None = None, seed: int = 0, images: int = IMAGES, steps: int | None = None
) -> dict[str, Any]:
    """Measure a bundle in interleaved rounds, one worker process per variant, one active at a time.

    Variants draw the model's first prompt with `images` seeds and `steps` (their own by default); engines run on the
    bundle's probes. Returns `machine`, `components` and `variants`. Each row has `latency_ms`, and `speedup` against
    the first row of its kind (fp32 comes first); both are None where `reason` says why; see `rows.timing_figures` and
    `rows.process_figures` for the rest. Raises `BundleError` for a
    damaged bundle.
    """
    from ldm_deploy.runtime.bundle import read_bundle

    data = read_bundle(bundle).data
    variants = sorted(data["variants"], key=lambda variant: not variant["name"].startswith("fp32"))
    specs = {v["name"]: {"kind": "variant", "bundle": str(bundle), "variant": v["name"]} for v in variants}
    plan = component_plan({**data, "variants": variants}, bundle)
    prompt = data["model"].get("prompts", {}).get("report", [PROMPT])[0]
    grid = Grid((prompt,), tuple(range(seed, seed + images)))
    found = measure(specs, grid, plan, threads=threads or usable_threads(), seed=seed, steps=steps)
    components: list[dict[str, Any]] = []
    for component, (feeds, owners) in plan.items():
        shapes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in feeds.items())
        reasons = {engine: found.failed.get(owner, "it does not run") for engine, owner in owners.items()}
        for row in _rows(found.component_ms.get(component, {}), reasons, seed):
            more = timing_figures(component, row["name"], found)
            components.append({"component": component, "inputs": shapes, **row, **more})
    variants = _rows(found.latency_ms, {name: found.failed.get(name, "it does not run") for name in specs}, seed)
    return {
        "format": 1,
        "bundle": str(bundle),
        "machine": machine(threads),
        "prompt": prompt,
        "components": components,
        "variants": [{**row, **process_figures(row["name"], found)} for row in variants],
    }


def _rows(samples_ms: dict[str, list[float]], reasons: dict[str, str], seed: int) -> list[dict[str, Any]]:
    """One row per key of `reasons`, which says why where there are no samples."""
    first = next(iter(reasons), "")
    rows = []
    for name, reason in reasons.items():
        samples, versus = samples_ms.get(name), samples_ms.get(first)
        faster = None
        if samples and versus and name != first:
            faster = speedup(versus, samples, first, seed=seed)
        latency = summary(samples) if samples else None
        rows.append({"name": name, "latency_ms": latency, "speedup": faster, "reason": None if samples else reason})
    return rows


def print_bench(result: dict[str, Any]) -> None:
    """A table on standard output."""
    print(f"{result['machine']['cpu']}, {result['machine']['threads']} threads; ms: median (5 % to 95 %)")
    shown = ""
    for row in result["components"]:
        if row["component"] != shown:
            shown = row["component"]
            print(f"{shown}: {row['inputs']}")
        print(f"  {row['name']:40} {_cells(row)}")
    print(f"images: {result['prompt']!r}")
    for row in result["variants"]:
        print(f"  {row['name']:40} {_cells(row)}")
    print("by rows or images at once:")
    for row in (*result["components"], *result["variants"]):
        if any(entry["per_s"] is not None for entry in row["throughput"]):
            print(f"  {row['name']:40} {format_throughput(row['throughput'])}")
    print("cold start, and memory (resident set):")
    for row in result["variants"]:
        if row["latency_ms"] is not None:
            print(f"  {row['name']:40} {format_cold_start(row['cold_start_ms'])}")
            print(f"  {'':40} {format_memory(row['memory'])}; peak {format_bytes(row['peak_memory_bytes'])}")


def _cells(row: dict[str, Any]) -> str:
    latency, faster = row["latency_ms"], row["speedup"]
    if latency is None:
        return f"not measured: {row['reason']}"
    text = f"{latency['median']:9.2f} ({latency['p5']:.2f} to {latency['p95']:.2f})"
    if faster is None:
        return text
    low, high = faster["ci95_low"], faster["ci95_high"]
    interval = "one sample" if low is None else f"{low:.2f} to {high:.2f}"
    noise = f"; {faster['noise']}" if faster["noise"] else ""
    return f"{text}  {faster['median']:.2f} times as fast as {faster['versus']} ({interval}){noise}"
