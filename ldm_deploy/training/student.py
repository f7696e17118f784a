"""What a student is made of: the U-Net that learns, its slow copy, and what both are trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_deploy.errors import TrainingError
from ldm_deploy.models.reference import Reference
from ldm_deploy.models.unet import UNet
from ldm_deploy.training.consistency import Predict, guided
from ldm_deploy.training.data import ImageSet
from ldm_deploy.training.diffusion import encode_images
from ldm_deploy.training.loop import device_rng


class Student(nn.Module):
    """`unet` learns. `target`, an average of it, is what it is compared with: its weights are buffers, so that nothing
    trains them and a checkpoint holds them."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.target = copy.deepcopy(unet)
        for module in self.target.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach().clone())

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the target towards the U-Net (Song et al. 2023, arXiv:2303.01469, eq. 8)."""
        if not self._pairs:  # found once: walking through the modules takes a GPU's time at every step
            own = dict(self.target.named_buffers())
            learning = [(name, value) for name, value in self.unet.named_parameters() if value.requires_grad]
            self._pairs = [(own[name], value.detach()) for name, value in learning]
        targets, values = ([pair[side] for pair in self._pairs] for side in (0, 1))
        torch._foreach_lerp_(targets, values, 1 - decay)


@dataclass(frozen=True)
class Material:
    """What a batch is drawn from, all on one device: posterior means and standard deviations (n, z, h, w) of latents,
    scaled, and captions as the text encoder gives them, (n, sequence, context); that of the empty caption (1, …)."""

    mean: Tensor
    std: Tensor
    context: Tensor
    empty: Tensor

    def draw(self, seed: int, purpose: str, step: int, batch: int, rows: slice, guidance: tuple[float, float]) -> Batch:
        """Rows `rows` of the batch of a step: they do not depend on how it is cut."""
        device = self.mean.device
        numbers = device_rng(seed, purpose, step, device)
        index = torch.randint(len(self.mean), (batch,), generator=numbers, device=device)[rows]
        shape = (batch, *self.mean.shape[1:])
        posterior = torch.randn(shape, generator=numbers, device=device)[rows]
        noise = torch.randn(shape, generator=numbers, device=device)[rows]
        place, share = (torch.rand(batch, generator=numbers, device=device)[rows] for _ in range(2))
        latent = self.mean[index] + self.std[index] * posterior
        low, high = guidance
        return Batch(latent, noise, self.context[index], low + (high - low) * share, place)


@dataclass(frozen=True)
class Batch:
    """`guidance` (batch,): uniform in the range; `place` (batch,): uniform in [0, 1), for the timestep."""

    latent: Tensor
    noise: Tensor
    context: Tensor
    guidance: Tensor
    place: Tensor


@torch.no_grad()
def make_material(teacher: Reference, images: ImageSet, input_ids: np.ndarray, empty_ids: list[int]) -> Material:
    """Encode every image and caption once; `input_ids` int64 (n, sequence)."""
    mean, std = encode_images(teacher.autoencoder, images.images)
    device, scale = mean.device, teacher.model["scale_factor"]
    encoder = teacher.text_encoder.to(device)
    ids = torch.from_numpy(input_ids).to(device)
    context = torch.cat([encoder(part) for part in ids.split(256)])
    empty = encoder(torch.tensor([empty_ids], device=device))
    encoder.cpu()
    return Material(scale * mean, scale * std, context, empty)


def guided_teacher(unet: Callable[..., Tensor], batch: Batch, empty: Tensor) -> Predict:
    """The teacher's prediction with guidance: both halves go through it at once, the one without a caption first."""
    context = torch.cat([empty.expand_as(batch.context), batch.context])

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        both = unet(torch.cat([sample, sample]), torch.cat([timestep, timestep]), context).float()
        unconditional, conditional = both.chunk(2)
        return guided(conditional, unconditional, batch.guidance)

    return predict


def plain(unet: Callable[..., Tensor], batch: Batch, with_guidance: bool) -> Predict:
    """One evaluation: of a student, told the guidance, or of a teacher without any."""
    told = (batch.guidance,) if with_guidance else ()
    return lambda sample, timestep: unet(sample, timestep, batch.context, *told).float()


def student_unet(described: Mapping[str, Any], start: nn.Module) -> UNet:
    """The U-Net that `described` (of model.json, "unet") says, with the weights of `start`; the guidance embedding, if
    it is new, is zero: what it computes first is what `start` does."""
    unet = UNet(**described)
    missing, unexpected = unet.load_state_dict(start.state_dict(), strict=False)
    if unexpected or any(not name.startswith("guidance_embedding.") for name in missing):
        raise ValueError(f"weights do not fit: {[*missing, *unexpected][0]}")
    return unet.train()


def check_moved(start: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> None:
    """Raises `TrainingError` for averages that are what they started as: the student would be the teacher."""
    if all(bool((averages[name] == value).all()) for name, value in start.items()):
        raise TrainingError(
            "the average of the student's weights never left its start, so that the student is the teacher; "
            "raise training.learning_rate or lower training.ema_decay"
        )
    if not all(math.isfinite(float(value.sum())) for value in averages.values()):
        raise TrainingError("the average of the student's weights is not finite; lower training.learning_rate")
