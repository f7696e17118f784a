"""A result for people and for machines: report.json, report.html, report.md, junit.xml, a table on the terminal."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ldm_deploy.artifact import atomic_write_bytes, atomic_write_json
from ldm_deploy.eval.budget import AGAINST
from ldm_deploy.eval.quality import describe_figure

KEPT, FAILED, NOT_MEASURED = 0, 3, 4
DASH = "–"


def exit_code(report: Mapping[str, Any]) -> int:
    """What `ldm-deploy eval` ends with: 0 kept, 3 a gate failed, 4 a required one was not measured.

    Against its budget the chosen variant counts; without one it is 4 if only a required measurement is missing, else 3.
    Against a stored result every variant counts, whether it is chosen or not.
    """
    against = [gate for row in report["variants"] for gate in row["gates"] if gate["name"] in AGAINST]
    missing = any(gate["required"] and gate["result"] == "not measured" for gate in against)
    worse = any(gate["result"] == "fail" for gate in against)
    code = _budget_code(report)
    return FAILED if worse else code or (NOT_MEASURED if missing else KEPT)


def _budget_code(report: Mapping[str, Any]) -> int:
    if report["chosen"] is not None:
        return KEPT
    for row in report["variants"]:
        gates = [gate for gate in row["gates"] if gate["name"] not in AGAINST]
        failed = any(gate["result"] == "fail" for gate in gates)
        missing = any(gate["required"] and gate["result"] == "not measured" for gate in gates)
        if row["status"] == "ok" and row["refused"] is None and missing and not failed:
            return NOT_MEASURED
    return FAILED


def write_report(result: Mapping[str, Any], out_dir: Path) -> None:
    """Write the four files into `out_dir`, report.json last. Images come from `evaluate_bundle`'s `Evaluation`."""
    out_dir = Path(out_dir)
    atomic_write_bytes(out_dir / "report.html", to_html(result).encode())
    atomic_write_bytes(out_dir / "report.md", to_markdown(result).encode())
    atomic_write_bytes(out_dir / "junit.xml", to_junit(result))
    atomic_write_json(out_dir / "report.json", dict(result))


def schema() -> dict[str, Any]:
    """The JSON schema of report.json."""
    loaded: dict[str, Any] = json.loads((resources.files("ldm_deploy.eval") / "report.schema.json").read_text("utf-8"))
    return loaded


def to_html(result: Mapping[str, Any]) -> str:
    """One page that needs nothing else: styles inside, images as data URIs."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "ms": format_latency,
        "ratio": format_ratio,
        "bytes": format_bytes,
        "figure": format_figure,
        "gate": format_gate_value,
        "against": against_note,
        "quality": describe_figure,
    }
    template = (resources.files("ldm_deploy.eval") / "report_template.html").read_text("utf-8")
    return environment.from_string(template).render(report=result, samples=_samples(result), table=table(result))


def _samples(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry per prompt and seed: its caption, and (name, data URI, figures) of every image drawn for it."""
    images: Mapping[str, np.ndarray] = getattr(result, "images", {})
    grid = getattr(result, "grid", None)
    if grid is None or not images:
        return []
    baseline = result["baseline"]["name"]
    order = [name for name in (baseline, *(row["name"] for row in result["variants"])) if name in images]
    scores = {row["name"]: row.get("images") or [] for row in result["variants"]}
    samples = []
    for index, (prompt, seed) in enumerate(grid.pairs):
        shown = []
        for name in order:
            own = scores.get(name, [])
            shown.append({"name": name, "uri": _data_uri(images[name][index]), "scores": own[index] if own else None})
        samples.append({"prompt": prompt, "seed": seed, "images": shown})
    return samples


