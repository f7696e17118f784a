"""From measurements to the rows of report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_deploy.eval.grid import Grid
from ldm_deploy.eval.latency import summary
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.measure import BASELINE, Measured
from ldm_deploy.eval.memory import fp32_size_bytes, size_bytes
from ldm_deploy.eval.quality import compare_images, constant_images, flat_reason, nothing_measured
from ldm_deploy.eval.sketch import sketch_images
from ldm_deploy.eval.speedup import speedup
from ldm_deploy.eval.throughput import throughput
from ldm_deploy.models.sources import weight_files

COARSEST_FIRST = ("w4", "w8", "int8", "mixed", "bf16", "fp16", "fp32")  # a variant is named after its coarsest engine

Row = dict[str, Any]


def baseline_row(source: Path | None, reason: str | None, found: Measured) -> Row:
    """report.json's `baseline`: the fp32 torch reference. `reason`: why there is none."""
    row: Row = {"name": BASELINE, "status": "not measured", "reason": reason, "latency_ms": None, "load_ms": None}
    row |= {"peak_memory_bytes": None, "size_bytes": None, "stored_bytes": None, "components": []}
    if source is None:
        return row
    weights = weight_files(source)
    row["size_bytes"], row["stored_bytes"] = fp32_size_bytes(weights), size_bytes(weights)
    if BASELINE in found.failed:
        return row | {"status": "failed", "reason": found.failed[BASELINE]}
    components = [
        {"name": component, "latency_ms": summary(samples[BASELINE]), **timing_figures(component, BASELINE, found)}
        for component, samples in found.component_ms.items()
        if BASELINE in samples
    ]
    return row | {
        "status": "ok",
        "latency_ms": summary(found.latency_ms[BASELINE]),
        "load_ms": found.load_ms[BASELINE],
        **process_figures(BASELINE, found),
        "components": components,
    }


def variant_row(bundle: Mapping[str, Any], root: Path, variant: Mapping[str, Any], found: Measured, seed: int) -> Row:
    """One entry of `variants`, still without quality, comparisons and gates. `bundle`: the content of bundle.json."""
    engines = {engine["id"]: engine for engine in bundle["engines"]}
    own = [engines[name] for name in variant["engines"]]
    main = next((engine for engine in own if engine["component"] in ("unet", "pipeline")), own[0])
    name = variant["name"]
    files = [root / file for engine in own for file in engine["files"]]
    row = empty_row(name, main["runtime"], main["device"], coarsest([engine["precision"] for engine in own]))
    row |= {key: variant.get(key) for key in ("sampler", "steps", "guidance_scale")}
    row["size_bytes"] = size_bytes(files)
    row["components"] = [component_row(engine, bundle, found, seed) for engine in own]
    if name in found.failed:
        return row | {"status": "failed", "reason": found.failed[name]}
    row |= {
        "latency_ms": summary(found.latency_ms[name]),
        "load_ms": found.load_ms[name],
        **process_figures(name, found),
    }
    if BASELINE in found.latency_ms:
        row["speedup"] = speedup(found.latency_ms[BASELINE], found.latency_ms[name], BASELINE, seed=seed)
    return row


def process_figures(name: str, found: Measured) -> Row:
    """What the process of a variant or the baseline gave beside its latency."""
    return {
        "peak_memory_bytes": found.memory_bytes.get(name),
        "cold_start_ms": found.cold_start_ms.get(name),
        "memory": found.memory.get(name),
        "throughput": throughput(found.batch_ms, name),
    }


def timing_figures(component: str, engine: str, found: Measured) -> Row:
    """What is known of the timing of an engine beside its latency."""
    batches = found.component_batch_ms.get(component, {})
    return {"clock": found.clock.get(engine), "throughput": throughput(batches, engine)}


def empty_row(name: str, runtime: str, device: str, precision: str) -> Row:
    """A row with nothing measured."""
    return {
        "name": name,
        "runtime": runtime,
        "device": device,
        "precision": precision,
        "status": "ok",
        "reason": None,
        "steps": None,
        "guidance_scale": None,
        "components": [],
        "quality": None,
        "latency_ms": None,
        "load_ms": None,
        "cold_start_ms": None,
        "memory": None,
        "throughput": [],
        "speedup": None,
        "comparisons": [],
        "peak_memory_bytes": None,
        "size_bytes": None,
        "gates": [],
        "refused": None,
    }


def coarsest(precisions: Sequence[str]) -> str:
    """The precision a variant is called by: that of its coarsest engine."""
    return min(
        precisions, key=lambda name: COARSEST_FIRST.index(name) if name in COARSEST_FIRST else len(COARSEST_FIRST)
    )


