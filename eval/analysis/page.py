"""analysis.html: tables and charts of an analysis, in one page that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from typing import Any

import numpy as np

DASH = "–"
PARTS = {
    "encoder": "encoder",
    "decoder": "decoder",
    "unet": "U-Net, one step",
    "unet_in_pixel_space": "the same U-Net on pixels",
}

Table = tuple[list[str], list[list[str]]]


def to_html(result: Mapping[str, Any], strips: np.ndarray) -> str:
    """`result`: analysis.json's content; `strips` uint8 (pairs, steps, H, W, 3): the interpolations."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    template = (resources.files("ldm_deploy.eval.analysis") / "page_template.html").read_text("utf-8")
    latent, costs, study = result["latent_space"], result["cost_model"], result["rate_distortion"]
    return environment.from_string(template).render(
        result=result,
        strips=[[_png(image) for image in strip] for strip in strips],
        tables={
            "channels": channel_table(latent),
            "costs": cost_table(costs),
            "rates": rate_table(study),
            "claim": claim_table(study),
        },
        charts={
            "latent": latent_charts(latent),
            "costs": cost_chart(costs),
            "rate": rate_chart(study) if study["rows"] else None,
        },
    )


@contextmanager
def _figure(columns: int, written: list[str]) -> Iterator[Any]:
    """Axes side by side; what is drawn on them is appended to `written` as SVG with text as text."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ldm", "font.size": 8, "axes.grid": True,
                         "grid.alpha": 0.3, "figure.constrained_layout.use": True}):  # fmt: skip
        figure = Figure(figsize=(4.2 * columns, 2.9))
        yield figure.subplots(1, columns)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    written.append(svg[svg.index("<svg") :])


def latent_charts(latent: Mapping[str, Any]) -> list[str]:
    """Distribution and correlation of the channels; lengths of interpolation steps and the map."""
    written: list[str] = []
    with _figure(2, written) as (left, right):
        edges = latent["histograms"]["edges"]
        for row, density in zip(latent["channels"], latent["histograms"]["density"], strict=True):
            left.stairs(density, edges, label=f"channel {row['channel']}")
        left.set(title="distribution of each channel", xlabel="value", ylabel="density")
        left.legend()
        matrix = np.array(latent["correlation"], dtype=np.float64)  # None becomes NaN, which stays white
        shown = right.imshow(matrix, cmap="coolwarm", vmin=-1, vmax=1)
        for (row, column), value in np.ndenumerate(matrix):
            right.text(column, row, "" if np.isnan(value) else f"{value:.2f}", ha="center", va="center")
        ticks = range(len(matrix))
        right.set(title="correlation of the channels", xlabel="channel", ylabel="channel", xticks=ticks, yticks=ticks)
        right.grid(visible=False)
        right.figure.colorbar(shown, ax=right)
    with _figure(2, written) as (left, right):
        for index, pair in enumerate(latent["interpolation"]["pairs"]):
            left.plot(range(1, len(pair["steps"]) + 1), pair["steps"], marker="o", label=f"pair {index + 1}")
        left.set(title="interpolation: length of each step", xlabel="step", ylabel="grey levels", ylim=(0, None))
        left.legend()
        points, labels = latent["map"]["points"], latent["map"]["labels"]
        if points is None:
            right.text(0.5, 0.5, f"no map: {latent['map']['reason']}", ha="center", wrap=True)
        else:
            places = np.array(points)
            names = [name for name, _ in Counter(labels or [""] * len(places)).most_common(10)]
            for name in names:
                rows = [index for index, label in enumerate(labels or [""] * len(places)) if label == name]
                right.scatter(*places[rows].T, s=6, label=name)
            if labels:
                right.legend(fontsize=6)
        right.set(title="t-SNE of the latents", xticks=[], yticks=[])
    return written


def cost_chart(costs: Mapping[str, Any]) -> str:
    """FLOPs and saved activations of one U-Net step over the image's side, on latents and on pixels."""
    written: list[str] = []
    with _figure(2, written) as axes:
        for place, key, label in zip(axes, ("flops", "saved_bytes"), ("FLOPs", "saved bytes"), strict=True):
            for part in ("unet", "unet_in_pixel_space"):
                rows = [row for row in costs["rows"] if row["part"] == part]
                place.loglog(
                    [row["resolution"] for row in rows], [row[key] for row in rows], marker="o", label=PARTS[part]
                )
            place.set(title=f"U-Net: {label}", xlabel="pixels a side", ylabel=label)
            place.legend()
    return written[0]


