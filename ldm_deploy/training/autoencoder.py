"""Stage one: the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_deploy.config import Config
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.training.data import ImageSet, photographs, random_crop
from ldm_deploy.training.loop import Preview, rng, run_stage
from ldm_deploy.training.losses import kl_divergence, reconstruction_loss


def build_autoencoder(config: Config) -> Autoencoder:
    return Autoencoder(**asdict(config.autoencoder))


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (batch, H, W, 3) -> float32 (batch, 3, H, W) in [-1, 1], channels last in memory."""
    scaled = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return scaled.contiguous(memory_format=torch.channels_last)


def to_images(tensor: Tensor) -> np.ndarray:
    """float (batch, 3, H, W) in [-1, 1] -> uint8 (batch, H, W, 3), halves rounded up as in the pipeline."""
    pixels = ((tensor.float() + 1) * 127.5).clamp(0, 255).add(0.5).floor().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def train_autoencoder(
    config: Config, data: ImageSet, directory: Path, fingerprint: str, *, resume: bool, preview: Preview | None = None
) -> Autoencoder:
    """Train on `data` (no held-out image among it) and crops of the free photographs; returns the averaged model."""
    torch.manual_seed(config.seed)
    model = build_autoencoder(config).to(memory_format=torch.channels_last)
    stage = config.autoencoder_training
    crops = round(stage.batch_size * config.photo_fraction)
    sources = list(photographs().values()) if crops else []

    def batch(step: int) -> np.ndarray:
        draw = rng(config.seed, "autoencoder", step)
        images = data.images[draw.integers(len(data.images), size=stage.batch_size - crops)]
        cut = [random_crop(sources[draw.integers(len(sources))], config.resolution, draw) for _ in range(crops)]
        images = np.concatenate([images, np.stack(cut)]) if cut else images
        flipped = draw.random(len(images)) < 0.5
        return np.where(flipped[:, None, None, None], images[:, :, ::-1], images)

    def loss(step: int, rows: slice) -> tuple[Tensor, Mapping[str, float]]:
        image = to_tensor(batch(step)[rows])
        sides = (side // config.autoencoder.downsampling for side in image.shape[-2:])
        shape = (stage.batch_size, config.autoencoder.z_channels, *sides)
        noise = torch.from_numpy(rng(config.seed, "posterior", step).standard_normal(shape, dtype=np.float32)[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast_bf16):
            reconstruction, mean, logvar = model(image, noise)
        rebuilt = reconstruction_loss(image, reconstruction.float())
        kl = kl_divergence(mean.float(), logvar.float()).mean()
        return rebuilt + config.kl_weight * kl, {"reconstruction": rebuilt.item(), "kl_nats": kl.item()}

    averages = run_stage("autoencoder", model, loss, stage, directory, fingerprint, resume=resume, preview=preview)
    model.load_state_dict(averages)
    return model.eval()
