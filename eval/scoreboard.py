"""A teacher and its students side by side: the same prompts, the same seeds, one interleaved run.

What a student of few steps is worth takes more than a distance to its teacher's images, which it need not repeat: is it
what was asked for (retrieval), is it as varied (diversity), and does the set look like the data (distances of sets)?
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.errors import ConfigError, EvaluationError
from ldm_deploy.eval.distribution import not_measured_set, set_distances
from ldm_deploy.eval.grid import Grid, load_grid, retrieval_grid
from ldm_deploy.eval.latency import Worker, interleaved, summary, warm_up
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.machine import conditions, machine
from ldm_deploy.eval.memory import size_bytes
from ldm_deploy.eval.metrics import bootstrap_ci
from ldm_deploy.eval.quality import SETS, compare_images
from ldm_deploy.eval.reference import base_text, retrieve
from ldm_deploy.eval.scoreboard_chart import scoreboard_chart
from ldm_deploy.eval.speedup import speedup
from ldm_deploy.progress import task

if TYPE_CHECKING:
    from ldm_deploy.training.data import ImageSet

Row = dict[str, Any]
PAIRED = ("psnr_db", "ssim", "lpips")  # against the teacher's images
SHOWN = 8  # prompts in the picture


@dataclass(frozen=True)
class Model:
    """A reference in torch, or the default variant of a bundle; the numbers of steps it is drawn in.

    `about`: what model.json, or bundle.json's `model`, says.
    """

    name: str
    about: Mapping[str, Any]
    spec: Mapping[str, Any]  # of its worker
    steps: tuple[int, ...]
    evaluations: int  # of the U-Net, per step
    files: tuple[Path, ...]  # its weights
    size: tuple[int, int]


@dataclass
class Turn:
    """A model in one number of steps."""

    name: str
    worker: Worker
    steps: int

    def stop(self) -> None:
        """The worker serves other numbers of steps; it stays."""


def compare_students(
    teacher: str | Path,
    students: Sequence[str | Path],
    data: str | Path,
    *,
    grid: Grid | None = None,
    threads: int | None = None,
    seed: int = 0,
    picture: Path | None = None,
) -> dict[str, Any]:
    """The scoreboard as plain data: `conditions`, and in `rows` the teacher and every student in each of its steps.

    `students`: references or bundles (their default variant). A student of few steps is drawn in all it was distilled
    for, others in the teacher's. `data`: the images that retrieval and distances of sets refer to. `grid`: prompts and
    seeds; None takes the 50 shipped prompts if the data has them, else those of the teacher's model.json. `picture`: a
    PNG to write, one line per row of the table. Latencies are of whole images, batch 1. What cannot be measured is null
    with a reason. Raises `ConfigError` where teacher and student draw different sizes, `EvaluationError` if the teacher
    does not draw.
    """
    from ldm_deploy.training.data import load_images

    models = [read_model_of(teacher, None)]
    models += [read_model_of(student, models[0]) for student in students]
    repeated = [name for name, count in Counter(model.name for model in models).items() if count > 1]
    if repeated:
        raise ConfigError(f"two of the models are called {repeated[0]!r}, after their directories; rename one")
    height, width = models[0].size
    if height != width:
        raise ConfigError(f"{teacher} draws {height}x{width}; a scoreboard needs a square size, as its data is square")
    for model in models[1:]:
        if model.size != models[0].size:
            raise ConfigError(
                f"{model.name} draws {model.size[0]}x{model.size[1]} and {models[0].name} {height}x{width}; "
                "give students of this teacher"
            )
    about = models[0].about
    images = load_images(data, height, about.get("conditioning", "captions"))
    if grid is None:
        grid = retrieval_grid()
        if not set(grid.prompts) <= {base_text(text) for text in images.texts}:
            grid = load_grid(about.get("prompts", {}).get("report"))
    before = conditions()
    samples, failed, memory = _draw(models, grid, threads, seed)
    after = conditions()
    first = row_name(models[0], models[0].steps[0])
    if first not in samples:
        raise EvaluationError(f"the teacher {models[0].name} does not draw: {failed[first]}")
    lpips = Lpips()
    teachers = np.stack([image for _, image in samples[first]])
    drawn = {name: np.stack([image for _, image in found]) for name, found in samples.items()}
    if picture is not None:
        from ldm_deploy.training.preview import write_grid

        shown = range(0, min(SHOWN, len(grid.prompts)) * len(grid.seeds), len(grid.seeds))
        write_grid(picture, [made[index] for made in drawn.values() for index in shown], columns=len(shown))
    rows = []
    with task("comparing", sum(len(model.steps) for model in models)) as advance:
        for model in models:
            for steps in model.steps:
                name = row_name(model, steps)
                row: Row = {"name": name, "steps": steps, "unet_evaluations": steps * model.evaluations,
                            "status": "failed", "reason": failed.get(name)}  # fmt: skip
                if name in drawn:
                    times = {key: [milliseconds for milliseconds, _ in samples[key]] for key in (first, name)}
                    row |= {"status": "ok", "latency_ms": summary(times[name]), "speedup": None}
                    if name != first:
                        row["speedup"] = speedup(times[first], times[name], first, seed=seed)
                        paired, _ = compare_images(teachers, drawn[name], grid.pairs, lpips, seed=seed)
                        row["against_teacher"] = {key: paired[key] for key in PAIRED}
                    row |= _figures(drawn[name], images, grid, lpips, seed)
                    row |= {"peak_memory_bytes": memory[model.name], "size_bytes": size_bytes(model.files)}
                rows.append(row)
                advance()
    return {
        "format": 1,
        "machine": machine(threads),
        "conditions": {"before": before, "after": after},
        "data": {"digest": images.digest, "images": len(images.texts)},
        "prompts": list(grid.prompts),
        "seeds": list(grid.seeds),
        "features": lpips.set_features if lpips.available else None,
        "rows": rows,
    }


def write_scoreboard(
    teacher: str | Path, students: Sequence[str | Path], data: str | Path, out: Path, seed: int, threads: int | None
) -> dict[str, Any]:
    """`compare_students`, printed, and written to `out`: scoreboard.json, images.png with a line per row, chart.svg."""
    from ldm_deploy.artifact import atomic_write_bytes, atomic_write_json

    out.mkdir(parents=True, exist_ok=True)
    report = compare_students(teacher, students, data, threads=threads, seed=seed, picture=out / "images.png")
    atomic_write_json(out / "scoreboard.json", report)
    print("\n".join(describe_scoreboard(report)))
    print(f"figures: {out / 'scoreboard.json'}; images: {out / 'images.png'}")
    chart = scoreboard_chart(report)
    if chart is not None:
        atomic_write_bytes(out / "chart.svg", chart.encode())
        print(f"chart: {out / 'chart.svg'}")
    return report


def read_model_of(source: str | Path, teacher: Model | None) -> Model:
    """What is known of a reference or a bundle before it is loaded. Raises `ArtifactError` if it is neither."""
    path = Path(source)
    if (path / "bundle.json").is_file():
        from ldm_deploy.runtime.bundle import read_bundle

        bundle = read_bundle(path)
        variant = bundle.data["default_variant"]
        if variant is None:
            raise ConfigError(f"{path} has no variant that draws; give a bundle of a whole model")
        record = next(entry for entry in bundle.data["variants"] if entry["name"] == variant)
        engines = [engine for engine in bundle.data["engines"] if engine["id"] in record["engines"]]
        files = tuple(path / file for engine in engines for file in engine["files"])
        about, sampling, name = bundle.data["model"], record, f"{path.resolve().name} {variant}"
        spec = {"kind": "variant", "bundle": str(path), "variant": variant}
    else:
        from ldm_deploy.models.reference import read_model
        from ldm_deploy.models.sources import load_source, resolve_source, weight_files

        path = resolve_source(source)
        about = read_model(path) if (path / "model.json").is_file() else load_source(path).model
        sampling, name, files = about["sampling"], f"{path.resolve().name} fp32-torch-cpu", tuple(weight_files(path))
        spec = {"kind": "reference", "path": str(path)}
    distilled = about.get("distilled")
    guided = distilled is None and sampling["guidance_scale"] != 1
    if distilled is not None:
        steps = tuple(sorted(distilled["steps"], reverse=True))
    else:
        steps = (sampling["steps"],) if teacher is None else teacher.steps[:1]
    return Model(name, about, spec, steps, 2 if guided else 1, files, tuple(about["default_size"]))


def row_name(model: Model, steps: int) -> str:
    return f"{model.name}, {steps} step{'' if steps == 1 else 's'}"


def _draw(
    models: Sequence[Model], grid: Grid, threads: int | None, seed: int
) -> tuple[dict[str, list[tuple[float, np.ndarray]]], dict[str, str], dict[str, int]]:
    """(row -> (milliseconds, image) of every pair, row -> why there is none, model -> peak memory in bytes)."""
    with ExitStack() as stack:
        workers = {model.name: Worker(model.name, model.spec, threads=threads) for model in models}
        for worker in workers.values():
            stack.enter_context(worker)
        turns = [Turn(row_name(model, steps), workers[model.name], steps) for model in models for steps in model.steps]
        prompt, first_seed = grid.pairs[0]
        for turn in turns:
            warm_up(lambda turn=turn: turn.worker.image(prompt, first_seed, steps=turn.steps)[0])  # type: ignore[misc]
        with task("drawing", len(turns) * len(grid.pairs)) as advance:
            samples, failed = interleaved(
                turns,
                lambda turn, index: turn.worker.image(*grid.pairs[index], steps=turn.steps),
                len(grid.pairs),
                seed=seed,
                after=advance,
            )
        memory = {name: worker.memory()["peak_bytes"] for name, worker in workers.items() if worker.alive}
        return samples, failed, memory


def _figures(drawn: np.ndarray, images: ImageSet, grid: Grid, lpips: Lpips, seed: int) -> Row:
    """What a set of images is worth by itself: uint8 (n, H, W, 3) in the grid's order."""
    found = retrieve(drawn, images, grid)
    retrieval = {key: found.get(key) for key in ("rate", "hits", "n", "method", "reason")}
    if not lpips.available:
        absent = not_measured_set(str(lpips.reason))
        no_mean = {"mean": None, "ci95": None, "n": 0, "reason": lpips.reason}
        return {"retrieval": retrieval, "diversity": no_mean, **dict.fromkeys(SETS, absent)}
    return {"retrieval": retrieval, "diversity": diversity(drawn, grid, lpips, seed),
            **distances_to_data(drawn, images, lpips, seed)}  # fmt: skip


