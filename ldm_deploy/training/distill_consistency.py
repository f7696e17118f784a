"""Consistency distillation of a U-Net: one stage, in latent space, with guidance folded in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ldm_deploy.models.reference import Reference
from ldm_deploy.models.unet import UNet
from ldm_deploy.training.consistency import Levels, consistency_loss, solver_grid
from ldm_deploy.training.distill_config import StepsConfig
from ldm_deploy.training.graphs import Replayed
from ldm_deploy.training.loop import Preview, run_stage
from ldm_deploy.training.lora import add_lora, merged_state
from ldm_deploy.training.processes import processes
from ldm_deploy.training.student import Material, Student, check_moved, guided_teacher, plain

# Latents have a standard deviation of 1. A student further than this from what it should say is not learning.
FARTHEST = 8.0


def train_consistency(
    teacher: Reference,
    unet: UNet,
    material: Material,
    config: StepsConfig,
    directory: Path,
    fingerprint: str,
    *,
    resume: bool,
    preview: Preview | None = None,
) -> dict[str, Tensor]:
    """Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378, algorithm 1) of `teacher` into `unet`.

    Returns the averaged weights of the student's U-Net, adapters merged. Raises `TrainingError` where they are the
    teacher's still.
    """
    stage, device = config.training, processes().device
    if config.lora_rank:
        unet.requires_grad_(False)
        add_lora(unet, config.lora_rank)
        if config.has_guidance:
            cast("nn.Module", unet.guidance_embedding).requires_grad_(True)
    student = Student(unet).to(device).to(memory_format=torch.channels_last)
    source = teacher.unet.to(device).to(memory_format=torch.channels_last)
    levels = Levels.of(teacher.schedule, device)
    grid = torch.from_numpy(solver_grid(teacher.schedule, config.solver_steps)).to(device)
    span = (config.guidance_min, config.guidance_max)
    same_shapes = stage.accumulation == 1 and not stage.gradient_checkpointing
    learner, target, tutor_unet = (
        Replayed(module, enabled=same_shapes) for module in (student.unet, student.target, source)
    )

    def loss(step: int, rows: slice) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        batch = material.draw(config.seed, "consistency", step, stage.batch_size, rows, span)
        at = (batch.place * config.solver_steps).long()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast_bf16, cache_enabled=False):
            tutor = (
                guided_teacher(tutor_unet, batch, material.empty)
                if config.has_guidance
                else plain(tutor_unet, batch, False)
            )
            each = consistency_loss(
                plain(learner, batch, config.has_guidance), plain(target, batch, config.has_guidance),
                tutor, batch.latent, batch.noise, grid[at], grid[at + 1], levels, config.huber_c,
            )  # fmt: skip
        return each.mean(), {}

    def follow(step: int) -> Mapping[str, float]:
        student.follow(config.target_decay)
        return {}

    start = {name: value.detach().clone() for name, value in student.named_parameters() if value.requires_grad}
    averages = run_stage(
        config.method, student, loss, stage, directory, fingerprint, resume=resume, preview=preview, after_step=follow,
        loss_limit=FARTHEST,
    )  # fmt: skip
    check_moved(start, averages)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(averages[name])
    return {name: value.cpu() for name, value in merged_state(student.unet).items()}