def _data_uri(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of the summary: the baseline, then every variant. What was not measured is a dash."""
    heads = ["variant", "ms per image", "speed-up", "PSNR dB", "SSIM", "LPIPS", "memory", "size", "result"]
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


def against_note(result: Mapping[str, Any]) -> str | None:
    """With which stored result this one was compared, and how; None if with none."""
    against = result.get("against")
    if against is None:
        return None
    new = f"; not in it: {', '.join(against['new'])}" if against["new"] else ""
    return f"{against['note']}{new}"


def print_table(result: Mapping[str, Any]) -> None:
    """The summary, what was chosen and why, and every gate that did not pass, on standard output."""
    from rich.console import Console
    from rich.table import Table

    # Off a terminal there is no width to fit; 120 leaves the table in one piece.
    unlimited = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(markup=False, highlight=False, width=120 if unlimited else None)
    heads, rows = table(result)
    shown = Table(box=None, pad_edge=False)
    for index, head in enumerate(heads):
        shown.add_column(head, justify="left" if index in (0, len(heads) - 1) else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for row in result["variants"]:
        if explanation(row):
            console.print(f"{row['name']}: {explanation(row)}")
        for gate in row["gates"]:
            if gate["result"] != "pass":
                optional = "" if gate["required"] else " (not required)"
                console.print(f"{row['name']}: {gate['name']} {gate['result']}{optional}: {gate['reason']}")
    if result["baseline"]["reason"]:
        console.print(f"baseline {result['baseline']['status']}: {result['baseline']['reason']}")
    console.print(f"chosen: {result['chosen'] or 'none'}. {result['why']}")
    if against_note(result):
        console.print(against_note(result))


def to_markdown(result: Mapping[str, Any]) -> str:
    """A summary for a pull request."""
    heads, rows = table(result)
    lines = [f"**Chosen: {result['chosen'] or 'none'}.** {_cell(result['why'])}", ""]
    lines += [_cell(note), ""] if (note := against_note(result)) else []
    lines += [_row(heads), _row(["---", *["---:"] * (len(heads) - 2), "---"])]
    lines += [_row(row) for row in rows]
    lines += ["", *(f"- {row['name']}: {_cell(why)}" for row in result["variants"] if (why := explanation(row)))]
    lines += ["", _row(["variant", "gate", "limit", "value", "result", "reason"]), _row(["---"] * 6)]
    for row in result["variants"]:
        for gate in row["gates"]:
            value = format_gate_value(gate)
            lines.append(
                _row([row["name"], gate["name"], gate["limit_text"], value, gate["result"], gate["reason"] or ""])
            )
    machine, protocol = result["machine"], result["protocol"]
    lines += [
        "",
        f"{machine['cpu']}, {protocol['threads']} threads, {protocol['sampler']}, {protocol['steps']} steps, guidance "
        f"{protocol['guidance_scale']}, {len(protocol['prompts'])} prompts x {len(protocol['seeds'])} seeds, "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    ]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def to_junit(result: Mapping[str, Any]) -> bytes:
    """JUnit XML: a suite per variant, a test per gate. A required gate that was not measured is an error."""
    root = ElementTree.Element("testsuites", name="ldm-deploy eval")
    for row in result["variants"]:
        suite = ElementTree.SubElement(root, "testsuite", name=row["name"])
        counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}

        def case(
            name: str, kind: str | None, message: str | None, suite: Any = suite, counts: Any = counts, row: Any = row
        ) -> None:
            element = ElementTree.SubElement(suite, "testcase", classname=row["name"], name=name)
            counts["tests"] += 1
            if kind is not None:
                ElementTree.SubElement(element, kind, message=message or "")
                counts[{"failure": "failures", "error": "errors", "skipped": "skipped"}[kind]] += 1

        if row["status"] != "ok":
            case("runs", "error", row["reason"] or row["refused"])
        for gate in row["gates"]:
            missing = "error" if gate["required"] else "skipped"
            case(gate["name"], {"pass": None, "fail": "failure"}.get(gate["result"], missing), gate["reason"])
        if row["refused"] is not None:
            case("do no harm", "skipped", row["refused"])
        for key, number in counts.items():
            suite.set(key, str(number))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


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
    if number is None:
        return DASH
    return f"{number / 2**20:.1f} MiB" if number < 100 * 2**20 else f"{number / 2**20:.0f} MiB"


def format_figure(figure: Mapping[str, Any] | None, digits: int = 3) -> str:
    """The mean over images."""
    if figure is None or figure["mean"] is None:
        return DASH
    return f"{figure['mean']:.{digits}f}"


def format_gate_value(gate: Mapping[str, Any], key: str = "value") -> str:
    """The value or the limit of a gate, in a unit for people."""
    number = gate[key]
    if number is None:
        return DASH
    return format_bytes(number) if gate["name"] in ("peak_memory_max", "size_max") else f"{number:.4g}"