def diversity(drawn: np.ndarray, grid: Grid, lpips: Lpips, seed: int = 0) -> Row:
    """Mean LPIPS between the images of one prompt and different seeds, over prompts; low where a model has few answers
    left (mode collapse). uint8 (n, H, W, 3) in the grid's order."""
    count = len(grid.seeds)
    if count < 2:
        return {"mean": None, "ci95": None, "n": 0, "reason": "diversity needs two seeds or more per prompt"}
    by_prompt = drawn.reshape(len(grid.prompts), count, *drawn.shape[1:])
    pairs = [lpips(by_prompt[:, one], by_prompt[:, other]) for one, other in combinations(range(count), 2)]
    each = np.mean(pairs, axis=0)
    interval = bootstrap_ci(each, seed=seed)
    ends = None if interval is None else [float(end) for end in interval]
    return {"mean": float(each.mean()), "ci95": ends, "n": len(each), "reason": None}


def distances_to_data(drawn: np.ndarray, images: ImageSet, lpips: Lpips, seed: int = 0) -> Row:
    """Fréchet and kernel distance to as many images of the data, skin-tone variants left out, on LPIPS features."""
    pool = np.flatnonzero(~images.skin_tone)
    count = min(len(drawn), len(pool))
    chosen = np.random.default_rng(seed).permutation(pool)[:count]
    _, real, made = lpips.compare(images.images[chosen], drawn[:count])
    return set_distances([(real, made)], seed)


