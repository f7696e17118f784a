from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from ldm_deploy.eval.compare import Evaluation
from ldm_deploy.eval.measure import BASELINE
from ldm_deploy.eval.page import to_html
from ldm_deploy.eval.report import exit_code, print_table, schema, to_junit, to_markdown, write_report
from tests.eval.states import STATES

Report = Callable[[str], Evaluation]
FP32, INT8 = "fp32-onnxruntime-cpu", "int8-onnxruntime-cpu"


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_valid_and_can_be_shown(
    report_in: Report, state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = report_in(state)
    write_report(result, tmp_path / "report")
    assert {file.name for file in (tmp_path / "report").iterdir()} == {
        "report.json", "report.html", "report.md", "junit.xml",
    }  # fmt: skip
    stored = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema()).validate(stored)
    assert stored == dict(result)
    # What was read back, without images, can be shown and judged as well.
    print_table(stored)
    assert f"chosen: {stored['chosen'] or 'none'}" in capsys.readouterr().out
    assert exit_code(stored) == exit_code(result)
    assert "No images were kept" in to_html(stored)


def test_the_schema_itself_is_valid_and_refuses_what_the_contract_forbids(report_in: Report) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    validator = jsonschema.Draft202012Validator(schema())
    for damage in (
        lambda report: report.pop("chosen"),
        lambda report: report.update(format=2),
        lambda report: report["variants"][0].update(status="broken"),
        lambda report: report["variants"][0].update(status="failed", reason=None),
        lambda report: report["variants"][0]["gates"][0].update(result="skipped"),
        lambda report: report["variants"][0]["gates"][0].update(result="fail", reason=None),
        lambda report: report["variants"][0]["quality"]["ssim"].update(mean=None, reason=None),
        lambda report: report["variants"][0]["latency_ms"].pop("p95"),
        lambda report: report["variants"][0]["speedup"].pop("versus"),
        lambda report: report["protocol"].update(prompts_sha256="?"),
    ):
        report = json.loads(json.dumps(report_in("all well")))
        validator.validate(report)
        damage(report)
        assert list(validator.iter_errors(report)), "a damaged report was accepted"


def test_junit_has_a_test_per_gate_and_tells_failures_from_what_was_not_measured(case: Any) -> None:
    case.found.latency_ms[INT8] = [2 * value for value in case.found.latency_ms[BASELINE]]
    result = case.report()
    root = ElementTree.fromstring(to_junit(result))
    suites = {suite.get("name"): suite for suite in root}
    suite = suites[INT8]
    assert int(str(suite.get("tests"))) == len(suite.findall("testcase"))
    assert suite.get("failures") == "1"
    (failed,) = [case for case in suite if case.find("failure") is not None]
    assert failed.get("name") == "speedup_min"
    assert re.search("is below the limit 1", str(failed.find("failure").get("message")))  # type: ignore[union-attr]
    assert suites[FP32].get("failures") == "0"


def test_junit_reports_a_required_gate_without_measurement_as_an_error(case: Any) -> None:
    case.lose(BASELINE, "gone")
    root = ElementTree.fromstring(to_junit(case.report()))
    assert [suite.get("errors") for suite in root] == ["3", "3"]


def test_markdown_tables_survive_a_bar_in_a_reason(case: Any) -> None:
    case.lose(INT8, "a|b\nc")
    lines = to_markdown(case.report()).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    for line in tables:
        assert len(re.findall(r"(?<!\\)\|", line)) in (10, 7)
    assert f"- Not chosen: {INT8}, because a\\|b c." in lines


def test_markdown_is_short_and_names_every_gate_that_did_not_pass(case: Any) -> None:
    case.found.latency_ms[INT8] = [2 * value for value in case.found.latency_ms[BASELINE]]
    result = case.report()
    gates = [(row["name"], gate) for row in result["variants"] for gate in row["gates"]]
    lines = to_markdown(result).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    listed = [row for row in rows if len(row) == 6][2:]
    open_ = [(name, gate) for name, gate in gates if gate["result"] != "pass"]
    assert sorted((row[0], row[1].split()[0], row[4]) for row in listed) == sorted(
        (name, gate["name"], gate["result"]) for name, gate in open_
    )
    assert listed[0][4] == "fail"
    assert f"Gates: {len(gates) - len(open_)} pass, 1 fail, {len(open_) - 1} not measured." in lines
    assert len(lines) < 25


def test_markdown_without_open_gates_has_no_table_of_them(report_in: Report) -> None:
    result = json.loads(json.dumps(report_in("all well")))
    for row in result["variants"]:
        row["gates"] = [gate | {"result": "pass", "reason": None} for gate in row["gates"]]
    text = to_markdown(result)
    number = sum(len(row["gates"]) for row in result["variants"])
    assert number > 0
    assert f"Gates: {number} pass, 0 fail, 0 not measured." in text
    assert "| gate |" not in text


def test_the_table_fits_a_narrow_terminal(
    case: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    print_table(case.report())
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 60
