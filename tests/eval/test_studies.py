from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval.studies import STUDIES, check_study, read_studies, study_schema
from tests.eval.studies import search, sensitivity, timestep_error

MADE: dict[str, Callable[[], dict[str, Any]]] = {
    "sensitivity": sensitivity,
    "timestep_error": timestep_error,
    "search": search,
}


def test_what_is_there_is_read_and_what_is_not_is_left_out(tmp_path: Path) -> None:
    assert read_studies(tmp_path) == {}
    (tmp_path / "sensitivity.json").write_text(json.dumps(sensitivity()))
    assert read_studies(tmp_path) == {"sensitivity": sensitivity()}
    (tmp_path / "timestep_error.json").write_text(json.dumps(timestep_error()))
    (tmp_path / "search.json").write_text(json.dumps(search()))
    assert read_studies(tmp_path) == {name: make() for name, make in MADE.items()}


@pytest.mark.parametrize("name", STUDIES)
def test_the_schemas_are_valid_and_more_keys_may_be_there(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(study_schema(name))
    content = MADE[name]()
    content["more"] = content.setdefault("protocol", {})["more"] = 1
    check_study(name, content, "file")


DAMAGES: list[tuple[str, str, Callable[[Any], object]]] = [
    ("sensitivity", r"\$\.format is wrong: 2, allowed: 1", lambda c: c.update(format=2)),
    ("sensitivity", "'studies' is a required property", lambda c: c.pop("studies")),
    ("sensitivity", "should be non-empty", lambda c: c["studies"][0].update(layers=[])),
    # What was not measured needs a reason, and what was measured an interval or null.
    ("sensitivity", r"layers\[3\].reason is wrong: None is not of type 'string'",
     lambda c: c["studies"][0]["layers"][3].update(reason=None)),
    ("sensitivity", r"layers\[0\]", lambda c: c["studies"][0]["layers"][0]["image_psnr_db"].pop("ci95")),
    ("sensitivity", r"layers\[0\]", lambda c: c["studies"][0]["layers"][0].update(time_won_ms={"median": 1.0})),
    ("sensitivity", r"latency_ms is wrong: 0 is less than or equal", lambda c: c["studies"][0].update(latency_ms=0)),
    ("timestep_error", r"\$\.format is wrong: '1', allowed: 1", lambda c: c.update(format="1")),
    ("timestep_error", r"steps\[2\].reason is wrong: None", lambda c: c["series"][0]["steps"][2].update(reason=None)),
    ("timestep_error", r"steps\[0\].timestep is wrong: -1", lambda c: c["series"][0]["steps"][0].update(timestep=-1)),
    ("search", r"speedup is wrong: 0 is less than or equal",
     lambda c: c["searches"][0]["measured"][0].update(speedup=0)),
    ("search", "'psnr_db_min' is a required property", lambda c: c["searches"][0].pop("psnr_db_min")),
    ("timestep_error", "'versus' is a required property", lambda c: c["series"][0].pop("versus")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message", "damage"), DAMAGES)
def test_another_format_is_refused_with_the_place(
    tmp_path: Path, name: str, message: str, damage: Callable[[Any], object]
) -> None:
    content = MADE[name]()
    damage(content)
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=message) as caught:
        read_studies(tmp_path)
    text = str(caught.value)
    assert str(tmp_path / f"{name}.json") in text
    assert "docs/evaluation.md" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1', "cannot be read: Expecting"),
        ('{"format": NaN}', "NaN is no JSON number"),
        ('{"format": -Infinity}', "-Infinity is no JSON number"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sensitivity.json").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_studies(tmp_path)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sensitivity.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_studies(tmp_path)


def test_the_examples_in_the_docs_are_valid(root: Path) -> None:
    text = (root / "docs" / "evaluation.md").read_text(encoding="utf-8").partition("\n## The report\n")[2]
    text = text.partition("\n## ")[0]
    examples = [json.loads(block.partition("```")[0]) for block in text.split("```json\n")[1:]]
    named = {
        "sensitivity" if "studies" in one else "search" if "searches" in one else "timestep_error": one
        for one in examples
    }
    assert set(named) == set(STUDIES)
    for name, content in named.items():
        check_study(name, content, "docs/evaluation.md")
