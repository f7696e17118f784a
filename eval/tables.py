"""What a reader sees in a cell: the summary table, verdicts, and figures as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ldm_deploy.eval.budget import AGAINST

DASH = "–"


class Label(NamedTuple):
    """How a figure of `quality` is shown. `more`: whether more is better; None where neither is."""

    name: str
    digits: int = 4
    more: bool | None = None
    meaning: str = ""


# What has no entry here is shown under its own name.
LABELS = {
    "psnr_db": Label("PSNR, dB", 1, True, "peak 255; identical images count as 100 dB"),
    "ssim": Label("SSIM", 4, True, "structural similarity, 1 for equal images"),
    "ms_ssim": Label("MS-SSIM", 4, True, "the same over several scales"),
    "lpips": Label("LPIPS", 4, False, "perceptual distance, 0 for equal images"),
    "delta_e2000": Label("ΔE2000", 3, False, "mean difference in colour; about 1 is just noticeable"),
    "tile_psnr_db": Label("worst tile, dB", 1, True, "PSNR of each image's worst tile"),
    "colour_shift": Label("colour shift", 3, None, "signed, in grey levels; best near 0"),
    "frechet_distance": Label("Fréchet distance", 4, False, "between the sets of images"),
    "kernel_distance": Label("kernel distance", 6, False, "between the sets of images"),
}
SHOWN = ("mean", "value", "ci95", "worst", "n", "worst_image", "reason", "peak")  # what has a place in the table


def quality_rows(quality: Mapping[str, Any]) -> list[tuple[list[str], list[str]]]:
    """Per figure: its name, mean, interval, worst, number of images, worst image, meaning or reason; and what else.

    A figure of three channels has a row for each.
    """
    rows = []
    for key, figure in quality.items():
        label = LABELS.get(key, Label(key))
        place = figure.get("worst_image") or {}
        where = place.get("file") or (f"{place['prompt']}, seed {place['seed']}" if place else DASH)
        better = {True: "; more is better", False: "; less is better", None: ""}[label.more]
        meaning = f"not measured: {figure['reason']}" if figure.get("reason") else label.meaning + better
        rest = [f"{name}: {_plain(value)}" for name, value in figure.items() if name not in SHOWN and value is not None]
        mean, worst, interval = figure.get("mean", figure.get("value")), figure.get("worst"), figure.get("ci95")
        parts = [("", mean, interval, worst)]
        if isinstance(mean, list):
            parts = list(zip((", red", ", green", ", blue"), mean, interval or [None] * 3, worst, strict=True))
        for suffix, *values in parts:
            cells = [_number(value, label.digits) for value in values]
            rows.append(([label.name + suffix, *cells, str(figure.get("n", DASH)), where, meaning], rest))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value[:12]}…" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _number(value: Any, digits: int) -> str:
    """A number or an interval."""
    if value is None:
        return DASH
    return " to ".join(f"{end:.{digits}f}" for end in (value if isinstance(value, list) else [value]))


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the summary: the baseline, then every variant. What was not measured is a dash."""
    unit = "call" if "component" in result["protocol"] else "image"
    heads = ["variant", f"ms per {unit}", "speed-up", "PSNR dB", "SSIM", "LPIPS", "memory", "size", "result"]
    baseline = result["baseline"]
    rows = [
        [
            baseline["name"],
            format_latency(baseline["latency_ms"]),
            "1" if baseline["latency_ms"] else DASH,
            *[DASH] * 3,
            format_bytes(baseline["peak_memory_bytes"]),
            format_bytes(baseline["size_bytes"]),
            "baseline" if baseline["status"] == "ok" else baseline["status"],
        ]
    ]
    for row in result["variants"]:
        quality = row["quality"] or {}
        rows.append(
            [
                row["name"],
                format_latency(row["latency_ms"]),
                format_ratio(row["speedup"]),
                format_figure(quality.get("psnr_db"), 1),
                format_figure(quality.get("ssim"), 3),
                format_figure(quality.get("lpips"), 4),
                format_bytes(row["peak_memory_bytes"]),
                format_bytes(row["size_bytes"]),
                verdict(row, result["chosen"]),
            ]
        )
    return heads, rows


