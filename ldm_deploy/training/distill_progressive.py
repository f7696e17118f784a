"""Progressive distillation of a U-Net: guidance folded in first, then half the steps, again and again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_deploy.models.reference import Reference
from ldm_deploy.models.unet import UNet
from ldm_deploy.training.consistency import Levels, solver_grid
from ldm_deploy.training.distill_config import StepsConfig
from ldm_deploy.training.loop import Preview, run_stage
from ldm_deploy.training.processes import processes
from ldm_deploy.training.progressive import original_loss, two_step_original
from ldm_deploy.training.student import Material, check_moved, guided_teacher, plain

FARTHEST = 64.0  # mean squared error, in units of the latents' variance, at which a student is not learning


class Learner(nn.Module):
    """The student of one stage, under the name that previews know."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet


def stage_names(config: StepsConfig) -> Iterator[tuple[str, int]]:
    """(name of the log, steps of the student) of each stage, in order."""
    if config.has_guidance:
        yield "progressive-guidance", config.solver_steps
    steps = config.solver_steps // 2
    while steps >= config.steps[-1]:
        yield f"progressive-{steps}", steps
        steps //= 2


def train_progressive(
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
    """Salimans and Ho 2022, arXiv:2202.00512, algorithm 2, after a stage that learns the guided predictions (Meng et
    al. 2023, arXiv:2210.03142, section 3.1). Every stage has `config.training.steps` steps, and its averaged student is
    the teacher of the next.

    Returns the weights of the last one. Raises `TrainingError` where a stage did not move.
    """
    stage, device = config.training, processes().device
    levels, span = Levels.of(teacher.schedule, device), (config.guidance_min, config.guidance_max)
    finest = torch.from_numpy(solver_grid(teacher.schedule, config.solver_steps)).to(device)
    learner = Learner(unet).to(device).to(memory_format=torch.channels_last)
    source: nn.Module = teacher.unet.to(device).to(memory_format=torch.channels_last)
    last = list(stage_names(config))[-1][0]

    def learn(name: str, steps: int, source: nn.Module) -> None:
        grid = finest[:: config.solver_steps // steps]
        folding = name == "progressive-guidance"
        # Where guidance is folded in, the student learns what its teacher predicts; later, two of its teacher's steps.
        between = grid if folding else finest[:: config.solver_steps // (2 * steps)]

        def loss(step: int, rows: slice) -> tuple[Tensor, Mapping[str, float | Tensor]]:
            batch = material.draw(config.seed, name, step, stage.batch_size, rows, span)
            at = (batch.place * steps).long()
            now = grid[at]
            sample = levels.noised(batch.latent, batch.noise, now)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast_bf16):
                with torch.no_grad():
                    if folding:
                        tutor = guided_teacher(source, batch, material.empty)
                        wanted = levels.original(sample, tutor(sample, now), now)
                    else:
                        tutor = plain(source, batch, config.has_guidance)
                        wanted = two_step_original(tutor, sample, now, between[2 * at + 1], grid[at + 1], levels)
                student = plain(learner.unet, batch, config.has_guidance)
                each = original_loss(student, wanted, sample, now, levels, config.snr_weighting)
            return each.mean(), {}

        start = {key: value.detach().clone() for key, value in learner.named_parameters()}
        averages = run_stage(
            name, learner, loss, stage, directory, fingerprint, resume=resume, loss_limit=FARTHEST,
            preview=preview if name == last else None,
        )  # fmt: skip
        check_moved(start, averages)
        with torch.no_grad():
            for key, parameter in learner.named_parameters():
                parameter.copy_(averages[key])

    for name, steps in stage_names(config):
        learn(name, steps, source)
        source = copy.deepcopy(learner.unet).eval().requires_grad_(False)
    return {name: value.detach().cpu() for name, value in learner.unet.state_dict().items()}
