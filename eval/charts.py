"""The report's charts as SVG: text stays text, colours come from the page's styles, and no library is needed.

Lengths are in units of a drawing 480 wide, which a phone shows at three quarters of its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

WIDTH = 480
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 14, 52  # around the plot, for the labels of the axes
RADIUS = 6

Interval = tuple[float, float]
Place = tuple[float, float]

# What became of a variant, and its mark: told apart by shape, not by colour alone.
SYMBOLS = {"chosen": "◆", "kept": "●", "missed": "■", "refused": "▲", "failed": "✕"}
_SHAPES = {
    "chosen": "M0-9 9 0 0 9-9 0Z",
    "kept": "M-6 0A6 6 0 1 1 6 0 6 6 0 1 1-6 0Z",
    "missed": "M-6-6H6V6H-6Z",
    "refused": "M0-8 7 6H-7Z",
    "failed": "M-6-6 6 6M-6 6 6-6",
}


@dataclass(frozen=True)
class Point:
    """A variant in a chart of quality against latency. `kind`: a key of `SYMBOLS`. Ranges: from, to."""

    name: str
    kind: str
    x: float
    y: float
    x_range: Interval | None = None
    y_range: Interval | None = None


@dataclass(frozen=True)
class Dot:
    """A figure of a series. `hollow`: drawn as an outline; `label`: what pointing at it shows."""

    x: float
    y: float
    y_range: Interval | None = None
    hollow: bool = False
    label: str = ""


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on lengths from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False  # ticks at whole numbers only

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers within: multiples of 1, 2 or 5 times a power of ten; on a logarithmic scale only those."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1, 2, 5) if last - first <= 3 else (1,)
            found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
            return [value for value in found if self.low <= value <= self.high]
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough)
        step = max(step, 1.0) if self.whole else step
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [index * step for index in range(first, last + 1)]


def scale(values: Iterable[float], start: float, end: float, *, zero: bool = False, log: bool = False) -> Scale:
    """Holds `values` with a margin. `zero`: begins (or ends) at 0. `log`: logarithmic if they span a factor of 10."""
    found = list(values)
    low, high = min(found), max(found)
    if log and low > 0 and high > 10 * low:
        return Scale(low / 1.3, high * 1.3, start, end, log=True)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    if zero and low >= 0:
        return Scale(0.0, high + margin, start, end)
    if zero and high <= 0:
        return Scale(low - margin, 0.0, start, end)
    return Scale(low - margin, high + margin, start, end)


def pareto_front(points: Sequence[Point], *, more: bool) -> list[Point]:
    """From fast to slow, those that no other beats: as fast and better, or faster and as good.

    `more`: whether more quality is better. What failed is no choice, and not on the front.
    """
    sign = 1 if more else -1
    front: list[Point] = []
    for point in sorted((p for p in points if p.kind != "failed"), key=lambda p: (p.x, -sign * p.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def pareto_chart(
    points: Sequence[Point],
    quality: str,
    *,
    more: bool,
    limit: float | None = None,
    baseline_ms: float | None = None,
    unit: str = "ms",
    latency: str = "ms per image",
) -> str:
    """Quality against latency, each point with its number in `points`, from 1; the further up and left, the better.

    `unit` and `latency` say what the horizontal axis is.
    """
    bottom = 340 - BOTTOM
    xs = [p.x for p in points] + [v for p in points for v in p.x_range or ()] + ([baseline_ms] if baseline_ms else [])
    ys = [p.y for p in points] + [v for p in points for v in p.y_range or ()] + ([] if limit is None else [limit])
    x = scale(xs, LEFT, WIDTH - RIGHT, zero=True, log=True)
    y = scale(ys, bottom, TOP) if more else scale(ys, TOP, bottom, zero=True)
    better = f"{quality}, {'more' if more else 'less'} is better"
    chart = Drawing(f"{quality} against latency", x, y, f"{latency}, less is better", better)
    if limit is not None:
        chart.line([(x.start, y(limit)), (x.end, y(limit))], "limit")
    if baseline_ms is not None:
        chart.line([(x(baseline_ms), bottom), (x(baseline_ms), TOP)], "limit")
    stairs: list[Place] = []
    for point in pareto_front(points, more=more):
        if stairs:
            stairs.append((x(point.x), stairs[-1][1]))
        stairs.append((x(point.x), y(point.y)))
    chart.line(stairs, "front")
    for point in points:
        if point.x_range:
            chart.line([(x(value), y(point.y)) for value in point.x_range], "spread")
        if point.y_range:
            chart.line([(x(point.x), y(value)) for value in point.y_range], "spread")
    if limit is not None:
        chart.text(x.start + 6, y(limit) - 6, "limit", "start")
    if baseline_ms is not None:
        chart.text(x(baseline_ms) - 5, bottom - 7, "baseline", "end")
    taken = [(x(p.x), y(p.y)) for p in points]
    for number, point in enumerate(points, 1):
        here = x(point.x), y(point.y)
        chart.mark(*here, point.kind, f"{number} {point.name}: {point.x:.4g} {unit}, {quality} {point.y:.4g}")
        taken.append(_free_place(here, taken, x, y))
        chart.text(taken[-1][0], taken[-1][1] + 5, str(number), "middle", "number")
    return chart.svg()


def _free_place(here: Place, taken: Sequence[Place], x: Scale, y: Scale) -> Place:
    """Where to write a point's number: beside it, as far from other marks and numbers as it gets, inside the plot."""
    directions = ((1, -1), (-1, -1), (1, 1), (-1, 1), (0, -1), (0, 1))
    around = [(here[0] + 17 * dx, here[1] + 17 * dy) for dx, dy in directions]
    inside = [p for p in around if x.start < p[0] < x.end and min(y.start, y.end) < p[1] < max(y.start, y.end)]
    return max(inside or around, key=lambda p: min(min(math.dist(p, other) for other in taken), 20))


