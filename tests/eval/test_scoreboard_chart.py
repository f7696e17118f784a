"""The picture of a scoreboard: every row that draws has its mark, its interval and its line in the legend."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
from scipy.stats import binomtest

from ldm_deploy.eval.scoreboard_chart import rate_interval, scoreboard_chart

SVG = "{http://www.w3.org/2000/svg}"


def row(name: str, milliseconds: float, hits: int | None, status: str = "ok") -> dict[str, Any]:
    rate = None if hits is None else hits / 100
    latency = {"median": milliseconds, "p5": 0.9 * milliseconds, "p95": 1.2 * milliseconds}
    return {"name": name, "status": status, "latency_ms": latency, "retrieval": {"rate": rate, "hits": hits, "n": 100}}


def test_every_row_that_draws_has_a_mark_and_a_line_in_the_legend() -> None:
    rows = [row("teacher & co, 50 steps", 900, 84), row("student, 4 steps", 30, 78), row("broken", 1, 1, "failed")]
    root = ElementTree.fromstring(scoreboard_chart({"rows": rows}) or "")
    marks = [path.get("class") for path in root.iter(f"{SVG}path")]
    assert marks == ["mark chosen", "mark kept"]
    legend = [text for text in root.iter(f"{SVG}text") if text.get("class") == "entry"]
    assert [text.text for text in legend] == [
        "1  teacher & co, 50 steps, 900 ms, 84 %",
        "2  student, 4 steps, 30 ms, 78 %",
    ]
    _, _, _, height = (float(value) for value in root.get("viewBox", "").split())
    assert max(float(text.get("y", "")) for text in legend) < height
    # Each has an interval of its latency and one of its rate, inside the drawing.
    spreads = [line for line in root.iter(f"{SVG}polyline") if line.get("class") == "spread"]
    assert len(spreads) == 4


def test_without_retrieval_there_is_no_picture() -> None:
    assert scoreboard_chart({"rows": [row("teacher", 900, None)]}) is None


@pytest.mark.parametrize(("hits", "count"), [(84, 100), (0, 10), (10, 10), (1, 3)])
def test_the_interval_of_a_rate_is_wilsons(hits: int, count: int) -> None:
    wanted = binomtest(hits, count).proportion_ci(method="wilson")
    assert rate_interval(hits, count) == pytest.approx((wanted.low, wanted.high), abs=1e-7)
