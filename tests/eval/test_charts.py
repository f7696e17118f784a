from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_deploy.eval.charts import (
    SYMBOLS,
    Dot,
    Point,
    layer_chart,
    line_chart,
    pareto_chart,
    pareto_front,
    scale,
)

figures = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 6))


@given(st.lists(figures, min_size=1, max_size=20), st.booleans(), st.booleans())
def test_a_scale_holds_its_values_and_round_ticks(values: list[float], zero: bool, log: bool) -> None:
    axis = scale(values, 60, 466, zero=zero, log=log)
    assert all(60 - 1e-6 <= axis(value) <= 466 + 1e-6 for value in values)
    assert axis(axis.low) == pytest.approx(60)
    assert axis(axis.high) == pytest.approx(466)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 20
    assert all(60 - 1e-6 <= axis(tick) <= 466 + 1e-6 for tick in ticks)
    if zero and not axis.log:
        assert axis.low <= 0 <= axis.high
    if axis.log:
        assert all(re.match(r"[125]\.0*e", f"{tick:.6e}") for tick in ticks)
    elif len(ticks) > 1:
        steps = np.diff(ticks)
        assert steps == pytest.approx(steps[0], rel=1e-6)
        assert re.match(r"[125]\.0*e", f"{steps[0]:.4e}")


def test_a_scale_is_logarithmic_from_a_factor_of_ten() -> None:
    assert not scale([20, 150], 0, 100, log=True).log
    wide = scale([20, 2000], 0, 100, log=True)
    assert wide.log
    assert wide.ticks() == [20, 50, 100, 200, 500, 1000, 2000]
    assert wide(200) - wide(20) == pytest.approx(wide(2000) - wide(200))


def beats(a: Point, b: Point, sign: int) -> bool:
    """By the definition: no slower, no worse, and one of them better."""
    no_worse = a.x <= b.x and sign * a.y >= sign * b.y
    return no_worse and (a.x < b.x or sign * a.y > sign * b.y)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(sorted(SYMBOLS))), max_size=30),
    st.booleans(),
)
def test_the_front_is_what_nothing_beats(content: list[tuple[int, int, str]], more: bool) -> None:
    points = [Point(str(index), kind, x, y) for index, (x, y, kind) in enumerate(content)]
    sign = 1 if more else -1
    eligible = [point for point in points if point.kind != "failed"]
    unbeaten = [point for point in eligible if not any(beats(other, point, sign) for other in eligible)]
    front = pareto_front(points, more=more)
    assert {(p.x, p.y) for p in front} == {(p.x, p.y) for p in unbeaten}
    assert [p.x for p in front] == sorted(p.x for p in front)
    assert len({(p.x, p.y) for p in front}) == len(front)  # of equals, one


POINTS = [
    Point("fp32", "kept", 400.0, 90.0, (390.0, 420.0), (88.0, 92.0)),
    Point("int8", "chosen", 100.0, 40.0, (95.0, 110.0), (39.0, 41.0)),
    Point("w4 <&>", "missed", 300.0, 30.0),
    Point("bf16", "refused", 390.0, 60.0),
    Point("flat", "failed", 50.0, 10.0),
]


def read_axes(svg: ElementTree.Element) -> tuple[np.ndarray, np.ndarray]:
    """(slope, offset) from length to value, of x and of y, as a reader would find them: from the ticks' labels."""
    words = [text for text in svg.iter("text") if text.get("class") == "tick"]
    ticks = [word for word in words if re.fullmatch(r"-?[\d.]+", word.text or "")]
    across = [(float(t.get("x", "")), float(t.text or "")) for t in ticks if t.get("text-anchor") == "middle"]
    # A label's baseline is 5 below the middle of its digits.
    upright = [(float(t.get("y", "")) - 5, float(t.text or "")) for t in ticks if t.get("text-anchor") == "end"]
    assert min(len(across), len(upright)) >= 3
    return np.polyfit(*np.array(across).T, 1), np.polyfit(*np.array(upright).T, 1)


@pytest.mark.parametrize("more", [True, False])
def test_points_stand_where_the_axes_say(more: bool) -> None:
    svg = ElementTree.fromstring(pareto_chart(POINTS, "PSNR, dB", more=more, limit=35.0, baseline_ms=410.0))
    x, y = read_axes(svg)
    assert (y[0] < 0) == more  # better is up, and lengths are counted downwards
    marks = [path for path in svg.iter("path") if "mark" in path.get("class", "")]
    for point, mark in zip(POINTS, marks, strict=True):
        across, down = map(float, re.findall(r"[\d.]+", mark.get("transform", "")))
        assert np.polyval(x, across) == pytest.approx(point.x, abs=1)
        assert np.polyval(y, down) == pytest.approx(point.y, abs=0.5)
        title = mark.find("title")
        assert title is not None
        assert point.name in (title.text or "")
    assert len({mark.get("d") for mark in marks}) == len(SYMBOLS)  # told apart without colour
    limit, baseline = (line.get("points", "") for line in svg.iter("polyline") if line.get("class") == "limit")
    assert np.polyval(y, float(limit.split()[0].split(",")[1])) == pytest.approx(35, abs=0.5)
    assert np.polyval(x, float(baseline.split()[0].split(",")[0])) == pytest.approx(410, abs=1)


