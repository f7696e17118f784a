"""Two folders of images, paired by file name: the quality of one against the other, at any number of images.

Measured in shards (`shards.py`) that lie beside the output until it is written, so a killed run goes on where it
stopped. Merging reads them in order, one at a time: what is kept per image are a few numbers.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.artifact import atomic_write_bytes, atomic_write_json, check_replaceable, staged_directory
from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval.budget import QUALITY, Budget, Limits, check_limits
from ldm_deploy.eval.choose import quality_figures
from ldm_deploy.eval.distribution import Block
from ldm_deploy.eval.image_files import SUFFIXES, image_size, paired_names
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.machine import machine, usable_threads
from ldm_deploy.eval.quality import METRICS, describe_figure, image_entry, summarise
from ldm_deploy.eval.shards import SHARD, Measured, Shard, measure_all, plan_shards, read_shard, write_shard
from ldm_deploy.progress import task

FEATURES = ("reference_features", "candidate_features")

Record = dict[str, Any]


def is_meant(directory: Path, reference: Path | None) -> bool:
    """Whether `ldm-deploy eval` was given a folder of images: no bundle, and images in it or something to compare."""
    if not directory.is_dir() or (directory / "bundle.json").is_file():
        return False
    return reference is not None or any(path.suffix.lower() in SUFFIXES for path in directory.iterdir())


def compare_folders(
    candidate: Path,
    reference: Path,
    out: Path,
    *,
    processes: int | None = None,
    ray_address: str | None = None,
    budget: Budget | None = None,
    seed: int = 0,
) -> Record:
    """Compare every image of `candidate` with that of the same name in `reference`; write and return the report.

    PNG or JPEG, 8-bit RGB, all of one size. `out` gets report.json, report.md and images.csv (one line per image).
    The numbers do not depend on `processes` (all processors if None) or on `ray_address` ("auto", "local" or an
    address). `budget`: its limits on quality become gates. Raises `DataError` for images that cannot be compared.
    """
    started = datetime.now(UTC)
    check_replaceable(out)
    names = paired_names(reference, candidate)
    size = image_size(reference / names[0])
    limits = _quality_limits(budget, candidate.name) if budget else Limits({}, ())
    lpips = Lpips(limits.lpips_backbone)
    processes = processes or usable_threads()
    backbone = lpips.backbone if lpips.available else None
    shards = plan_shards(reference, candidate, names, size, backbone, lpips.weights_sha256)
    folder = out.absolute().with_name(out.absolute().name + ".shards")
    todo = [shard for shard in shards if read_shard(folder, shard, ()) is None]
    left = sum(len(shard.names) for shard in todo)
    with task("comparing images", len(names), done=len(names) - left) as advance:
        for shard, measured in measure_all(todo, processes, ray_address):
            write_shard(folder, shard, measured)
            advance(len(shard.names))
    found = _merged(folder, shards)
    if lpips.reason is not None:
        found.reasons["lpips"] = lpips.reason
    quality = summarise(
        found.arrays, found.reasons, lambda index: {"file": names[index]}, lpips, _blocks(folder, shards),
        size=size, seed=seed,
    )  # fmt: skip
    flat = [names[i] for i in np.flatnonzero(found.arrays["candidate_flat"] & ~found.arrays["reference_flat"])]
    report: Record = {
        "format": 1,
        "kind": "image folders",
        "created": started.isoformat(timespec="seconds"),
        "duration_s": round((datetime.now(UTC) - started).total_seconds(), 1),
        "reference": str(reference),
        "candidate": str(candidate),
        "images": len(names),
        "size": list(size),
        "protocol": {"shard": SHARD, "processes": None if ray_address else processes, "ray": ray_address, "seed": seed},
        "machine": machine(processes),
        "status": "failed" if flat else "ok",
        "reason": _flat_reason(flat),
        "constant": flat,
        "quality": quality,
        "budget": {"path": budget.path, "digest": budget.digest} if budget else None,
        "gates": [gate.to_dict() for gate in check_limits(limits, quality_figures(quality))],
    }
    with staged_directory(out) as staging:
        atomic_write_bytes(staging / "images.csv", _table(names, found.arrays).encode())
        atomic_write_bytes(staging / "report.md", to_markdown(report).encode())
        atomic_write_json(staging / "report.json", report)
    shutil.rmtree(folder, ignore_errors=True)
    return report


def _quality_limits(budget: Budget, name: str) -> Limits:
    """The limits that images alone can keep; `name` stands for the variant's."""
    own = budget.limits_for(name)
    return Limits(
        {limit: value for limit, value in own.limits.items() if limit in QUALITY},
        tuple(limit for limit in own.required if limit in QUALITY),
        own.lpips_backbone,
    )


def _merged(folder: Path, shards: Sequence[Shard]) -> Measured:
    """All arrays but the features, in the order of the images."""
    parts = []
    for shard in shards:
        measured = _stored(folder, shard, None)
        parts.append(Measured({k: v for k, v in measured.arrays.items() if k not in FEATURES}, measured.reasons))
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    return Measured(arrays, dict(parts[0].reasons))  # all shards have images of one size, so their reasons are the same


def _blocks(folder: Path, shards: Sequence[Shard]) -> Iterator[Block]:
    for shard in shards:
        arrays = _stored(folder, shard, FEATURES).arrays
        yield arrays[FEATURES[0]], arrays[FEATURES[1]]


def _stored(folder: Path, shard: Shard, names: Sequence[str] | None) -> Measured:
    measured = read_shard(folder, shard, names)
    if measured is None:
        raise EvaluationError(f"{folder / shard.file} was changed by another process; run the same command again")
    return measured


def _flat_reason(names: Sequence[str]) -> str | None:
    if not names:
        return None
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} of the candidate is constant (one flat colour); the reference's is not"


def _table(names: Sequence[str], found: Mapping[str, np.ndarray]) -> str:
    """images.csv: one line per image, in the order of their names."""
    text = io.StringIO()
    columns = [name for name in METRICS if name in found]
    heads = ["file", *columns, "shift_red", "shift_green", "shift_blue", "tile_top", "tile_left"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for index, name in enumerate(names):
        entry = image_entry(found, index)
        writer.writerow([name, *(entry[column] for column in columns), *entry["colour_shift"], *entry["tile_at"]])
    return text.getvalue()


def exit_code(report: Record) -> int:
    """0 kept; 3 a gate failed, or the candidate holds constant images; 4 a required gate was not measured."""
    results = [gate["result"] for gate in report["gates"] if gate["required"] or gate["result"] == "fail"]
    if report["status"] != "ok" or "fail" in results:
        return 3
    return 4 if "not measured" in results else 0


def describe(report: Record) -> list[str]:
    """What a person reads: one line per figure, then one per gate."""
    lines = [f"{report['candidate']} against {report['reference']}: {report['images']} images"]
    if report["reason"]:
        lines.append(f"{report['status']}: {report['reason']}")
    lines += [f"{name}: {describe_figure(figure)}" for name, figure in report["quality"].items()]
    for gate in report["gates"]:
        reason = f": {gate['reason']}" if gate["reason"] else ""
        lines.append(f"{gate['name']} {gate['limit_text']}: {gate['result']}{reason}")
    return lines


def to_markdown(report: Record) -> str:
    """A summary for a pull request."""
    title, *lines = describe(report)
    return f"**{title}**\n\n" + "".join(f"- {line}\n" for line in lines)