def rate_chart(study: Mapping[str, Any]) -> str:
    """PSNR and U-Net cost over the size of the latent, one line per number of latent channels."""
    rows = [row for row in study["rows"] if row["study"] == "rate"]
    written: list[str] = []
    with _figure(2, written) as axes:
        for place, key, label in zip(axes, ("psnr_db", "unet_flops"), ("PSNR dB", "U-Net FLOPs"), strict=True):
            for z in sorted({row["z_channels"] for row in rows}):
                line = sorted((row["latent_values"], row[key]) for row in rows if row["z_channels"] == z)
                place.semilogx(*zip(*line, strict=True), marker="o", base=2, label=f"{z} latent channels")
            place.set(title=label, xlabel="values per latent", ylabel=label)
            place.legend()
    return written[0]


def channel_table(latent: Mapping[str, Any]) -> Table:
    heads = ["channel", "mean", "std", "excess kurtosis", "active units"]
    return heads, [
        [str(row["channel"]), number(row["mean"]), number(row["std"]), number(row["kurtosis"], 2),
         f"{row['active_share']:.0%}"]
        for row in latent["channels"]
    ]  # fmt: skip


def cost_table(costs: Mapping[str, Any]) -> Table:
    heads = [
        "part", "pixels", "GFLOP", "weights", "saved", "peak", "measured GFLOP", "measured saved", "measured peak",
    ]  # fmt: skip
    return heads, [
        [
            PARTS[row["part"]], str(row["resolution"]), number(row["flops"] / 1e9), megabytes(row["weight_bytes"]),
            *(megabytes(row[key]) for key in ("saved_bytes", "peak_bytes")),
            *(
                [DASH] * 3
                if row["measured"] is None
                else [
                    number(row["measured"]["flops"] / 1e9),
                    *(megabytes(row["measured"][key]) for key in ("saved_bytes", "peak_bytes")),
                ]
            ),
        ]
        for row in costs["rows"]
    ]  # fmt: skip


def rate_table(study: Mapping[str, Any]) -> Table:
    heads = [
        "row", "latent", "compression", "PSNR dB", "SSIM", "LPIPS", "group accuracy (originals)",
        "U-Net GFLOP", "times lower", "U-Net ms", "decoder ms", "U-Net peak", "decoder peak",
    ]  # fmt: skip
    rows = []
    for row in study["rows"] or ():
        known = [row["name"], "x".join(map(str, row["latent_shape"])), f"{row['compression']:.3g}x"]
        if row["reason"] is not None:
            rows.append([*known, *[DASH] * (len(heads) - 3)])
            continue
        semantic = row["semantic"]
        accuracy = DASH
        if semantic["accuracy"] is not None:
            accuracy = f"{semantic['accuracy']:.0%} ({semantic['accuracy_originals']:.0%})"
        rows.append(
            [
                *known, number(row["psnr_db"], 1), number(row["ssim"]), number(row["lpips"]), accuracy,
                number(row["unet_flops"] / 1e9), f"{row['unet_times_lower']:.0f}x",
                *(number(row["latency_ms"][part]["median"], 2) for part in ("unet", "decoder")),
                *(megabytes(row[f"{part}_peak_bytes"]) for part in ("unet", "decoder")),
            ]
        )  # fmt: skip
    return heads, rows


def claim_table(study: Mapping[str, Any]) -> Table:
    """The classic claim beside what the rows with four latent channels gave."""
    found = {
        row["downsampling"]: row for row in study["rows"] or () if row["study"] == "rate" and row["z_channels"] == 4
    }
    return ["downsampling", "claimed dB", "here dB (4 channels)", "U-Net claimed lower", "here"], [
        [
            str(claim["downsampling"]), claim["psnr_db"], number(found[claim["downsampling"]]["psnr_db"], 1),
            f"{claim['unet_times_lower']}x", f"{found[claim['downsampling']]['unet_times_lower']:.1f}x",
        ]
        for claim in (study["claim"] if study["rows"] else ())
    ]  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """Fixed point, and more digits where that would hide a small number; a dash for what was not measured."""
    if value is None:
        return DASH
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10**-digits else f"{value:.1e}"


def megabytes(count: float) -> str:
    """Decimal megabytes, gigabytes from 1000 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _png(image: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