def component_row(engine: Mapping[str, Any], bundle: Mapping[str, Any], found: Measured, seed: int) -> Row:
    """An engine's entry in `components`, compared with its fp32 sibling. `bundle`: the content of bundle.json."""
    samples = found.component_ms.get(engine["component"], {})
    own = samples.get(engine["id"])
    versus, other = _sibling(engine, bundle, samples)
    row = {
        "name": engine["component"],
        "engine": engine["id"],
        "precision": engine["precision"],
        "precision_found": engine.get("precision_found"),
        "size_bytes": engine.get("size_bytes"),
        "parity": engine.get("parity"),
        "latency_ms": None if own is None else summary(own),
        **timing_figures(engine["component"], engine["id"], found),
        "speedup": None,
        "costly_ops": None,
    }
    if own is not None and other is not None:
        paired = min(len(own), len(other))
        row["speedup"] = speedup(other[:paired], own[:paired], versus, seed=seed)
    return row


def _sibling(
    engine: Mapping[str, Any], bundle: Mapping[str, Any], samples: Mapping[str, list[float]]
) -> tuple[str, list[float] | None]:
    """What an engine is compared with: the fp32 engine of the same component, runtime and device, else the baseline."""
    if engine["precision"] != "fp32":
        for other in bundle["engines"]:
            alike = all(other[key] == engine[key] for key in ("component", "runtime", "device"))
            if alike and other["precision"] == "fp32" and other["id"] in samples:
                return f"fp32-{other['runtime']}-{other['device']}", samples[other["id"]]
    return BASELINE, samples.get(BASELINE)


def add_quality(row: Row, found: Measured, grid: Grid, lpips: Lpips, seed: int) -> None:
    """Fill in `quality` and `images`; a variant that draws flat images where the baseline does not has failed."""
    name = row["name"]
    if name in found.images:
        sketches = zip(grid.pairs, sketch_images(found.images[name]), strict=True)
        row["images"] = [{"prompt": prompt, "seed": number, "sketch": text} for (prompt, number), text in sketches]
    if name not in found.images or BASELINE not in found.images:
        whose = name if name not in found.images else BASELINE
        row["quality"] = nothing_measured(f"{whose} drew no images; its row says why", lpips)
        return
    reference, candidate = found.images[BASELINE], found.images[name]
    row["quality"], entries = compare_images(reference, candidate, grid.pairs, lpips, seed=seed)
    row["images"] = [entry | sketched for entry, sketched in zip(entries, row["images"], strict=True)]
    flat = flat_reason(constant_images(candidate, grid.pairs), constant_images(reference, grid.pairs))
    if flat is not None:
        row |= {"status": "failed", "reason": flat}


def add_comparisons(row: Row, rows: Sequence[Row], found: Measured, seed: int) -> None:
    """End to end against the variants of the same runtime and device that lose less: they drew in the same rounds.

    These are fp32 and, for what is quantized, bf16 and fp16.
    """
    finer = ("fp32",) if row["precision"] in ("bf16", "fp16") else ("fp32", "bf16", "fp16")
    if row["precision"] == "fp32" or row["name"] not in found.latency_ms:
        return
    for other in rows:
        alike = all(other[key] == row[key] for key in ("runtime", "device"))
        if alike and other is not row and other["precision"] in finer and other["name"] in found.latency_ms:
            ratio = speedup(found.latency_ms[other["name"]], found.latency_ms[row["name"]], other["name"], seed=seed)
            row["comparisons"].append({"scope": "end to end", **ratio})


def add_refused(rows: Sequence[Row], refused: Sequence[Mapping[str, Any]]) -> list[Row]:
    """What an earlier stage built and refused: marked in its own row if it has one, else a row more."""
    found = list(rows)
    by_name = {row["name"]: row for row in found}
    for entry in refused:
        name = str(entry["name"])
        if name in by_name:
            by_name[name]["refused"] = entry["reason"]
            continue
        row = empty_row(name, entry.get("runtime", ""), entry.get("device", ""), entry.get("precision", ""))
        parity = entry.get("parity")
        wrong = parity is not None and not parity.get("passed", True)
        row |= {
            "status": "failed" if wrong else "ok",
            "refused": entry["reason"],
            "size_bytes": entry.get("size_bytes"),
        }
        row["reason"] = "it was not drawn with: an earlier stage refused it"
        row["quality"] = nothing_measured("refused before images were drawn", None)
        row["components"] = [
            {
                "name": entry.get("component", ""),
                "engine": name,
                "precision": entry.get("precision"),
                "precision_found": entry.get("precision_found"),
                "size_bytes": entry.get("size_bytes"),
                "parity": parity,
                "latency_ms": None,
                "clock": None,
                "throughput": [],
                "speedup": entry.get("speedup"),
                "costly_ops": entry.get("costly_ops"),
            }
        ]
        by_name[name] = row
        found.append(row)
    return found
