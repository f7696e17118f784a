"""The scoreboard as one picture: what was asked for and drawn, against latency; an SVG file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from ldm_deploy.eval.charts import WIDTH, Point, pareto_chart

LINE = 19  # of the legend, in the drawing's units
MARGIN = 12

STYLE = """
rect { fill: #fff; }
text { font: 13px system-ui, sans-serif; fill: #57606a; paint-order: stroke; stroke: #fff; stroke-width: 3px; }
text.name, text.entry { fill: #1b1f24; }
text.number { font-size: 14px; font-weight: 600; fill: #1b1f24; }
polyline { fill: none; stroke: #d0d7de; stroke-width: 1; }
polyline.axis, polyline.spread { stroke: #57606a; }
polyline.front { stroke: #0a58a8; stroke-width: 2; }
path { fill: #0a58a8; stroke: #fff; stroke-width: 1.5; }
path.chosen { fill: #a0430a; }
"""


def scoreboard_chart(report: Mapping[str, Any]) -> str | None:
    """The rows that draw: retrieval with its 95 % interval against milliseconds with their 5 % and 95 %; the teacher as
    a diamond. None where retrieval was not measured."""
    rows = [row for row in report["rows"] if row["status"] == "ok" and row["retrieval"]["rate"] is not None]
    if not rows:
        return None
    points = []
    for row in rows:
        latency, found = row["latency_ms"], row["retrieval"]
        low, high = rate_interval(found["hits"], found["n"])
        kind = "chosen" if row is report["rows"][0] else "kept"
        points.append(Point(row["name"], kind, latency["median"], 100 * found["rate"],
                            (latency["p5"], latency["p95"]), (100 * low, 100 * high)))  # fmt: skip
    root = ElementTree.fromstring(pareto_chart(points, "prompts retrieved, %", more=True))
    bottom = float(root.get("viewBox", "").split()[3])
    height = bottom + LINE * len(points) + MARGIN
    root.set("viewBox", f"0 0 {WIDTH} {height:g}")
    root.set("xmlns", "http://www.w3.org/2000/svg")
    root.insert(0, ElementTree.Element("rect", {"width": str(WIDTH), "height": f"{height:g}"}))
    style = ElementTree.Element("style")
    style.text = STYLE
    root.insert(0, style)
    for number, point in enumerate(points, 1):
        place = {"x": str(MARGIN), "y": f"{bottom + LINE * number:g}", "class": "entry"}
        ElementTree.SubElement(root, "text", place).text = f"{number}  {point.name}, {point.x:.4g} ms, {point.y:.3g} %"
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def rate_interval(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a rate of `hits` in `count` (Wilson 1927, J. Am. Stat. Assoc. 22, "Probable inference")."""
    z = 1.959964
    rate, weight = hits / count, z**2 / count
    centre = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / count + weight / (4 * count))
    return centre - half, centre + half
