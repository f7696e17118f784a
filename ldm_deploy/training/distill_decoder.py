"""A small decoder that learns to draw what a teacher's decoder draws.

The student sees the teacher's latents of real images, with a little noise, as those of a sampler are never exact, and
is asked for the teacher's decodes (Hinton et al. 2015, arXiv:1503.02531, for regression). The teacher's encoder, and so
the latent space, stays what it is: the student fits whatever draws in that space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_deploy.errors import ConfigError, TrainingError
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.models.discriminator import PatchDiscriminator
from ldm_deploy.models.reference import Reference, load_reference
from ldm_deploy.training.autoencoder import to_images, to_tensor
from ldm_deploy.training.data import ImageSet, photograph_crops
from ldm_deploy.training.decoder_config import DecoderConfig, load_decoder_config
from ldm_deploy.training.diffusion import encode_images
from ldm_deploy.training.graphs import Replayed
from ldm_deploy.training.loop import Adversary, Measure, Preview, device_rng, rng, run_stage
from ldm_deploy.training.losses import (
    Perceptual,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    log_error,
    reconstruction_loss,
)
from ldm_deploy.training.preview import reconstructions
from ldm_deploy.training.processes import processes
from ldm_deploy.training.teaching import (
    HELD_OUT_SHOWN,
    Teaching,
    count_flops,
    describe_figure,
    load_teacher,
    settle_config,
    training_images,
    write_student,
)

CROPS = 2048  # cut from the photographs once, so that a GPU does not wait for them
# A student whose weights are zero has a loss of about 3. One that is further off than this is not learning.
FARTHEST = 50.0
BATCH = 64  # images at once when held-out ones are measured


def distill_decoder(
    reference: str | Path,
    data: str | Path,
    out: Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    seed: int | None = None,
    config: str | Path | DecoderConfig | None = None,
    perceptual: Callable[[str], Perceptual | None] = lambda backbone: None,
    measure: Measure | None = None,
    init_from: str | Path | None = None,
) -> dict[str, Any]:
    """Write to `out` a reference that differs from `reference` in its decoder (and, if asked, its encoder).

    Checkpoints, logs and previews lie beside it in `<out>.training/`. `config`: a name in `decoder_config.PRESETS` (the
    one for this device), a TOML file, or a configuration. `perceptual` makes the perceptual distance of a backbone, if
    that is to be had, `measure` the figures of held-out images. `init_from`: a student of the same latents (of the
    teacher that a student of few steps had, say), whose decoder is taken as it is: nothing is trained. The result is
    the content of training.json. Raises `TrainingError` if `out` exists or the teacher is no full autoencoder, or the
    latents are others; `ConfigError` if the student's levels do not fit the latents.
    """
    resolved, name = settle_config(config, load_decoder_config, seed)
    teacher = load_teacher(reference, out)
    donor = None if init_from is None else load_donor(init_from, teacher)
    small = describe_decoder(teacher, resolved) if donor is None else {
        "small_decoder": donor.model["autoencoder"]["small_decoder"]
    }  # fmt: skip
    if threads is not None:
        torch.set_num_threads(threads)
    images, chosen = training_images(teacher, data, resolved.training.batch_size)
    directory = out.with_name(out.name + ".training")
    held_out = images.select(images.held_out & ~images.skin_tone).images
    distance = perceptual(resolved.perceptual_backbone)
    model = {
        **teacher.model,
        "name": f"{teacher.model['name']}-small-decoder",
        "autoencoder": {**teacher.model["autoencoder"], **small},
    }
    teaching = Teaching(teacher, "decoder", resolved.to_dict(), name, data, images, len(chosen.texts), donor)
    student = train_decoder(
        resolved, teacher.autoencoder, model, chosen, directory, teaching.key(), resume=resume,
        preview=reconstructions(held_out[:HELD_OUT_SHOWN], directory / "previews", measure) if len(held_out) else None,
        perceptual=distance,
    ) if donor is None else donor.autoencoder  # fmt: skip

    def figures(written: Reference) -> dict[str, Any]:
        autoencoders = {"teacher": teacher.autoencoder, "student": written.autoencoder}
        found = {
            name: measure_autoencoder(autoencoder, held_out, measure, distance)
            for name, autoencoder in autoencoders.items()
        }
        sides = (side // model["downsampling"] for side in model["default_size"])
        latent = torch.zeros(1, model["latent_channels"], *sides)
        for name, autoencoder in autoencoders.items():
            found[name]["decoder_flops"] = count_flops(autoencoder.decoder, latent)
            found[name]["decoder_parameters"] = sum(value.numel() for value in autoencoder.decoder.parameters())
        return {"held_out": len(held_out), "perceptual_backbone": resolved.perceptual_backbone, **found}

    weights = {
        "autoencoder": student.state_dict(),
        "text_encoder": teacher.text_encoder.state_dict(),
        "unet": teacher.unet.state_dict(),
    }
    return write_student(out, model, weights, teaching, ("decoder",) if donor is None else (), figures, card_rows)


def load_donor(source: str | Path, teacher: Reference) -> Reference:
    """A student whose decoder fits the teacher's latents as it is: one with the same encoder, weight by weight.

    Raises `TrainingError` if it is not.
    """
    donor = load_reference(source)
    if not donor.model["autoencoder"].get("small_decoder"):
        raise TrainingError(f"{donor.directory} has no small decoder to take; give what --recipe decoder wrote")

    def latents(reference: Reference) -> dict[str, Tensor]:
        weights = reference.autoencoder.state_dict().items()
        return {name: value for name, value in weights if name.split(".")[0] in ("encoder", "quant_conv", "quantizer")}

    own, theirs = latents(teacher), latents(donor)
    same = own.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in own.items())
    if not same or donor.model["scale_factor"] != teacher.model["scale_factor"]:
        raise TrainingError(
            f"the latents of {donor.directory} are not those of {teacher.directory}: their encoders differ; "
            "distil a decoder from this one, without --init-from"
        )
    return donor


def describe_decoder(teacher: Reference, config: DecoderConfig) -> dict[str, Any]:
    """What model.json says of the student, beside what it says of the teacher's autoencoder.

    Raises `TrainingError` if the teacher is itself a student, `ConfigError` if the student has another downsampling.
    """
    described = teacher.model["autoencoder"]
    if described.get("small_decoder") or (config.encoder and described.get("small_encoder")):
        raise TrainingError(
            f"{teacher.directory} has a small decoder already; give the reference it was distilled from"
        )
    factor = teacher.model["downsampling"]
    if 2 ** len(config.widths) != factor:
        raise ConfigError(
            f"widths is {list(config.widths)}: a decoder that enlarges {2 ** len(config.widths)} times, and the "
            f"latents of {teacher.directory} are {factor} times smaller than images; "
            f"give {factor.bit_length() - 1} levels"
        )
    shape = {"widths": list(config.widths), "blocks": list(config.blocks)}
    return {
        "small_decoder": {**shape, "scale": teacher.model["scale_factor"]},
        **({"small_encoder": shape} if config.encoder else {}),
    }


def build_student(teacher: Autoencoder, described: Mapping[str, Any]) -> tuple[Autoencoder, nn.ModuleDict]:
    """(the autoencoder that model.json describes, with what it shares with the teacher; the parts that learn)."""
    student = Autoencoder(**described)
    own = {name: part for name, part in student.named_children() if f"small_{name}" in described}
    inherited = {
        key: value
        for key, value in teacher.state_dict().items()
        if key in student.state_dict() and key.split(".")[0] not in own
    }
    student.load_state_dict(inherited, strict=False)
    student.requires_grad_(False)
    parts = nn.ModuleDict(own)
    parts.requires_grad_(True)
    return student, parts


def imitation_loss(decoded: Tensor, wanted: Tensor, image: Tensor, config: DecoderConfig) -> Tensor:
    """Error against the teacher's decode and against the image, as `config` measures and weighs them: a scalar."""
    error = {"l1+mse": reconstruction_loss, "log-mse": log_error}[config.error]
    targets = ((config.teacher_weight, wanted), (config.image_weight, image))
    return torch.stack([weight * error(target, decoded) for weight, target in targets if weight]).sum()


