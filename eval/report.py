"""A result for people and for machines: report.json, report.html, report.md, junit.xml, a table on the terminal.

The page is made in `page.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ldm_deploy.artifact import atomic_write_bytes, atomic_write_json
from ldm_deploy.eval.budget import AGAINST
from ldm_deploy.eval.page import to_html
from ldm_deploy.eval.tables import count_gates, format_gate_value, open_gates, reasons, table

KEPT, FAILED, NOT_MEASURED = 0, 3, 4


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
    for cells in rows:
        shown.add_row(*cells)
    console.print(shown)
    if result["baseline"]["reason"]:
        console.print(f"baseline {result['baseline']['status']}: {result['baseline']['reason']}")
    for row, gate in open_gates(result):
        optional = "" if gate["required"] else " (not required)"
        console.print(f"{row['name']}: {gate['name']} {gate['result']}{optional}: {gate['reason']}")
    why, *others = reasons(result)
    console.print(f"chosen: {result['chosen'] or 'none'}. {why}")
    for sentence in others:
        console.print(sentence)
    if "against" in result:
        console.print(result["against"]["note"])


def to_markdown(result: Mapping[str, Any]) -> str:
    """A summary for a pull request: the choice, the table, and the gates that did not pass."""
    heads, rows = table(result)
    why, *others = reasons(result)
    lines = [f"**Chosen: {result['chosen'] or 'none'}.** {_cell(why)}", ""]
    if "against" in result:
        lines += [_cell(f"{result['against']['note']}."), ""]
    lines += [_row(heads), _row(["---", *["---:"] * (len(heads) - 2), "---"])]
    lines += [_row(row) for row in rows]
    lines += ["", *(f"- {_cell(sentence)}" for sentence in others)]
    counts = count_gates(result)
    lines += ["", "Gates: " + ", ".join(f"{number} {name}" for name, number in counts.items()) + "."]
    if counts["fail"] or counts["not measured"]:
        lines += ["", _row(["variant", "gate", "limit", "value", "result", "reason"]), _row(["---"] * 6)]
        for row, gate in open_gates(result):
            name = gate["name"] if gate["required"] else f"{gate['name']} (not required)"
            value = format_gate_value(gate)
            lines.append(_row([row["name"], name, gate["limit_text"], value, gate["result"], gate["reason"]]))
    machine, protocol = result["machine"], result["protocol"]
    drawn = (
        f"{protocol['component']} alone, batch {protocol['batch']}, {protocol['probes']} recorded inputs, "
        if "component" in protocol
        else f"{protocol['sampler']}, {protocol['steps']} steps, guidance {protocol['guidance_scale']}, "
        f"{len(protocol['prompts'])} prompts x {len(protocol['seeds'])} seeds, "
    )
    lines += [
        "",
        f"{machine['cpu']}, {protocol['threads']} threads, {drawn}"
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