def verdict(row: Mapping[str, Any], chosen: str | None) -> str:
    """One or two words for the last column."""
    worse = [gate["name"] for gate in row["gates"] if gate["name"] in AGAINST and gate["result"] == "fail"]
    if worse:
        return f"worse than stored: {', '.join(worse)}"
    if row["name"] == chosen:
        return "chosen"
    if row["refused"] is not None:
        return "refused"
    if row["status"] != "ok":
        return str(row["status"])
    for result in ("fail", "not measured"):
        names = [
            gate["name"] for gate in row["gates"] if gate["result"] == result and (result == "fail" or gate["required"])
        ]
        if names:
            return f"{result}: {', '.join(names)}"
    return "kept"


def explanation(row: Mapping[str, Any]) -> str | None:
    """Why a row has no figures, or why it was refused."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    return f"refused: {row['refused']}" if row["refused"] is not None else None


def count_gates(result: Mapping[str, Any]) -> dict[str, int]:
    """How many gates of all variants passed, failed and were not measured."""
    results = [gate["result"] for row in result["variants"] for gate in row["gates"]]
    return {name: results.count(name) for name in ("pass", "fail", "not measured")}


def open_gates(result: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """(row, gate) of those that did not pass: first what failed, then what was not measured."""
    found = [(row, gate) for row in result["variants"] for gate in row["gates"] if gate["result"] != "pass"]
    return sorted(found, key=lambda pair: pair[1]["result"] != "fail")


def reasons(result: Mapping[str, Any]) -> list[str]:
    """`why` in parts: why this one, then why not each of the others."""
    return re.split(r" (?=Not chosen: )", result["why"])


def format_latency(latency: Mapping[str, Any] | None) -> str:
    if latency is None:
        return DASH
    digits = 0 if latency["median"] >= 100 else 1 if latency["median"] >= 10 else 2
    return f"{latency['median']:.{digits}f}"


def format_ratio(ratio: Mapping[str, Any] | None) -> str:
    """`2.10x (2.00–2.20)`"""
    if ratio is None:
        return DASH
    if ratio["ci95_low"] is None:
        return f"{ratio['median']:.2f}x"
    return f"{ratio['median']:.2f}x ({ratio['ci95_low']:.2f}{DASH}{ratio['ci95_high']:.2f})"


def format_bytes(number: float | None) -> str:
    """Always MiB, so that a column can be compared and sorted."""
    if number is None:
        return DASH
    return f"{number / 2**20:.1f} MiB" if number < 100 * 2**20 else f"{number / 2**20:.0f} MiB"


def format_figure(figure: Mapping[str, Any] | None, digits: int = 3) -> str:
    """The mean over images."""
    if figure is None or figure.get("mean") is None:
        return DASH
    return f"{figure['mean']:.{digits}f}"


def format_gate_value(gate: Mapping[str, Any], key: str = "value") -> str:
    """The value or the limit of a gate, in a unit for people."""
    number = gate[key]
    if number is None:
        return DASH
    return format_bytes(number) if gate["name"] in ("peak_memory_max", "size_max") else f"{number:.4g}"


def format_cold_start(times_ms: Mapping[str, float] | None) -> str:
    """`1240 ms: process 80, import 210, load 150, first image 800`"""
    if times_ms is None:
        return DASH
    parts = ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in times_ms.items())
    return f"{sum(times_ms.values()):.0f} ms: {parts}"


def format_memory(memory: Mapping[str, Any] | None) -> str:
    """What a process holds, apart."""
    if memory is None:
        return DASH
    parts = {"libraries": "before_load_bytes", "weights": "weights_bytes", "activations": "activations_bytes"}
    text = ", ".join(f"{name} {format_bytes(memory[key])}" for name, key in parts.items())
    gpu = (
        memory["gpu_reason"]
        if memory["gpu_peak_bytes"] is None
        else f"at most {format_bytes(memory['gpu_peak_bytes'])}"
    )
    return f"{text}; GPU: {gpu}"


def format_throughput(rows: Sequence[Mapping[str, Any]]) -> str:
    """`1: 85.2, 2: 97.0, 4: 103 per second`: per second, by batch."""
    rounded = {row["batch"]: float(f"{row['per_s']:.3g}") for row in rows if row["per_s"] is not None}
    measured = [f"{batch}: {per_s:g}" for batch, per_s in rounded.items()]
    return f"{', '.join(measured)} per second" if measured else DASH
