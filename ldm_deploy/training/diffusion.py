"""Stage two: the text encoder and the U-Net, on latents of the frozen autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_deploy.config import Config
from ldm_deploy.diffusion.objective import min_snr_weights, offset_noise, sample_timesteps
from ldm_deploy.errors import TrainingError
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.models.reference import Reference, build_modules
from ldm_deploy.training.autoencoder import to_tensor
from ldm_deploy.training.loop import Preview, rng, run_stage
from ldm_deploy.training.lora import add_lora
from ldm_deploy.training.processes import processes


class Denoiser(nn.Module):
    """Text encoder and U-Net, trained together; untrained modules as model.json describes them."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        super().__init__()
        modules = build_modules(model)
        self.text_encoder, self.unet = modules["text_encoder"], modules["unet"]

    def forward(self, sample: Tensor, timestep: Tensor, input_ids: Tensor) -> Tensor:
        return self.unet(sample, timestep, self.text_encoder(input_ids))


@torch.no_grad()
def encode_images(autoencoder: Autoencoder, images: np.ndarray, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """uint8 (n, H, W, 3) -> posterior mean and standard deviation, float32 (n, z, H/f, W/f), unscaled, on the device
    that training uses."""
    device = processes().device
    autoencoder.to(device)
    moments = [
        autoencoder.encode(to_tensor(images[start : start + batch_size], device))
        for start in range(0, len(images), batch_size)
    ]
    autoencoder.cpu()
    mean = torch.cat([mean for mean, _ in moments]).contiguous()
    return mean, torch.exp(0.5 * torch.cat([logvar for _, logvar in moments])).contiguous()


def latent_scale(mean: Tensor, std: Tensor) -> float:
    """1 / standard deviation of the posterior samples over all images (Rombach et al. 2022, appendix G)."""
    return float(1 / torch.sqrt(mean.var() + std.square().mean()))


def train_denoiser(
    config: Config,
    described: Mapping[str, Any],
    latents: Callable[[int], tuple[Tensor, Tensor]],
    input_ids: np.ndarray,
    empty_ids: Sequence[int],
    directory: Path,
    fingerprint: str,
    *,
    resume: bool,
    preview: Preview | None = None,
    initial: Reference | None = None,
    frozen: nn.Module | None = None,
) -> Denoiser:
    """Train on captions int64 (n, sequence) and `latents`, posterior means and standard deviations (n, z, h, w) of the
    images at a height and width in pixels.

    Mean squared error of the schedule's kind of prediction: noise (Ho et al. 2020, arXiv:2006.11239, eq. 14), image, or
    v (Salimans and Ho 2022, arXiv:2202.00512, appendix D), at timesteps and with weights as `config.objective` says.
    `described`: the content of model.json. `initial`: a reference to go on from; with `config.lora_rank` only adapters
    of its U-Net's attention learn. `frozen`: a text encoder that does not learn. Returns the averaged model. Raises
    `TrainingError` if the weights of `initial` do not fit.
    """
    stage = config.diffusion_training
    scale = described["scale_factor"]
    device = processes().device
    ids, empty = torch.from_numpy(input_ids).to(device), torch.tensor(list(empty_ids), device=device)
    alphas_cumprod = torch.from_numpy(config.schedule.alphas_cumprod).float().to(device)
    kind = config.schedule.prediction_type
    torch.manual_seed(config.seed + 1)
    model = Denoiser(described).to(device).to(memory_format=torch.channels_last)
    if initial is not None:
        _start_from(model, initial)
    if config.lora_rank:
        model.requires_grad_(False)
        add_lora(model.unet, config.lora_rank)
    if frozen is not None:
        model.text_encoder.load_state_dict(frozen.state_dict())
        model.text_encoder.requires_grad_(False)

    total = config.schedule.num_train_timesteps
    gamma = config.objective.min_snr_gamma
    weighted = min_snr_weights(config.schedule.alphas_cumprod, gamma, kind) if gamma else np.ones(total)
    weights = torch.from_numpy(weighted).to(device, torch.float32)

    def loss(step: int, part: slice) -> tuple[Tensor, Mapping[str, float]]:
        mean, std = latents(stage.resolution(step, config.resolution))
        draw = rng(config.seed, "diffusion", step)
        shape = (stage.batch_size, *mean.shape[1:])
        # Drawn for the whole batch, in this order, and cut to the part.
        drawn = (
            draw.integers(len(mean), size=stage.batch_size),
            sample_timesteps(draw, stage.batch_size, total, config.objective.timestep_sampling),
            draw.random(stage.batch_size) < config.caption_dropout,
            draw.standard_normal(shape, dtype=np.float32),
            offset_noise(draw, shape, config.objective.offset_noise),
        )
        rows, timestep, dropped, posterior, noise = (torch.from_numpy(array[part]).to(device) for array in drawn)
        latent = scale * (mean[rows] + std[rows] * posterior)
        signal, spread = (
            value.sqrt()[:, None, None, None] for value in (alphas_cumprod[timestep], 1 - alphas_cumprod[timestep])
        )
        noisy = signal * latent + spread * noise
        target = {"epsilon": noise, "sample": latent, "v_prediction": signal * noise - spread * latent}[kind]
        captions = torch.where(dropped[:, None], empty[None], ids[rows])
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast_bf16):
            prediction = model(noisy.contiguous(memory_format=torch.channels_last), timestep, captions)
        error = (prediction.float() - target).square().mean(dim=(1, 2, 3))
        return (weights[timestep] * error).mean(), {}

    averages = run_stage("diffusion", model, loss, stage, directory, fingerprint, resume=resume, preview=preview)
    model.load_state_dict(averages)
    return model.cpu().eval()


def _start_from(model: Denoiser, initial: Reference) -> None:
    try:
        model.text_encoder.load_state_dict(initial.text_encoder.state_dict())
        model.unet.load_state_dict(initial.unet.state_dict())
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise TrainingError(
            f"the weights in {initial.directory} do not fit the configuration ({first}); "
            "give the text_encoder and unet that they were trained with"
        ) from None