def describe_scoreboard(report: Mapping[str, Any]) -> list[str]:
    """A line per row, for a terminal; then how retrieval was judged, and what could not be measured."""
    header = ("", "U-Net calls", "ms per image", "times as fast", "retrieval", "diversity", "LPIPS", "Fréchet", "MiB")
    lines = [header, *(_cells(row) for row in report["rows"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = [
        "  ".join(cell.ljust(width) if not place else cell.rjust(width)
                  for place, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]  # fmt: skip
    measured = next(row for row in report["rows"] if row["status"] == "ok")
    method = measured["retrieval"]["method"]
    notes = [] if method is None else [f"retrieval: nearest image by {method}"]
    reasons = (measured[name]["reason"] for name in ("retrieval", "diversity", *SETS))
    return [*table, *notes, *dict.fromkeys(reason for reason in reasons if reason is not None)]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["status"] != "ok":
        return (row["name"], f"failed: {row['reason']}", *[""] * 7)

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    ratio, distance = row["speedup"], row.get("against_teacher", {}).get("lpips", {}).get("mean")
    rate = row["retrieval"]["rate"]
    return (
        row["name"],
        str(row["unet_evaluations"]),
        f"{row['latency_ms']['median']:.1f}",
        "1" if ratio is None else f"{ratio['median']:.1f} ({ratio['ci95_low']:.1f}–{ratio['ci95_high']:.1f})",
        "–" if rate is None else f"{rate:.0%}",
        number(row["diversity"]["mean"], 3),
        number(distance, 3),
        number(row["frechet_distance"]["value"], 4),
        f"{row['size_bytes'] / 2**20:.1f}",
    )
