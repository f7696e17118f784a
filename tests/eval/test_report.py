from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from ldm_deploy.eval.measure import BASELINE
from ldm_deploy.eval.report import exit_code, print_table, schema, to_html, to_junit, to_markdown, write_report

FP32, INT8 = "fp32-onnxruntime-cpu", "int8-onnxruntime-cpu"
REFUSED = {
    "name": "unet-int8-openvino-cpu", "component": "unet", "runtime": "openvino", "device": "cpu", "precision": "int8",
    "reason": "not faster", "parity": {"relative_error": None, "limit": 0.1, "passed": False}, "speedup": None,
    "costly_ops": [{"op": "QLinearSoftmax", "ms": 1.5, "share": 0.4}],
}  # fmt: skip


def prepare(case: Any, state: str) -> Any:
    """The report in one of the states a reader can meet."""
    if state == "refused":
        case.data["refused"] = [REFUSED]
    elif state == "variant failed":
        case.lose(INT8, "its worker died")
    elif state == "baseline failed":
        case.lose(BASELINE, "its worker died")
    elif state == "empty":
        case.data["variants"] = []
    return case.report()


STATES = ["all well", "refused", "variant failed", "baseline failed", "empty"]


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_valid_and_can_be_shown(
    case: Any, state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = prepare(case, state)
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


def test_the_schema_itself_is_valid_and_refuses_what_the_contract_forbids(case: Any) -> None:
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
        report = json.loads(json.dumps(dict(case.report())))
        validator.validate(report)
        damage(report)
        assert list(validator.iter_errors(report)), "a damaged report was accepted"


class Page(HTMLParser):
    """Collects tags, and checks that they nest."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("state", STATES)
def test_the_page_is_whole_and_needs_no_network(case: Any, state: str) -> None:
    text = to_html(prepare(case, state))
    page = Page(text)
    assert page.open == []
    assert "http" not in text.replace('http-equiv="', "")
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert any(tag == "meta" and attributes.get("name") == "viewport" for tag, attributes in page.tags)


def test_the_page_shows_the_choice_first_then_every_gate_and_every_image(case: Any) -> None:
    result = case.report()
    page = Page(to_html(result))
    first = page.text.index(f"Chosen: {INT8}")
    assert first < page.text.index("All variants") < page.text.index("Gates") < page.text.index("Conditions")
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4 * 3
    assert images[0]["alt"] == f"red apple, seed 0, drawn by {BASELINE}"
    for row in result["variants"]:
        for gate in row["gates"]:
            assert gate["name"] in page.text
            if gate["reason"]:
                assert gate["reason"] in page.text
    assert result["machine"]["cpu"] in page.text
    assert "<b>sun</b> & co, seed 1" in page.text  # as text, not as markup
    assert "b" not in {tag for tag, _ in page.tags}


def test_the_images_in_the_page_are_the_images(case: Any) -> None:
    import base64
    import io

    import numpy as np
    from PIL import Image

    result = case.report()
    uris = [attributes["src"] for tag, attributes in Page(to_html(result)).tags if tag == "img"]
    content = base64.b64decode(str(uris[5]).partition(",")[2])
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(np.asarray(image), result.images[INT8][1])


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
    assert f"- {INT8}: failed: a\\|b c" in lines


def test_the_table_fits_a_narrow_terminal(
    case: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    print_table(case.report())
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 60
