"""A short last training after which INT8 costs less: the U-Net learns to say rounded what it said unrounded.

Students of few steps suffer more from INT8 than their teachers, as no later step repairs an error. The result is a
reference like any other, in float; engines of it are quantized as those of its teacher are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm_deploy.errors import TrainingError
from ldm_deploy.training.imitation import check_task, imitate
from ldm_deploy.training.int8_config import Int8Config, load_int8_config
from ldm_deploy.training.points import prediction_error, trajectory_points
from ldm_deploy.training.simulated import in_float, simulate
from ldm_deploy.training.teaching import (
    Teaching,
    describe_figure,
    load_teacher,
    settle_config,
    training_images,
    write_student,
)

if TYPE_CHECKING:
    from ldm_deploy.models.reference import Reference
    from ldm_deploy.models.unet import UNet


def distill_int8(
    reference: str | Path,
    data: str | Path,
    out: Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    seed: int | None = None,
    config: str | Path | Int8Config | None = None,
) -> dict[str, Any]:
    """Write to `out` a reference whose U-Net, in INT8, is nearer to that of `reference` in float; the rest is the same.

    Checkpoints and logs lie beside it in `<out>.training/`. `config`: a name in `int8_config.PRESETS` (the one for this
    device), a TOML file, or a configuration. The result is the content of training.json. Raises `TrainingError` if
    `out` exists, `keep` names nothing, or the training did not help.
    """
    resolved, name = settle_config(config, load_int8_config, seed)
    teacher = load_teacher(reference, out)
    check_task(resolved, teacher)
    known = {name for name, _ in teacher.unet.named_modules()}
    for one in resolved.keep:
        if one not in known:
            raise TrainingError(f"keep has {one!r}, which no part of the U-Net of {teacher.directory} is called")
    if threads is not None:
        torch.set_num_threads(threads)
    images, chosen = training_images(teacher, data, resolved.training.batch_size)
    teaching = Teaching(teacher, "int8", resolved.to_dict(), name, data, images, len(chosen.texts))
    directory = out.with_name(out.name + ".training")
    points = trajectory_points(teacher, resolved.points, resolved.seed)

    def rounded(unet: UNet) -> Any:
        return simulate(unet, points, resolved.layers, resolved.keep)

    student = imitate("int8", resolved, teacher, rounded(teacher.unet), chosen.images, chosen.texts, points, directory,
                      teaching.key(), resume=resume)  # fmt: skip
    weights = {
        "autoencoder": teacher.autoencoder.state_dict(),
        "text_encoder": teacher.text_encoder.state_dict(),
        "unet": in_float(student.state_dict()),
    }

    def figures(written: Reference) -> dict[str, Any]:
        others = trajectory_points(teacher, resolved.points, resolved.seed + 1)
        with torch.no_grad():
            wanted = teacher.unet(*others)
        found = {
            "teacher_int8_error": prediction_error(rounded(teacher.unet), others, wanted),
            "student_int8_error": prediction_error(rounded(written.unet), others, wanted),
            "student_float_error": prediction_error(written.unet, others, wanted),
        }
        if not found["student_int8_error"] < found["teacher_int8_error"]:
            raise TrainingError(
                f"the error in INT8 is {found['student_int8_error']:.3g} after training and "
                f"{found['teacher_int8_error']:.3g} before; nothing is written: change learning_rate or steps"
            )
        return found

    model = {**teacher.model, "name": f"{teacher.model['name']}-int8-aware"}
    return write_student(out, model, weights, teaching, ("int8",), figures, card_rows)


def card_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, teacher, student, how it was measured) for the model card."""
    error, how = "squared error of the prediction, relative", "against the teacher in float, along its trajectories"
    return [
        (f"{error}, in INT8", describe_figure(figures["teacher_int8_error"]),
         describe_figure(figures["student_int8_error"]), f"{how}; simulated"),
        (f"{error}, in float", "0", describe_figure(figures["student_float_error"]), how),
    ]  # fmt: skip
