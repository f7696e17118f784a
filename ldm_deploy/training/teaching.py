"""What the distillation of a decoder, a pruned U-Net and one for INT8 share: before the training, and after it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ldm_deploy.artifact import content_key, staged_directory, write_manifest
from ldm_deploy.errors import DataError, TrainingError
from ldm_deploy.models.reference import Reference, load_reference, save_reference
from ldm_deploy.models.sources import source_digest
from ldm_deploy.training.data import ImageSet, load_images
from ldm_deploy.training.processes import processes
from ldm_deploy.training.record import training_record

C = TypeVar("C")  # a configuration
RECIPES = {"decoder": "a small decoder", "prune": "a pruned U-Net", "int8": "a U-Net that bears INT8"}
HELD_OUT_SHOWN = 32  # held-out images that a preview measures

# figures of the finished directory -> rows (figure, teacher, student, how it was measured)
Rows = Callable[[Mapping[str, Any]], Sequence[tuple[str, str, str, str]]]


@dataclass(frozen=True)
class Teaching:
    """Who teaches what, with which configuration (as JSON) and data. `donor`: whose part is taken over, untrained."""

    teacher: Reference
    recipe: str
    config: Mapping[str, Any]
    config_name: str
    data: str | Path
    images: ImageSet
    trained_on: int  # images
    donor: Reference | None = None

    @property
    def parents(self) -> dict[str, str]:
        return {"data": self.images.digest, "teacher": source_digest(self.teacher.directory)}

    def key(self) -> str:
        """Of everything that decides the result: a checkpoint with another one is not gone on with."""
        free = ("checkpoint_every", "preview_every", "gradient_checkpointing")
        training = {name: value for name, value in self.config["training"].items() if name not in free}
        return content_key({**self.parents, "recipe": self.recipe, "config": {**self.config, "training": training}})

    def command(self, out: Path) -> str:
        data = self.data if str(self.data) == "photos" else Path(self.data).name
        words = ["ldm-deploy", "distill", self.teacher.directory.name, "--recipe", self.recipe]
        words += ["--config", self.config_name, "--data", str(data), "--out", out.name]
        return shlex.join(words if self.donor is None else [*words, "--init-from", self.donor.directory.name])


def settle_config(config: str | Path | C | None, load: Callable[[str | Path], C], seed: int | None) -> tuple[C, str]:
    """(the configuration, what a model card calls it). `config`: as the functions that distil take it; None is the
    preset for this device. `seed` replaces its own."""
    if config is None:
        config = "gpu" if processes().device.type == "cuda" else "cpu"
    settled, name = (load(config), Path(config).name) if isinstance(config, str | Path) else (config, "custom")
    return (settled if seed is None else replace(cast("Any", settled), seed=seed)), name


def load_teacher(reference: str | Path, out: Path) -> Reference:
    """Raises `TrainingError` if `out` exists: asked before the work, not after it."""
    if out.exists():
        raise TrainingError(f"{out} exists; remove it or give another --out")
    return load_reference(reference)


def training_images(teacher: Reference, data: str | Path, batch_size: int) -> tuple[ImageSet, ImageSet]:
    """(all images, at the teacher's size; those to train on: neither held out nor skin-tone variants).

    Raises `DataError` if those are fewer than a batch.
    """
    height, width = teacher.model["default_size"]
    if height != width:
        raise TrainingError(f"{teacher.directory} draws {height}x{width}; its images must be square to train on data")
    images = load_images(data, height, teacher.model.get("conditioning", "captions"))
    chosen = images.select(~images.held_out & ~images.skin_tone)
    if len(chosen.texts) < batch_size:
        raise DataError(
            f"data {str(data)!r} has {len(chosen.texts)} images to train on, fewer than one batch ({batch_size}); "
            "add images or lower training.batch_size"
        )
    return images, chosen


def write_student(
    out: Path,
    model: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]],
    teaching: Teaching,
    stages: Sequence[str],
    figures: Callable[[Reference], Mapping[str, Any]],
    rows: Rows,
) -> dict[str, Any]:
    """The student's directory, with its card; `figures` are measured on what was written. Returns training.json's
    content."""
    team = processes()
    logs = out.with_name(out.name + ".training")
    paths = {stage: logs / f"{stage}.jsonl" for stage in stages}
    record = training_record(teaching.command(out), teaching.images, teaching.trained_on, paths, teaching.config)
    record["recipe"] = teaching.recipe
    record["teacher"] = {"name": teaching.teacher.model["name"], "digest": teaching.parents["teacher"]}
    if teaching.donor is not None:
        digest = source_digest(teaching.donor.directory)
        record["init_from"] = {"name": teaching.donor.model["name"], "digest": digest}
    model = {key: value for key, value in model.items() if key != "shared"}
    if team.first:
        with staged_directory(out) as staging:
            save_reference(staging, model, weights)
            (staging / "tokenizer.json").write_text(teaching.teacher.tokenizer_text(), encoding="utf-8")
            record["figures"] = dict(figures(load_reference(staging)))
            (staging / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            card = student_card(model, record, rows(record["figures"]))
            (staging / "README.md").write_text(card, encoding="utf-8")
            write_manifest(staging, "reference", content_key(record), teaching.parents)
    team.wait()
    return record


def student_card(model: Mapping[str, Any], record: Mapping[str, Any], rows: Sequence[tuple[str, str, str, str]]) -> str:
    """The model card, Markdown."""
    what = RECIPES[record["recipe"]]
    teacher, data, config = record["teacher"], record["data"], record["config"]
    where = f"{record['threads']} threads" if record["device"] == "cpu" else record["device"]
    lines = [
        f"# {model['name']}: {what}",
        "",
        f"Distilled from `{teacher['name']}` (digest `{teacher['digest']}`), from which it has everything else. "
        "Weights are rounded to fp16; the rounded model, computed in fp32, is the reference that engines are compared "
        "with. "
        f"Licence: {model['license']}.",
        "",
        *_taken_over(record),
        "## Made by",
        "",
        f"    {record['command']}",
        "",
        f"Data: {data['images_trained_on']} images (digest `{data['digest']}`; {data['held_out']} images held out). "
        f"torch {record['torch']}, {where}, seed {config['seed']}.",
        "",
    ]
    if record["stages"]:
        lines += ["| stage | steps | batch | learning rate | minutes | final loss |", "|---|---|---|---|---|---|"]
    training = config["training"]
    for stage, summary in record["stages"].items():
        lines.append(
            f"| {stage} | {summary['steps']} | {training['batch_size']} | {training['learning_rate']:g} "
            f"| {summary['minutes']} | {summary['final_loss']:.4f} |"
        )
    lines += ["", "## Figures", "", "| figure | teacher | student | how |", "|---|---|---|---|"]
    lines += [f"| {name} | {of_teacher} | {of_student} | {how} |" for name, of_teacher, of_student, how in rows]
    return "\n".join(lines) + "\n"


def _taken_over(record: Mapping[str, Any]) -> tuple[str, ...]:
    donor = record.get("init_from")
    return () if donor is None else (f"The part is that of `{donor['name']}` (digest `{donor['digest']}`).", "")


def describe_figure(value: float | None, unit: str = "") -> str:
    """A figure for a person; "not measured" where there is none."""
    if value is None:
        return "not measured"
    return f"{value:,}{unit}" if isinstance(value, int) else f"{value:.4g}{unit}"


def count_flops(module: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of one pass: two per multiply-accumulate of convolutions, linear layers and attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # torch has no formula for its fused attention on a CPU; written out it is two products that it counts.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())
