"""report.html: one page that needs nothing else. Styles, script and images are inside, and nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from importlib import resources
from typing import Any

import numpy as np

from ldm_deploy.eval.charts import SYMBOLS, Dot, Point, layer_chart, line_chart, pareto_chart, pareto_front
from ldm_deploy.eval.tables import (
    LABELS,
    count_gates,
    explanation,
    format_bytes,
    format_cold_start,
    format_gate_value,
    format_latency,
    format_memory,
    format_ratio,
    format_throughput,
    open_gates,
    quality_rows,
    reasons,
    table,
    verdict,
)

IMAGE_BYTES = 16 * 2**20  # of images in one page; what does not fit is left out, and the page says so
SHOWN = 8  # prompts that are open at first

# Keys of a variant's row that have a place of their own on the page. What else there is, is listed as it is.
PLACED = (
    "name", "runtime", "device", "precision", "status", "reason", "steps", "guidance_scale", "sampler", "components",
    "quality", "images", "latency_ms", "load_ms", "cold_start_ms", "memory", "throughput", "speedup", "comparisons",
    "peak_memory_bytes", "size_bytes", "gates", "refused", "reconstruction",
)  # fmt: skip


def to_html(result: Mapping[str, Any]) -> str:
    """The page of an `Evaluation`. A report.json read back will do too: it has no images, and no studies of layers."""
    import jinja2

    folder = resources.files("ldm_deploy.eval")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "ms": format_latency,
        "ratio": format_ratio,
        "bytes": format_bytes,
        "gate": format_gate_value,
        "cold_start": format_cold_start,
        "memory": format_memory,
        "throughput": format_throughput,
        "quality": quality_rows,
    }
    script = (folder / "report.js").read_text("utf-8")
    why, *others = reasons(result)
    passed = [(row, gate) for row in result["variants"] for gate in row["gates"] if gate["result"] == "pass"]
    samples, left_out = sample_images(result)
    studies: Mapping[str, Any] = getattr(result, "studies", {})
    return environment.from_string((folder / "report_template.html").read_text("utf-8")).render(
        report=result,
        style=(folder / "report.css").read_text("utf-8"),
        script=script,
        # The one script that may run: an injected one has another digest.
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        why=why,
        others=others,
        table=table(result),
        tiles=headline(result),
        verdicts={row["name"]: verdict(row, result["chosen"]) for row in result["variants"]},
        explanations={row["name"]: explanation(row) for row in result["variants"]},
        counts=count_gates(result),
        gates=[*open_gates(result), *passed],
        charts=quality_charts(result),
        samples=samples,
        left_out=left_out,
        shown=SHOWN,
        sensitivity=sensitivity_charts(studies.get("sensitivity")),
        timesteps=timestep_charts(studies.get("timestep_error")),
        searches=search_charts(studies.get("search")),
        extras={row["name"]: {key: row[key] for key in row if key not in PLACED} for row in result["variants"]},
    )


def headline(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, figure, its 95 % interval or nothing) of the chosen variant."""
    heads, rows = table(result)
    cells = next((row for row in rows[1:] if row[0] == result["chosen"]), None)
    if cells is None:
        return []
    figures = [cell.rstrip(")").partition(" (") for cell in cells[1:-1]]
    return [(head, value, interval) for head, (value, _, interval) in zip(heads[1:-1], figures, strict=True)]