class Judged(nn.Module):
    """latent, wanted image -> (the student's image, its perceptual distance to the wanted one, 0 without a measure)."""

    def __init__(self, student: Autoencoder, perceptual: Perceptual | None) -> None:
        super().__init__()
        self.student, self.perceptual = student, perceptual

    def forward(self, latent: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        decoded = self.student.render(latent).float()
        return decoded, decoded.new_zeros(()) if self.perceptual is None else self.perceptual(wanted, decoded)


def moments_loss(student: Autoencoder, image: Tensor, mean: Tensor, std: Tensor, scale: float) -> Tensor:
    """Squared error of a small encoder's posterior mean and standard deviation, in variances of latents: a scalar."""
    own, logvar = student.encode(image)
    return (scale * (own - mean)).square().mean() + (scale * (torch.exp(0.5 * logvar) - std)).square().mean()


def train_decoder(
    config: DecoderConfig,
    teacher: Autoencoder,
    model: Mapping[str, Any],
    data: ImageSet,
    directory: Path,
    fingerprint: str,
    *,
    resume: bool,
    preview: Preview | None = None,
    perceptual: Perceptual | None = None,
) -> Autoencoder:
    """Train the student that `model`, the content of its model.json, describes; returns it, averaged, on the CPU.

    `data`: no held-out image among it. Raises `TrainingError` where `config` weighs a perceptual distance that is not
    there.
    """
    if config.perceptual_weight and perceptual is None:
        raise TrainingError(
            f"perceptual_weight is {config.perceptual_weight} and there is no perceptual distance; install "
            "ldm-deploy[export] and run `make setup` for its weights, or set perceptual_weight = 0 in a --config file"
        )
    team = processes()
    stage, scale = config.training, model["scale_factor"]
    torch.manual_seed(config.seed)
    student, parts = build_student(teacher, model["autoencoder"])
    student.to(team.device).to(memory_format=torch.channels_last)
    crops = round(stage.batch_size * config.photo_fraction)
    pool = data.images
    if crops:
        pool = np.concatenate([pool, photograph_crops(pool.shape[1], CROPS, config.seed).images])
    pool = np.concatenate([pool, pool[:, :, ::-1]])  # and mirrored
    means, stds = encode_images(teacher, pool)
    teacher.to(team.device).to(memory_format=torch.channels_last)

    def batch(step: int) -> np.ndarray:
        """Places in `pool`."""
        draw = rng(config.seed, "decoder", step)
        given, count = len(data.images), len(pool) // 2
        places = [draw.integers(given, size=stage.batch_size - crops)]
        places += [draw.integers(given, count, size=crops)] if crops else []
        return np.concatenate(places) + count * draw.integers(2, size=stage.batch_size)

    # An adversary asks for decodes of its own.
    same_shapes = stage.accumulation == 1 and not config.gan_weight
    judged = Replayed(Judged(student, perceptual if config.perceptual_weight else None), enabled=same_shapes)

    def decode(step: int, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(images, what the student should draw, what it draws, perceptual distances, the loss of a small encoder)."""
        places = batch(step)[rows]
        image = to_tensor(pool[places], team.device)
        place = torch.from_numpy(places).to(means.device)
        mean, std = means[place], stds[place]
        shape = (stage.batch_size, *means.shape[1:])
        numbers = device_rng(config.seed, "latent", step, team.device)
        posterior, noise = (torch.randn(shape, generator=numbers, device=team.device)[rows] for _ in range(2))
        strength = torch.rand(shape[0], 1, 1, 1, generator=numbers, device=team.device)[rows]
        noise = noise * strength * (config.latent_noise / scale)
        with torch.autocast(team.device.type, torch.bfloat16, enabled=config.autocast_bf16, cache_enabled=False):
            with torch.no_grad():
                latent = teacher.quantizer(mean + std * posterior + noise)
                wanted = teacher.render(latent).float().clamp(-1, 1) if config.teacher_weight else image
            decoded, distance = judged(latent.contiguous(memory_format=torch.channels_last), wanted)
            of_encoder = moments_loss(student, image, mean, std, scale) if config.encoder else None
        return image, wanted, decoded, distance, of_encoder

    def loss(step: int, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        image, wanted, decoded, distance, of_encoder = decode(step, rows)
        rebuilt = imitation_loss(decoded, wanted, image, config)
        logged = {"imitation": rebuilt}
        if config.perceptual_weight:
            logged["perceptual"] = distance.mean()
            rebuilt = rebuilt + config.perceptual_weight * logged["perceptual"]
        total = rebuilt
        if of_encoder is not None:
            logged["encoder"] = of_encoder
            total = total + of_encoder
        if adversary is not None and step >= config.disc_start:
            fooled = generator_loss(adversary.module(decoded))
            share = (rows.stop - rows.start) / stage.batch_size
            everywhere = team.sum_ if stage.accumulation == 1 else lambda tensors: None
            balance = adaptive_weight(rebuilt * share, fooled * share, student.decoder.last_layer, everywhere)
            logged |= {"generator": fooled, "generator_weight": balance}
            total = total + config.gan_weight * balance * fooled
        return total, {name: value.detach() for name, value in logged.items()}

    def discriminate(step: int, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert adversary is not None
        with torch.no_grad():
            image, _, decoded, *_ = decode(step, rows)
        real, fake = adversary.module(image), adversary.module(decoded)
        return hinge_loss(real, fake), {"logits_real": real.mean().detach(), "logits_fake": fake.mean().detach()}

    adversary: Adversary | None = None
    if config.gan_weight:
        discriminator = PatchDiscriminator(config.disc_layers, config.disc_channels).to(team.device)
        adversary = Adversary(discriminator, discriminate, config.disc_start, stage.learning_rate)
    averages = run_stage(
        "decoder", parts, loss, stage, directory, fingerprint, resume=resume, adversary=adversary,
        loss_limit=FARTHEST,
        preview=None if preview is None else lambda module, step: preview(student, step),
    )  # fmt: skip
    parts.load_state_dict(averages)
    teacher.cpu()
    return student.cpu().eval()


@torch.no_grad()
def measure_autoencoder(
    autoencoder: Autoencoder, images: np.ndarray, measure: Measure | None, perceptual: Perceptual | None
) -> dict[str, Any]:
    """Figures of uint8 (n, H, W, 3) against their reconstructions; what cannot be had is absent."""
    if not len(images):
        return {}
    cut = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    rebuilt = [to_images(autoencoder.decode(autoencoder.encode(to_tensor(part))[0])) for part in cut]
    found: dict[str, Any] = {} if measure is None else dict(measure(images, np.concatenate(rebuilt)))
    if perceptual is not None:
        distances = [perceptual(to_tensor(one), to_tensor(other)) for one, other in zip(cut, rebuilt, strict=True)]
        found["held_out_perceptual"] = float(torch.cat(distances).mean())
    return found


def card_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, teacher, student, how it was measured) for the model card."""
    how = f"mean over {figures['held_out']} held-out images" if figures["held_out"] else "the data holds no image out"
    named = {
        "held_out_psnr_db": ("reconstruction, PSNR", " dB", f"{how}, peak 255"),
        "held_out_ssim": ("reconstruction, SSIM", "", how),
        "held_out_perceptual": ("reconstruction, LPIPS", "", f"{how}; {figures['perceptual_backbone']}"),
        "decoder_flops": ("decoder, FLOPs", "", "one image; two per multiply-accumulate"),
        "decoder_parameters": ("decoder, parameters", "", ""),
    }
    return [
        (
            name,
            describe_figure(figures["teacher"].get(key), unit),
            describe_figure(figures["student"].get(key), unit),
            how,
        )
        for key, (name, unit, how) in named.items()
    ]
