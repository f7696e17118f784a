"""A U-Net that learns to say what another one says: the training of pruned and of quantized ones.

Kim et al. 2023, "BK-SDM", arXiv:2305.15798, eq. 1 to 4: the denoising task, the teacher's output, and its features at
the end of every level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_deploy.errors import TrainingError
from ldm_deploy.models.unet import Stage, UNet
from ldm_deploy.training.conditioning import Conditioning
from ldm_deploy.training.diffusion import encode_images
from ldm_deploy.training.graphs import Replayed
from ldm_deploy.training.imitation_config import ImitationConfig
from ldm_deploy.training.loop import device_rng, run_stage
from ldm_deploy.training.processes import processes

if TYPE_CHECKING:
    from ldm_deploy.models.reference import Reference

# Predictions and latents have a standard deviation of about 1. A student that is further off is not learning.
FARTHEST = 50.0


class Heard(nn.Module):
    """A U-Net that also says what parts of it said: inputs -> (prediction, output of each of `names`)."""

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.unet, self.names = unet, tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        heard: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
                heard[name] = output

            return hook

        handles = [self.unet.get_submodule(name).register_forward_hook(keep(name)) for name in self.names]
        try:
            prediction = self.unet(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        return (prediction, *(heard[name] for name in self.names))


def feature_loss(features: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Squared difference of each feature map, in units of the teacher's mean square, averaged over the maps: a scalar.

    Kim et al. 2023, eq. 3, where the maps of one U-Net are summed as they are.
    """
    losses = [
        (feature.float() - value.float()).square().mean() / value.float().square().mean().clamp_min(1e-12)
        for feature, value in zip(features, wanted, strict=True)
    ]
    return torch.stack(losses).mean()


def last_of_levels(unet: UNet) -> Sequence[str]:
    """Names of the stages whose outputs are a level's last, on either way, and the middle's: where Kim et al. 2023 (eq.
    3) compare features."""
    found = []
    for side in ("down", "middle", "up"):
        layers = list(getattr(unet, side))
        for index, layer in enumerate(layers):
            following = layers[index + 1] if index + 1 < len(layers) else None
            if isinstance(layer, Stage) and not isinstance(following, Stage):
                found.append(f"{side}.{index}")
    return found


def check_task(config: ImitationConfig, teacher: Reference) -> None:
    """Raises `TrainingError` for a teacher of few steps where only the denoising task has a weight."""
    if "distilled" in teacher.model and not (config.output_weight or config.feature_weight):
        raise TrainingError(
            f"{teacher.directory} is a student of few steps, which has no task but to do as its teacher; "
            "give output_weight or feature_weight"
        )


def imitate(
    name: str,
    config: ImitationConfig,
    teacher: Reference,
    student: UNet,
    images: np.ndarray,
    texts: Sequence[str],
    points: tuple[Tensor, ...],
    directory: Path,
    fingerprint: str,
    *,
    resume: bool,
) -> UNet:
    """Train `student`, a U-Net made of the teacher's, in stage `name`; returns it, averaged, on the CPU.

    `images` uint8 (n, H, W, 3) with their captions `texts`; `points`: see `trajectory_points`. A teacher of few steps
    has no denoising task, as it answers another question, and is asked at the timesteps that it draws at.
    """
    from tokenizers import Tokenizer

    team = processes()
    device, stage, model = team.device, config.training, teacher.model
    distilled = model.get("distilled")
    task_weight = 0.0 if distilled else config.task_weight
    tokenizer = Tokenizer.from_str(teacher.tokenizer_text())
    ids = Conditioning(tokenizer, {"context_length": model["context_length"]}).encode(texts)
    input_ids, empty = torch.from_numpy(ids).to(device), torch.tensor(tokenizer.encode("").ids, device=device)
    mean, std = (model["scale_factor"] * value for value in encode_images(teacher.autoencoder, images))
    alphas_cumprod = torch.from_numpy(teacher.schedule.alphas_cumprod).float().to(device)
    kind = teacher.schedule.prediction_type
    # What a student of few steps says between the timesteps it draws at means nothing.
    timesteps = (torch.unique(points[1]) if distilled else torch.arange(len(alphas_cumprod))).to(device)
    span = (distilled or {}).get("guidance_range")
    torch.manual_seed(config.seed)
    whole = teacher.unet.to(device).to(memory_format=torch.channels_last)
    text_encoder = teacher.text_encoder.to(device)
    student.to(device).to(memory_format=torch.channels_last).requires_grad_(True)
    names = last_of_levels(student)
    same_shapes = stage.accumulation == 1 and not stage.gradient_checkpointing
    tutor, learner = (Replayed(Heard(unet, names), enabled=same_shapes) for unet in (whole, student))

    def loss(step: int, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        numbers = device_rng(config.seed, name, step, device)

        def uniform() -> Tensor:
            return torch.rand(stage.batch_size, generator=numbers, device=device)[rows]

        index, place, dropped, told = uniform(), uniform(), uniform() < config.caption_dropout, uniform()
        shape = (stage.batch_size, *mean.shape[1:])
        posterior, noise = (torch.randn(shape, generator=numbers, device=device)[rows] for _ in range(2))
        chosen, timestep = (index * len(mean)).long(), timesteps[(place * len(timesteps)).long()]
        latent = mean[chosen] + std[chosen] * posterior
        signal, spread = (
            value.sqrt()[:, None, None, None] for value in (alphas_cumprod[timestep], 1 - alphas_cumprod[timestep])
        )
        sample = (signal * latent + spread * noise).contiguous(memory_format=torch.channels_last)
        # A student that is told the guidance never sees an empty caption.
        captions = input_ids[chosen] if span else torch.where(dropped[:, None], empty[None], input_ids[chosen])
        guidance = (span[0] + (span[1] - span[0]) * told,) if span else ()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast_bf16, cache_enabled=False):
            with torch.no_grad():
                inputs = (sample, timestep, text_encoder(captions), *guidance)
                wanted, *wanted_features = tutor(*inputs)
            prediction, *features = learner(*inputs)
        wanted, prediction = wanted.float(), prediction.float()
        target = {"epsilon": noise, "sample": latent, "v_prediction": signal * noise - spread * latent}[kind]
        terms = {
            "task": (task_weight, (prediction - target).square().mean()),
            "output": (config.output_weight, (prediction - wanted).square().mean()),
            "feature": (config.feature_weight, feature_loss(features, wanted_features)),
        }
        total = torch.stack([weight * value for weight, value in terms.values()]).sum()
        return total, {term: value.detach() for term, (_, value) in terms.items()}

    averages = run_stage(name, student, loss, stage, directory, fingerprint, resume=resume, loss_limit=FARTHEST)
    student.load_state_dict({**student.state_dict(), **averages})  # what was not trained has no average
    whole.cpu()
    text_encoder.cpu()
    return student.cpu().eval()
