"""Stage one: the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_deploy.config import Config
from ldm_deploy.errors import TrainingError
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.models.discriminator import PatchDiscriminator
from ldm_deploy.models.layers import Dropout
from ldm_deploy.models.vq import VectorQuantizer
from ldm_deploy.training.data import ImageSet, photographs, random_crop, resize
from ldm_deploy.training.loop import Adversary, Preview, rng, run_stage
from ldm_deploy.training.losses import (
    Perceptual,
    adaptive_weight,
    generator_loss,
    gradient_penalty,
    hinge_loss,
    kl_divergence,
    reconstruction_loss,
)
from ldm_deploy.training.processes import processes


def build_autoencoder(config: Config) -> Autoencoder:
    return Autoencoder(**asdict(config.autoencoder))


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (batch, H, W, 3) -> float32 (batch, 3, H, W) in [-1, 1] on `device`, channels last in memory."""
    scaled = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return scaled.contiguous(memory_format=torch.channels_last)


def to_images(tensor: Tensor) -> np.ndarray:
    """float (batch, 3, H, W) in [-1, 1] -> uint8 (batch, H, W, 3), halves rounded up as in the pipeline."""
    pixels = ((tensor.float().cpu() + 1) * 127.5).clamp(0, 255).add(0.5).floor().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def train_autoencoder(
    config: Config,
    data: ImageSet,
    directory: Path,
    fingerprint: str,
    *,
    resume: bool,
    preview: Preview | None = None,
    perceptual: Perceptual | None = None,
) -> Autoencoder:
    """Train on `data` (no held-out image among it) and crops of the free photographs; returns the averaged model.

    `perceptual`: the distance that `config.autoencoder_loss.perceptual_weight` weighs; without one a weight that is not
    0 raises `TrainingError`.
    """
    weights = config.autoencoder_loss
    if weights.perceptual_weight and perceptual is None:
        raise TrainingError(
            f"autoencoder_loss.perceptual_weight is {weights.perceptual_weight} and there is no perceptual distance; "
            "install ldm-deploy[export] and run `make setup` for its weights, or set perceptual_weight = 0"
        )
    team = processes()
    torch.manual_seed(config.seed)
    model = build_autoencoder(config).to(team.device).to(memory_format=torch.channels_last)
    stage = config.autoencoder_training
    crops = round(stage.batch_size * config.photo_fraction)
    sources = list(photographs().values()) if crops else []

    def batch(step: int) -> np.ndarray:
        size = stage.resolution(step, config.resolution)
        draw = rng(config.seed, "autoencoder", step)
        images = resize(data.images[draw.integers(len(data.images), size=stage.batch_size - crops)], size)
        cut = [random_crop(sources[draw.integers(len(sources))], size, draw) for _ in range(crops)]
        images = np.concatenate([images, np.stack(cut)]) if cut else images
        flipped = draw.random(len(images)) < 0.5
        return np.where(flipped[:, None, None, None], images[:, :, ::-1], images)

    quantizer = model.quantizer if isinstance(model.quantizer, VectorQuantizer) else None
    if quantizer is not None and weights.codebook_averaged:
        quantizer.follow_mean()
    last_layer = model.decoder.last_layer
    used: list[tuple[slice, Tensor, Tensor]] = []  # rows, latents, codes of this step, for the codebook's statistics
    dropouts = [module for module in model.modules() if isinstance(module, Dropout) and module.rate]

    def reconstruct(step: int, rows: slice) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """(image, reconstruction, regulariser to add to the loss, what to log of it)."""
        image = to_tensor(batch(step)[rows], team.device)
        if dropouts:
            torch.manual_seed(int(rng(config.seed, "dropout", step).integers(2**62)))
            for dropout in dropouts:
                dropout.part = rows, stage.batch_size
        sides = (side // config.autoencoder.downsampling for side in image.shape[-2:])
        shape = (stage.batch_size, config.autoencoder.z_channels, *sides)
        drawn = rng(config.seed, "posterior", step).standard_normal(shape, dtype=np.float32)
        noise = torch.from_numpy(drawn[rows]).to(team.device)
        with torch.autocast(team.device.type, torch.bfloat16, enabled=config.autocast_bf16):
            if quantizer is None:
                reconstruction, mean, logvar = model(image, noise)
                kl = kl_divergence(mean.float(), logvar.float()).mean()
                return image, reconstruction.float(), weights.kl_weight * kl, {"kl_nats": kl}
            latent, _ = model.encode(image)
        quantized, codebook, commitment, indices = quantizer.train_step(latent.float())
        used.append((rows, latent.detach().float(), indices))
        with torch.autocast(team.device.type, torch.bfloat16, enabled=config.autocast_bf16):
            reconstruction = model.render(quantized)
        logged = {"codebook": codebook, "commitment": commitment}
        moved_by_gradient = 0.0 if quantizer.averaged else codebook
        return image, reconstruction.float(), moved_by_gradient + weights.commitment_weight * commitment, logged

    def loss(step: int, rows: slice) -> tuple[Tensor, Mapping[str, float]]:
        image, reconstruction, regulariser, logged = reconstruct(step, rows)
        rebuilt = reconstruction_loss(image, reconstruction)
        logged = {"reconstruction": rebuilt, **logged}
        if weights.perceptual_weight and perceptual is not None:
            logged["perceptual"] = perceptual(image, reconstruction).mean()
            rebuilt = rebuilt + weights.perceptual_weight * logged["perceptual"]
        total = rebuilt + regulariser
        if adversary is not None and step >= weights.disc_start:
            fooled = generator_loss(adversary.module(reconstruction))
            share = (rows.stop - rows.start) / stage.batch_size
            # The whole batch's weight, or, where `accumulation` cuts the batch, each part's own.
            everywhere = team.sum_ if stage.accumulation == 1 else lambda tensors: None
            balance = adaptive_weight(rebuilt * share, fooled * share, last_layer, everywhere)
            logged |= {"generator": fooled, "generator_weight": balance}
            total = total + weights.gan_weight * balance * fooled
        return total, {name: value.item() for name, value in logged.items()}

    def discriminate(step: int, rows: slice) -> tuple[Tensor, Mapping[str, float]]:
        assert adversary is not None
        with torch.no_grad():
            image, reconstruction, _, _ = reconstruct(step, rows)
        used.clear()  # the codebook's statistics are of the step that trains it
        real, fake = adversary.module(image), adversary.module(reconstruction)
        total, logged = hinge_loss(real, fake), {"logits_real": real.mean().item(), "logits_fake": fake.mean().item()}
        if weights.gradient_penalty:
            penalty = gradient_penalty(adversary.module, image)
            total, logged["gradient_penalty"] = total + weights.gradient_penalty * penalty, penalty.item()
        return total, logged

    def after_step(step: int) -> Mapping[str, float]:
        if quantizer is None:
            return {}
        _, latent, _ = used[0]
        statistics = torch.stack([quantizer.statistics(latent, indices) for _, latent, indices in used]).sum(0)
        whole = latent.new_zeros(stage.batch_size, *latent.shape[1:])
        for rows, latent, _ in used:
            whole[rows] = latent
        used.clear()
        team.sum_([statistics, whole])
        vectors = whole.permute(0, 2, 3, 1).flatten(0, 2)
        order = torch.from_numpy(rng(config.seed, "restart", step).permutation(len(vectors)))
        return quantizer.update(statistics, vectors[order], weights.restart_codes_after)

    adversary: Adversary | None = None
    if weights.gan_weight:
        discriminator = PatchDiscriminator(
            weights.disc_layers, weights.disc_channels, weights.disc_norm, weights.disc_spectral_norm
        ).to(team.device)
        adversary = Adversary(discriminator, discriminate, weights.disc_start, stage.learning_rate)
    averages = run_stage(
        "autoencoder", model, loss, stage, directory, fingerprint, resume=resume, preview=preview, adversary=adversary,
        after_step=after_step,
    )  # fmt: skip
    model.load_state_dict(averages)
    return model.cpu().eval()
