"""A U-Net with fewer blocks, which learns from the whole one what the lost ones did.

Kim et al. 2023, "BK-SDM", arXiv:2305.15798: remove blocks, keep the weights of the others, and train with the denoising
task, the teacher's output and the teacher's features. Which blocks go is measured here (`prune_choice.py`), not given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_deploy.artifact import atomic_write_json
from ldm_deploy.errors import TrainingError
from ldm_deploy.models.unet import UNet
from ldm_deploy.training.conditioning import Conditioning
from ldm_deploy.training.diffusion import encode_images
from ldm_deploy.training.graphs import Replayed
from ldm_deploy.training.loop import device_rng, run_stage
from ldm_deploy.training.processes import processes
from ldm_deploy.training.prune_choice import Choice, choose, last_of_levels, trajectory_points, without
from ldm_deploy.training.prune_config import PruneConfig, load_prune_config
from ldm_deploy.training.teaching import (
    Teaching,
    count_flops,
    describe_figure,
    load_teacher,
    training_images,
    write_student,
)

if TYPE_CHECKING:
    from ldm_deploy.models.reference import Reference

CHOICE = "choice.json"
# Predictions and latents have a standard deviation of about 1. A student that is further off is not learning.
FARTHEST = 50.0


def prune(
    reference: str | Path,
    data: str | Path,
    out: Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    seed: int | None = None,
    config: str | Path | PruneConfig | None = None,
) -> dict[str, Any]:
    """Write to `out` a reference whose U-Net lacks blocks of that of `reference`; the rest is the same.

    What was chosen, checkpoints and logs lie beside it in `<out>.training/`. `config`: a name in
    `prune_config.PRESETS` (the one for this device), a TOML file, or a configuration. The teacher may be a student of
    few steps: then there is no denoising task, as it answers another question, and it is asked at the timesteps that it
    draws at. The result is the content of training.json. Raises `TrainingError` if `out` exists or the wanted speed
    cannot be had.
    """
    if config is None:
        config = "gpu" if processes().device.type == "cuda" else "cpu"
    name = "custom" if isinstance(config, PruneConfig) else Path(config).name
    resolved = config if isinstance(config, PruneConfig) else load_prune_config(config)
    if seed is not None:
        resolved = replace(resolved, seed=seed)
    teacher = load_teacher(reference, out)
    if threads is not None:
        torch.set_num_threads(threads)
    if "distilled" in teacher.model and not (resolved.output_weight or resolved.feature_weight):
        raise TrainingError(
            f"{teacher.directory} is a student of few steps, which has no task but to do as its teacher; "
            "give output_weight or feature_weight"
        )
    images, chosen = training_images(teacher, data, resolved.training.batch_size)
    teaching = Teaching(teacher, "prune", resolved.to_dict(), name, data, images, len(chosen.texts))
    directory = out.with_name(out.name + ".training")
    points = trajectory_points(teacher, resolved.points, resolved.seed)
    choice = decide(teacher, points, resolved, directory / CHOICE, teaching.key(), resume=resume)
    student = train_pruned(resolved, teacher, choice, chosen.images, chosen.texts, points, directory, teaching.key(),
                           resume=resume)  # fmt: skip
    described = {**teacher.model["unet"], "removed": list(student.removed)}
    model = {**teacher.model, "name": f"{teacher.model['name']}-pruned", "unet": described}
    weights = {
        "autoencoder": teacher.autoencoder.state_dict(),
        "text_encoder": teacher.text_encoder.state_dict(),
        "unet": student.state_dict(),
    }

    def figures(written: Reference) -> dict[str, Any]:
        found: dict[str, Any] = {"choice": choice.to_dict()}
        with torch.no_grad():
            wanted = teacher.unet(*points)
            found["prediction_error"] = float((written.unet(*points) - wanted).square().mean() / wanted.square().mean())
        for who, unet in (("teacher", teacher.unet), ("student", written.unet)):
            one = tuple(value[:1] for value in points)
            parameters = sum(value.numel() for value in unet.parameters())
            found[who] = {"flops": count_flops(unet, *one), "parameters": parameters}
        return found

    return write_student(out, model, weights, teaching, ("prune",), figures, card_rows)


def decide(
    teacher: Reference, points: tuple[Tensor, ...], config: PruneConfig, file: Path, fingerprint: str, *, resume: bool
) -> Choice:
    """What to remove: `file`, if a run to go on with decided it (times differ from sitting to sitting), else measured
    and written there. Raises `TrainingError` for a file of another run. Of several processes the first one decides."""
    team = processes()
    if not file.exists() and team.first:
        device = team.device
        unet = teacher.unet.to(device)
        choice = choose(unet, tuple(value.to(device) for value in points), config.speedup, config.cost,
                        keep=config.keep)  # fmt: skip
        unet.cpu()
        atomic_write_json(file, {"fingerprint": fingerprint, **choice.to_dict()})
    elif not resume and team.first:
        raise TrainingError(
            f"{file} holds the choice of an earlier run; add --resume to go on, or remove {file.parent}"
        )
    team.wait()
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found, choice = data["fingerprint"], Choice.from_dict(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file} does not parse ({error}); remove {file.parent} to start over") from None
    if found != fingerprint:
        raise TrainingError(
            f"{file} was written with another configuration or other data; "
            f"give those again to resume, or remove {file.parent} to start over"
        )
    return choice


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


def train_pruned(
    config: PruneConfig,
    teacher: Reference,
    choice: Choice,
    images: np.ndarray,
    texts: Sequence[str],
    points: tuple[Tensor, ...],
    directory: Path,
    fingerprint: str,
    *,
    resume: bool,
) -> UNet:
    """Train what is left of the teacher's U-Net; returns it, averaged, on the CPU.

    `images` uint8 (n, H, W, 3) with their captions `texts`; `points`: see `trajectory_points`.
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
    student = without(teacher.unet, *(removal.name for removal in choice.removals)).requires_grad_(True)
    names = last_of_levels(student)
    same_shapes = stage.accumulation == 1 and not stage.gradient_checkpointing
    tutor, learner = (Replayed(Heard(unet, names), enabled=same_shapes) for unet in (whole, student))

    def loss(step: int, rows: slice) -> tuple[Tensor, Mapping[str, Tensor]]:
        numbers = device_rng(config.seed, "prune", step, device)

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
        return total, {name: value.detach() for name, (_, value) in terms.items()}

    averages = run_stage(
        "prune", student, loss, stage, directory, fingerprint, resume=resume, loss_limit=FARTHEST
    )  # fmt: skip
    student.load_state_dict(averages)
    whole.cpu()
    text_encoder.cpu()
    return student.cpu().eval()


def card_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(figure, teacher, student, how it was measured) for the model card."""
    choice = Choice.from_dict(figures["choice"])
    unit = "in torch on this machine" if choice.cost == "milliseconds" else "by FLOPs"
    rows = [
        (f"U-Net, {name}", describe_figure(figures["teacher"][name]), describe_figure(figures["student"][name]), how)
        for name, how in (("flops", "one image; two per multiply-accumulate"), ("parameters", ""))
    ]
    error = describe_figure(figures["prediction_error"])
    rows.append(("squared error of the prediction, relative", "0", error, "along the teacher's trajectories"))
    for removal in choice.removals:
        how = (
            f"without training: relative squared error {removal.error:.3g}; so far {removal.speedup:.2f} times as fast"
        )
        rows.append((f"removed: {removal.name}", "", "", f"{how}, {unit}"))
    return rows
