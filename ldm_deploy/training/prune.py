"""A U-Net with fewer blocks, which learns from the whole one what the lost ones did.

Kim et al. 2023, "BK-SDM", arXiv:2305.15798: remove blocks, keep the weights of the others, and train with the denoising
task, the teacher's output and the teacher's features. Which blocks go is measured here (`prune_choice.py`), not given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_deploy.artifact import atomic_write_json
from ldm_deploy.errors import TrainingError
from ldm_deploy.training.imitation import check_task, imitate
from ldm_deploy.training.points import prediction_error, trajectory_points
from ldm_deploy.training.processes import processes
from ldm_deploy.training.prune_choice import Choice, choose, without
from ldm_deploy.training.prune_config import PruneConfig, load_prune_config
from ldm_deploy.training.teaching import (
    Teaching,
    count_flops,
    describe_figure,
    load_teacher,
    settle_config,
    training_images,
    write_student,
)

if TYPE_CHECKING:
    from ldm_deploy.models.reference import Reference

CHOICE = "choice.json"
# Predictions and latents have a standard deviation of about 1. A student that is further off is not learning.
FARTHEST = 50.0


def prune(
    reference: str | Path,
    data: str | Path,
    out: Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    seed: int | None = None,
    config: str | Path | PruneConfig | None = None,
) -> dict[str, Any]:
    """Write to `out` a reference whose U-Net lacks blocks of that of `reference`; the rest is the same.

    What was chosen, checkpoints and logs lie beside it in `<out>.training/`. `config`: a name in
    `prune_config.PRESETS` (the one for this device), a TOML file, or a configuration. The teacher may be a student of
    few steps: then there is no denoising task, as it answers another question, and it is asked at the timesteps that it
    draws at. The result is the content of training.json. Raises `TrainingError` if `out` exists or the wanted speed
    cannot be had.
    """
    resolved, name = settle_config(config, load_prune_config, seed)
    teacher = load_teacher(reference, out)
    if threads is not None:
        torch.set_num_threads(threads)
    check_task(resolved, teacher)
    images, chosen = training_images(teacher, data, resolved.training.batch_size)
    teaching = Teaching(teacher, "prune", resolved.to_dict(), name, data, images, len(chosen.texts))
    directory = out.with_name(out.name + ".training")
    points = trajectory_points(teacher, resolved.points, resolved.seed)
    choice = decide(teacher, points, resolved, directory / CHOICE, teaching.key(), resume=resume)
    left = without(teacher.unet, *(removal.name for removal in choice.removals))
    student = imitate("prune", resolved, teacher, left, chosen.images, chosen.texts, points, directory, teaching.key(),
                      resume=resume)  # fmt: skip
    described = {**teacher.model["unet"], "removed": list(student.removed)}
    model = {**teacher.model, "name": f"{teacher.model['name']}-pruned", "unet": described}
    weights = {
        "autoencoder": teacher.autoencoder.state_dict(),
        "text_encoder": teacher.text_encoder.state_dict(),
        "unet": student.state_dict(),
    }

    def figures(written: Reference) -> dict[str, Any]:
        found: dict[str, Any] = {"choice": choice.to_dict()}
        with torch.no_grad():
            found["prediction_error"] = prediction_error(written.unet, points, teacher.unet(*points))
        for who, unet in (("teacher", teacher.unet), ("student", written.unet)):
            one = tuple(value[:1] for value in points)
            parameters = sum(value.numel() for value in unet.parameters())
            found[who] = {"flops": count_flops(unet, *one), "parameters": parameters}
        return found

    return write_student(out, model, weights, teaching, ("prune",), figures, card_rows)


def decide(
    teacher: Reference, points: tuple[Tensor, ...], config: PruneConfig, file: Path, fingerprint: str, *, resume: bool
) -> Choice:
    """What to remove: `file`, if a run to go on with decided it (times differ from sitting to sitting), else measured
    and written there. Raises `TrainingError` for a file of another run. Of several processes the first one decides."""
    team = processes()
    if not file.exists() and team.first:
        device = team.device
        unet = teacher.unet.to(device)
        choice = choose(unet, tuple(value.to(device) for value in points), config.speedup, config.cost,
                        keep=config.keep)  # fmt: skip
        unet.cpu()
        atomic_write_json(file, {"fingerprint": fingerprint, **choice.to_dict()})
    elif not resume and team.first:
        raise TrainingError(
            f"{file} holds the choice of an earlier run; add --resume to go on, or remove {file.parent}"
        )
    team.wait()
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found, choice = data["fingerprint"], Choice.from_dict(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file} does not parse ({error}); remove {file.parent} to start over") from None
    if found != fingerprint:
        raise TrainingError(
            f"{file} was written with another configuration or other data; "
            f"give those again to resume, or remove {file.parent} to start over"
        )
    return choice


def card_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, teacher, student, how it was measured) for the model card."""
    choice = Choice.from_dict(figures["choice"])
    unit = "in torch on this machine" if choice.cost == "milliseconds" else "by FLOPs"
    rows = [
        (f"U-Net, {name}", describe_figure(figures["teacher"][name]), describe_figure(figures["student"][name]), how)
        for name, how in (("flops", "one image; two per multiply-accumulate"), ("parameters", ""))
    ]
    error = describe_figure(figures["prediction_error"])
    rows.append(("squared error of the prediction, relative", "0", error, "along the teacher's trajectories"))
    for removal in choice.removals:
        how = (
            f"without training: relative squared error {removal.error:.3g}; so far {removal.speedup:.2f} times as fast"
        )
        rows.append((f"removed: {removal.name}", "", "", f"{how}, {unit}"))
    return rows