def sample_images(result: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """(one entry per prompt and seed: `prompt`, `seed`, `reference`, `images`; how many did not fit).

    `reference` (None without a baseline) has `name` and `uri`, each of `images` `scores` too; one that equals the
    reference has no `uri` of its own. Those on which the chosen variant does worst (without one, any) come first.
    """
    images: Mapping[str, np.ndarray] = getattr(result, "images", {})
    grid = getattr(result, "grid", None)
    if grid is None or not images:
        return [], 0
    baseline = result["baseline"]["name"]
    scores = {row["name"]: row.get("images") or [{}] * len(grid.pairs) for row in result["variants"]}
    judged = [scores[result["chosen"]]] if result["chosen"] else list(scores.values())
    worst = [min((own[index].get("psnr_db", np.inf) for own in judged), default=0) for index in range(len(grid.pairs))]
    names = [name for name in scores if name in images]
    samples: list[dict[str, Any]] = []
    size = 0
    for index in sorted(range(len(grid.pairs)), key=worst.__getitem__):
        prompt, seed = grid.pairs[index]
        original = images[baseline][index] if baseline in images else None
        reference = None if original is None else {"name": baseline, "uri": data_uri(original)}
        drawn = [
            {
                "name": name,
                "uri": None if _equal(images[name][index], original) else data_uri(images[name][index]),
                "scores": scores[name][index],
            }
            for name in names
        ]
        size += sum(len(image["uri"] or "") for image in (*drawn, reference or {"uri": ""}))
        if samples and size > IMAGE_BYTES:
            break
        samples.append({"prompt": prompt, "seed": seed, "reference": reference, "images": drawn})
    return samples, len(grid.pairs) - len(samples)


def _equal(image: np.ndarray, original: np.ndarray | None) -> bool:
    return original is not None and np.array_equal(image, original)


def data_uri(image: np.ndarray) -> str:
    """A uint8 image (H, W, 3) without loss."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def quality_charts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A chart of quality against latency for PSNR and LPIPS, with a legend of its points; none without figures."""
    charts = []
    latency = table(result)[0][1]
    for name, gate_name in (("psnr_db", "psnr_db_min"), ("lpips", "lpips_max")):
        rows = [row for row in result["variants"] if row["latency_ms"] and _mean(row, name) is not None]
        if not rows:
            continue
        points = [_point(row, name, result["chosen"]) for row in rows]
        limits = {gate["limit"] for row in rows for gate in row["gates"] if gate["name"] == gate_name}
        more = bool(LABELS[name].more)
        front = {point.name for point in pareto_front(points, more=more)}
        baseline = result["baseline"]["latency_ms"]
        charts.append(
            {
                "svg": pareto_chart(
                    points,
                    LABELS[name].name,
                    more=more,
                    limit=limits.pop() if len(limits) == 1 else None,
                    baseline_ms=baseline["median"] if baseline else None,
                    latency=latency,
                ),
                "points": [
                    {
                        "row": row,
                        "symbol": SYMBOLS[point.kind],
                        "kind": point.kind,
                        "quality": f"{point.y:.{LABELS[name].digits}f}",
                        "front": point.name in front,
                    }
                    for row, point in zip(rows, points, strict=True)
                ],
            }
        )
    return charts


def _mean(row: Mapping[str, Any], name: str) -> float | None:
    found: float | None = ((row["quality"] or {}).get(name) or {}).get("mean")
    return found


def _point(row: Mapping[str, Any], name: str, chosen: str | None) -> Point:
    words = verdict(row, chosen)
    kind = words if words in SYMBOLS else "failed" if row["status"] != "ok" else "missed"
    latency, figure = row["latency_ms"], row["quality"][name]
    spread = (latency["p5"], latency["p95"])
    return Point(row["name"], kind, latency["median"], figure["mean"], spread, figure["ci95"] and tuple(figure["ci95"]))


def sensitivity_charts(content: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Per study of sensitivity.json: charts of quality kept and time won, and its layers, the most sensitive first."""
    found = []
    for study in (content or {}).get("studies", ()):
        layers = [{"number": number, **layer} for number, layer in enumerate(study["layers"], 1)]
        quality = [_dot(layer, "image_psnr_db", "mean", "dB") for layer in layers if layer["image_psnr_db"]]
        time = [_dot(layer, "time_won_ms", "median", "ms") for layer in layers if layer["time_won_ms"]]
        name = f"{study['component']}, {study['precision']} on {study['runtime']}-{study['device']}"
        charts = []
        if quality:
            charts.append(layer_chart(quality, f"image quality with one layer changed, {name}", "PSNR of images, dB"))
        if time:
            charts.append(layer_chart(time, f"time won by changing one layer, {name}", "ms won per call", zero=True))
        layers.sort(key=lambda layer: layer["image_psnr_db"]["mean"] if layer["image_psnr_db"] else np.inf)
        found.append({"study": study, "name": name, "charts": charts, "layers": layers})
    return found


def _dot(layer: Mapping[str, Any], key: str, figure: str, unit: str) -> Dot:
    value, interval = layer[key][figure], layer[key]["ci95"]
    hollow = layer["changed"] is False
    label = f"{layer['number']} {layer['name']}: {value:.4g} {unit}{', left as it was' if hollow else ''}"
    return Dot(layer["number"], value, interval and tuple(interval), hollow, label)


def timestep_charts(content: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Per series of timestep_error.json: a chart of prediction and latent along the trajectory."""
    found = []
    for series in (content or {}).get("series", ()):
        name = f"{series['component']}: {series['engine']} against {series['versus']}"
        lines = [
            [
                Dot(
                    step["timestep"],
                    step[key]["mean"],
                    step[key]["ci95"] and tuple(step[key]["ci95"]),
                    hollow=key == "latent_psnr_db",
                    label=f"{word} at timestep {step['timestep']:g}: {step[key]['mean']:.1f} dB",
                )
                for step in series["steps"]
                if step[key]
            ]
            for key, word in (("prediction_psnr_db", "prediction"), ("latent_psnr_db", "latent"))
        ]
        chart = None
        if any(lines):
            chart = line_chart(lines, name, "timestep, sampling runs to the right", "PSNR, dB", backwards=True)
        found.append({"series": series, "name": name, "chart": chart})
    return found


def search_charts(content: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Per search of search.json: every assignment that was measured, quality against time, and a legend."""
    found = []
    for search in (content or {}).get("searches", ()):
        rows = [{"number": number, **one} for number, one in enumerate(search["measured"], 1)]
        name = f"{search['component']}, {search['precision']} on {search['runtime']}-{search['device']}"
        points = []
        for row in rows:
            keeps = row["psnr_db"] >= search["psnr_db_min"]
            kind = "chosen" if row["best"] else "failed" if row["refused"] else "kept" if keeps else "missed"
            spread = (100 / row["ci95"][1], 100 / row["ci95"][0]) if row["ci95"][0] > 0 else None
            what = f"{len(row['layers'])} layers"
            points.append(Point(what, kind, 100 / row["speedup"], row["psnr_db"], spread))
            row |= {"symbol": SYMBOLS[kind], "kind": kind}
        chart = None
        if points:
            chart = pareto_chart(
                points, "PSNR, dB", more=True, limit=search["psnr_db_min"], baseline_ms=100.0, unit="%",
                latency="% of the fastest float's time",
            )  # fmt: skip
        found.append({"search": search, "name": name, "chart": chart, "rows": rows})
    return found