def test_the_front_is_drawn_as_stairs_through_its_points() -> None:
    svg = ElementTree.fromstring(pareto_chart(POINTS, "PSNR, dB", more=True))
    x, y = read_axes(svg)
    (line,) = (line for line in svg.iter("polyline") if line.get("class") == "front")
    places = [tuple(map(float, place.split(","))) for place in line.get("points", "").split()]
    found = [(round(np.polyval(x, a)), round(np.polyval(y, b))) for a, b in places]
    assert found == [(100, 40), (390, 40), (390, 60), (400, 60), (400, 90)]


def test_names_are_text_and_axes_have_units() -> None:
    text = pareto_chart(POINTS, "PSNR, dB", more=True)
    assert "w4 &lt;&amp;&gt;" in text
    svg = ElementTree.fromstring(text)
    names = [element.text for element in svg.iter("text") if element.get("class") == "name"]
    assert names == ["ms per image, less is better", "PSNR, dB, more is better"]
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == "Chart: PSNR, dB against latency"


def test_numbers_beside_crowded_points_do_not_cover_each_other() -> None:
    crowd = [Point(str(index), "kept", 100.0 + index % 2, 40.0 + index // 2 / 10) for index in range(4)]
    svg = ElementTree.fromstring(pareto_chart([*crowd, Point("far", "kept", 900.0, 90.0)], "PSNR", more=True))
    places = [
        (float(text.get("x", "")), float(text.get("y", "")))
        for text in svg.iter("text")
        if text.get("class") == "number"
    ]
    for index, place in enumerate(places):
        for other in places[:index]:
            assert np.hypot(*np.subtract(place, other)) > 8


EQUAL = [Point(name, "kept", 5.0, 100.0) for name in ("one", "other")]


@pytest.mark.parametrize("points", [POINTS[:1], EQUAL])
def test_one_point_or_equal_ones_can_be_drawn(points: list[Point]) -> None:
    for more in (True, False):
        assert "nan" not in pareto_chart(points, "LPIPS", more=more).lower()
    assert "nan" not in pareto_chart([Point("zero", "kept", 5.0, 0.0)], "LPIPS", more=False).lower()


def test_a_trajectory_runs_from_noise_to_image_and_its_two_lines_differ() -> None:
    prediction = [Dot(999, 35, (34, 36)), Dot(500, 45), Dot(0, 40)]
    latent = [Dot(999, 50, hollow=True), Dot(0, 30, hollow=True)]
    svg = ElementTree.fromstring(line_chart([prediction, latent], "unet", "timestep", "PSNR, dB", backwards=True))
    dots = [(dot.get("class", ""), float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in svg.iter("circle")]
    first = [dot for dot in dots if "first" in dot[0]]
    assert [dot[1] for dot in first] == sorted(dot[1] for dot in first)  # 999 on the left
    assert first[1][2] < first[2][2] < first[0][2]  # 45 above 40 above 35
    assert all("hollow" in dot[0] for dot in dots if "second" in dot[0])
    assert {line.get("class") for line in svg.iter("polyline")} >= {"first", "second", "spread first"}


def test_layers_stand_on_whole_numbers_and_stems_on_zero() -> None:
    dots = [Dot(1, 0.5, label="conv_in"), Dot(2, -0.25, hollow=True), Dot(3, 0.75)]
    svg = ElementTree.fromstring(layer_chart(dots, "time won", "ms won per call", zero=True))
    x, y = read_axes(svg)
    across = [text.text for text in svg.iter("text") if text.get("text-anchor") == "middle"]
    assert across[:3] == ["1", "2", "3"]
    stems = [line.get("points", "").split() for line in svg.iter("polyline") if line.get("class") == "stem"]
    for (low, high), dot in zip(stems, dots, strict=True):
        assert np.polyval(y, float(low.split(",")[1])) == pytest.approx(0, abs=0.01)
        assert np.polyval(y, float(high.split(",")[1])) == pytest.approx(dot.y, abs=0.01)
    circles = list(svg.iter("circle"))
    assert [np.polyval(x, float(circle.get("cx", ""))) for circle in circles] == pytest.approx([1, 2, 3], abs=0.01)
    assert circles[0].findtext("title") == "conv_in"