def line_chart(
    series: Sequence[Sequence[Dot]], title: str, x_label: str, y_label: str, *, backwards: bool = False
) -> str:
    """Up to two lines with their intervals, the second dashed. `backwards`: x falls from left to right."""
    dots = [dot for line in series for dot in line]
    x = scale((dot.x for dot in dots), *((WIDTH - RIGHT, LEFT) if backwards else (LEFT, WIDTH - RIGHT)))
    y = scale((v for dot in dots for v in (dot.y, *(dot.y_range or ()))), 300 - BOTTOM, TOP)
    chart = Drawing(title, x, y, x_label, y_label)
    for line, name in zip(series, ("first", "second"), strict=False):
        chart.line([(x(dot.x), y(dot.y)) for dot in line], name)
        for dot in line:
            chart.dot(dot, name)
    return chart.svg()


def layer_chart(dots: Sequence[Dot], title: str, y_label: str, *, zero: bool = False) -> str:
    """One mark per layer; `zero`: as a stem from 0. x: the layer's number in the order of the graph, from 1."""
    x = replace(scale((dot.x for dot in dots), LEFT, WIDTH - RIGHT), whole=True)
    y = scale((v for dot in dots for v in (dot.y, *(dot.y_range or ()))), 260 - BOTTOM, TOP, zero=zero)
    chart = Drawing(title, x, y, "layer, in the order of the graph", y_label)
    for dot in dots:
        if zero:
            chart.line([(x(dot.x), y(0)), (x(dot.x), y(dot.y))], "stem")
        chart.dot(dot, "first")
    return chart.svg()


class Drawing:
    """Axes with ticks and labels, and what is drawn over them."""

    def __init__(self, title: str, x: Scale, y: Scale, x_label: str, y_label: str) -> None:
        self.x, self.y = x, y
        left, right = sorted((x.start, x.end))
        top, bottom = sorted((y.start, y.end))
        view = f"0 0 {WIDTH} {bottom + BOTTOM:g}"
        self.root = ElementTree.Element("svg", {"viewBox": view, "role": "img", "aria-label": f"Chart: {title}"})
        for value in x.ticks():
            self.line([(x(value), bottom), (x(value), top)], "grid")
            self.text(x(value), bottom + 17, f"{value:.6g}", "middle")
        for value in y.ticks():
            self.line([(left, y(value)), (right, y(value))], "grid")
            self.text(left - 6, y(value) + 5, f"{value:.6g}", "end")
        self.line([(left, top), (left, bottom), (right, bottom)], "axis")
        self.text((left + right) / 2, bottom + 40, x_label, "middle", "name")
        self.text(0, 0, y_label, "middle", "name", transform=f"translate(15 {(top + bottom) / 2:g}) rotate(-90)")

    def line(self, places: Sequence[Place], kind: str) -> None:
        if places:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            ElementTree.SubElement(self.root, "polyline", {"points": points, "class": kind})

    def text(self, x: float, y: float, text: str, anchor: str, kind: str = "tick", **more: str) -> None:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": kind, **more}
        ElementTree.SubElement(self.root, "text", place).text = text

    def mark(self, x: float, y: float, kind: str, label: str) -> None:
        shape = {"d": _SHAPES[kind], "transform": f"translate({x:.1f} {y:.1f})", "class": f"mark {kind}"}
        ElementTree.SubElement(ElementTree.SubElement(self.root, "path", shape), "title").text = label

    def dot(self, dot: Dot, kind: str) -> None:
        """A small mark over its interval, if it has one."""
        x, y = self.x(dot.x), self.y(dot.y)
        if dot.y_range:
            self.line([(x, self.y(value)) for value in dot.y_range], f"spread {kind}")
        place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3", "class": f"dot {kind}{' hollow' if dot.hollow else ''}"}
        ElementTree.SubElement(ElementTree.SubElement(self.root, "circle", place), "title").text = dot.label

    def svg(self) -> str:
        """To be put into an HTML page as it is: every text and attribute is escaped."""
        return ElementTree.tostring(self.root, encoding="unicode")
