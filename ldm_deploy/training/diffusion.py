"""Stage two: the text encoder and the U-Net, on latents of the frozen autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_deploy.config import Config
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.models.text_encoder import TextEncoder
from ldm_deploy.models.unet import UNet
from ldm_deploy.training.autoencoder import to_tensor
from ldm_deploy.training.loop import rng, run_stage


class Denoiser(nn.Module):
    """Text encoder and U-Net, trained together."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(**{**asdict(config.text_encoder), "vocab_size": vocab_size})
        self.unet = UNet(
            in_channels=config.autoencoder.z_channels, context_channels=config.text_encoder.width, **asdict(config.unet)
        )

    def forward(self, sample: Tensor, timestep: Tensor, input_ids: Tensor) -> Tensor:
        return self.unet(sample, timestep, self.text_encoder(input_ids))


@torch.no_grad()
def encode_images(autoencoder: Autoencoder, images: np.ndarray, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """uint8 (n, H, W, 3) -> posterior mean and standard deviation, float32 (n, z, H/f, W/f), unscaled."""
    moments = [
        autoencoder.encode(to_tensor(images[start : start + batch_size])) for start in range(0, len(images), batch_size)
    ]
    mean = torch.cat([mean for mean, _ in moments]).contiguous()
    return mean, torch.exp(0.5 * torch.cat([logvar for _, logvar in moments])).contiguous()


def latent_scale(mean: Tensor, std: Tensor) -> float:
    """1 / standard deviation of the posterior samples over all images (Rombach et al. 2022, appendix G)."""
    return float(1 / torch.sqrt(mean.var() + std.square().mean()))


def train_denoiser(
    config: Config,
    autoencoder: Autoencoder,
    images: np.ndarray,
    input_ids: np.ndarray,
    empty_ids: Sequence[int],
    vocab_size: int,
    directory: Path,
    fingerprint: str,
    *,
    resume: bool,
) -> tuple[Denoiser, float]:
    """Train on `images` uint8 (n, H, W, 3) with captions `input_ids` int64 (n, sequence).

    v-prediction (Salimans and Ho 2022, arXiv:2202.00512, appendix D), uniform timesteps, mean squared error.
    Returns the averaged model and the latents' scale factor.
    """
    stage = config.diffusion_training
    mean, std = encode_images(autoencoder, images)
    scale = latent_scale(mean, std)
    ids, empty = torch.from_numpy(input_ids), torch.tensor(list(empty_ids))
    alphas_cumprod = torch.from_numpy(config.schedule.alphas_cumprod).float()
    torch.manual_seed(config.seed + 1)
    model = Denoiser(config, vocab_size).to(memory_format=torch.channels_last)

    def loss(step: int) -> tuple[Tensor, Mapping[str, float]]:
        draw = rng(config.seed, "diffusion", step)
        rows = torch.from_numpy(draw.integers(len(images), size=stage.batch_size))
        timestep = torch.from_numpy(draw.integers(config.schedule.num_train_timesteps, size=stage.batch_size))
        dropped = torch.from_numpy(draw.random(stage.batch_size) < config.caption_dropout)
        posterior, noise = (
            torch.from_numpy(draw.standard_normal((stage.batch_size, *mean.shape[1:]), dtype=np.float32))
            for _ in range(2)
        )
        latent = scale * (mean[rows] + std[rows] * posterior)
        signal, spread = (
            value.sqrt()[:, None, None, None] for value in (alphas_cumprod[timestep], 1 - alphas_cumprod[timestep])
        )
        noisy = signal * latent + spread * noise
        target = signal * noise - spread * latent if config.schedule.prediction_type == "v_prediction" else noise
        captions = torch.where(dropped[:, None], empty[None], ids[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast_bf16):
            prediction = model(noisy.contiguous(memory_format=torch.channels_last), timestep, captions)
        return functional.mse_loss(prediction.float(), target), {}

    averages = run_stage("diffusion", model, loss, stage, directory, fingerprint, resume=resume)
    model.load_state_dict(averages)
    return model.eval(), scale
