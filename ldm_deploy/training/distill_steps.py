"""Distillation to few steps: from a reference, the teacher, to a student directory that draws in 1 to 8 steps."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.artifact import content_key, staged_directory, write_manifest
from ldm_deploy.errors import ConfigError, DataError, TrainingError
from ldm_deploy.training.distill_config import StepsConfig, load_steps_config

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm_deploy.models.reference import Reference
    from ldm_deploy.training.loop import Preview

SAMPLERS = {"consistency": "lcm", "progressive": "ddim"}
PROMPTS_SHOWN = 16
STEPS_SHOWN = 4


def distill_steps(
    teacher: str | Path,
    data: str | Path,
    out: Path,
    *,
    config: str | Path | StepsConfig | None = None,
    method: str | None = None,
    init_from: str | Path | None = None,
    resume: bool = False,
    seed: int | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Train a student of `teacher` on the latents and captions of `data` and write it to `out`; returns its record.

    Checkpoints, logs and previews lie beside it in `<out>.training/`. `init_from`: a reference with another U-Net, as
    pruning makes, for the student to start from (the teacher's own). Images held out and skin-tone variants are not
    trained on. Of several processes the first one writes. Raises `TrainingError` for a teacher that cannot teach this.
    """
    import torch
    from tokenizers import Tokenizer

    from ldm_deploy.models.reference import load_reference
    from ldm_deploy.models.sources import source_digest
    from ldm_deploy.training.conditioning import Conditioning
    from ldm_deploy.training.data import load_images
    from ldm_deploy.training.distill_consistency import train_consistency
    from ldm_deploy.training.distill_progressive import stage_names, train_progressive
    from ldm_deploy.training.processes import processes
    from ldm_deploy.training.record import training_record
    from ldm_deploy.training.student import make_material, student_unet

    if config is None:
        config = "gpu" if torch.cuda.is_available() else "cpu"
        config += "-progressive" if method == "progressive" else ""
    name = "custom" if isinstance(config, StepsConfig) else str(config)
    resolved = config if isinstance(config, StepsConfig) else load_steps_config(config)
    if method is not None:
        resolved = replace(resolved, method=method)
    if seed is not None:
        resolved = replace(resolved, seed=seed)
    if out.exists():
        raise TrainingError(f"{out} exists; remove it or give another --out")
    if threads is not None:
        torch.set_num_threads(threads)
    source = load_reference(teacher)
    start = source if init_from is None else load_reference(init_from)
    check_teacher(source, resolved)
    check_student(source, start)

    model = source.model
    tokenizer = Tokenizer.from_str(source.tokenizer_text())
    images = load_images(data, model["default_size"][0], model.get("conditioning", "captions"))
    chosen = images.select(~images.held_out & ~images.skin_tone)
    if not chosen.texts:
        raise DataError(
            f"data {str(data)!r} has no image to train on: all are held out or skin-tone variants; add some"
        )
    ids = Conditioning(tokenizer, {"context_length": model["context_length"]}).encode(chosen.texts)
    described = describe_student(model, start.model["unet"], resolved, source_digest(source.directory))

    team = processes()
    torch.manual_seed(resolved.seed)
    material = make_material(source, chosen, ids, tokenizer.encode("").ids)
    unet = student_unet(described["unet"], start.unet)
    directory = out.with_name(out.name + ".training")
    key = content_key(
        {
            "teacher": described["distilled"]["teacher"],
            "start": source_digest(start.directory),
            "data": images.digest,
            "config": _what_matters(resolved),
        }
    )
    shown = chosen.texts[:: max(1, len(chosen.texts) // PROMPTS_SHOWN)][:PROMPTS_SHOWN]
    preview = _preview(source, described, shown, directory / "previews")
    train_unet = train_consistency if resolved.method == "consistency" else train_progressive
    weights = train_unet(source, unet, material, resolved, directory, key, resume=resume, preview=preview)
    names = {"distillation": "consistency"}
    if resolved.method == "progressive":
        names = {log.removeprefix("progressive-"): log for log, _ in stage_names(resolved)}

    command = _command(teacher, data, out, name, method, init_from)
    logs = {stage: directory / f"{log}.jsonl" for stage, log in names.items()}
    record = training_record(command, images, len(chosen.texts), logs, resolved.to_dict())
    record["teacher"] = {"name": model["name"], "digest": described["distilled"]["teacher"]}
    if init_from is not None:
        record["init_from"] = {"name": start.model["name"], "digest": source_digest(start.directory)}
    if team.first:
        _write(out, source, described, weights, record)
    team.wait()
    return record


def check_teacher(teacher: Reference, config: StepsConfig) -> None:
    """Raises `TrainingError` for a student, and for a model that was not trained to be guided where guidance is."""
    if "distilled" in teacher.model:
        raise TrainingError(f"{teacher.directory} is a student itself; give the reference that it was distilled from")
    if config.solver_steps > teacher.schedule.num_train_timesteps:
        raise ConfigError(
            f"solver_steps is {config.solver_steps}; {teacher.directory} has {teacher.schedule.num_train_timesteps} "
            "timesteps: give no more"
        )
    if not config.has_guidance:
        return
    remedy = "train it with caption_dropout = 0.1, or set guidance_min = guidance_max = 1 to distil without guidance"
    if teacher.model.get("conditioning", "captions") == "none":
        raise TrainingError(f"{teacher.directory} has no captions, so there is nothing to guide it with; {remedy}")
    path = teacher.directory / "training.json"
    try:
        dropout = json.loads(path.read_text(encoding="utf-8"))["config"]["caption_dropout"]
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(
            f"{path} does not say whether the teacher was trained for guidance (caption_dropout); restore it, or "
            + remedy
        ) from None
    if not dropout:
        raise TrainingError(
            f"{teacher.directory} was trained with caption_dropout = {dropout}, without guidance; {remedy}"
        )


def check_student(teacher: Reference, start: Reference) -> None:
    """Raises `TrainingError` if the student's U-Net would live in another world than the teacher's."""
    for what, key in (
        ("latents", "latent_channels"),
        ("latents", "downsampling"),
        ("latents", "scale_factor"),
        ("latents", "autoencoder"),
        ("captions", "text_encoder"),
    ):
        theirs, own = teacher.model[key], start.model[key]
        if theirs != own:
            raise TrainingError(
                f"teacher and student have different {what}: {key} is {theirs!r} in {teacher.directory} and {own!r} in "
                f"{start.directory}; start from a model made of this teacher"
            )
    for name, value in teacher.schedule.to_dict().items():
        own = start.schedule.to_dict()[name]
        if own != value and name not in ("timestep_spacing", "steps_offset"):
            raise TrainingError(
                f"teacher and student have different schedules: {name} is {value!r} in {teacher.directory} and {own!r} "
                f"in {start.directory}; start from a model made of this teacher"
            )
    for part in ("autoencoder", "text_encoder"):
        first, second = (getattr(model, part).state_dict() for model in (teacher, start))
        if any((first[name] != second[name]).any() for name in first):
            raise TrainingError(
                f"teacher and student have different weights of the {part}; start from a model made of this teacher"
            )


def describe_student(
    teacher: Mapping[str, Any], unet: Mapping[str, Any], config: StepsConfig, digest: str
) -> dict[str, Any]:
    """The content of the student's model.json; `unet`: of the model it starts from."""
    allowed = list(config.steps if config.method == "consistency" else config.steps[-1:])
    sampler = SAMPLERS[config.method]
    scale = min(max(teacher["sampling"]["guidance_scale"], config.guidance_min), config.guidance_max)
    steps = 4 if 4 in allowed else allowed[-1]
    distilled: dict[str, Any] = {
        "method": config.method,
        "teacher": digest,
        "sampler": sampler,
        "steps": allowed,
        "guidance_range": [config.guidance_min, config.guidance_max] if config.has_guidance else None,
    }
    return {
        **{key: value for key, value in teacher.items() if key != "shared"},
        "name": f"{teacher['name']}-{config.method}",
        "unet": {**unet, "guidance_embedding": True} if config.has_guidance else dict(unet),
        # The last timestep comes first, whatever the teacher's sampler did.
        "schedule": {**teacher["schedule"], "timestep_spacing": "trailing"},
        "sampling": {"sampler": sampler, "steps": steps, "guidance_scale": scale},
        "distilled": distilled,
    }


def _preview(teacher: Reference, described: Mapping[str, Any], prompts: list[str], directory: Path) -> Preview:
    """A grid of images that the averaged student draws in few steps."""
    from ldm_deploy.diffusion.schedule import Schedule
    from ldm_deploy.models.components import VaeDecoder, signatures_of
    from ldm_deploy.models.torch_engine import TorchEngine
    from ldm_deploy.runtime.pipeline import Pipeline
    from ldm_deploy.runtime.tokenizer import Tokenizer
    from ldm_deploy.training.preview import write_grid

    def preview(student: Any, step: int) -> Mapping[str, float]:
        modules: dict[str, nn.Module] = {
            "text_encoder": teacher.text_encoder,
            "unet": student.unet,
            "vae_decoder": VaeDecoder(teacher.autoencoder),
        }
        engines = {name: TorchEngine(name, module, signatures_of(described)[name]) for name, module in modules.items()}
        words = Tokenizer(teacher.tokenizer_text(), described["context_length"])
        schedule = Schedule.from_dict(described["schedule"])
        images = Pipeline(engines, words, described, schedule, described["sampling"])(prompts, seed=0)
        columns = math.ceil(math.sqrt(len(images)))
        write_grid(directory / f"{described['distilled']['method']}-{step:06d}.png", list(images), columns=columns)
        return {}

    return preview


def _write(
    out: Path,
    teacher: Reference,
    described: Mapping[str, Any],
    unet: Mapping[str, Tensor],
    record: dict[str, Any],
) -> None:
    from ldm_deploy.models.reference import save_reference
    from ldm_deploy.training.student_card import student_card

    weights = {
        "autoencoder": teacher.autoencoder.state_dict(),
        "text_encoder": teacher.text_encoder.state_dict(),
        "unet": unet,
    }
    with staged_directory(out) as staging:
        save_reference(staging, described, weights)
        (staging / "tokenizer.json").write_text(teacher.tokenizer_text(), encoding="utf-8")
        (staging / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(student_card(described, record), encoding="utf-8")
        parents = {"data": record["data"]["digest"], "teacher": record["teacher"]["digest"]}
        write_manifest(staging, "reference", content_key(record), parents)


def _what_matters(config: StepsConfig) -> dict[str, Any]:
    """What may not change between two sittings. A run that diverged goes on with another learning rate or precision."""
    free = ("checkpoint_every", "preview_every", "gradient_checkpointing", "learning_rate", "clip_norm")
    training = {name: value for name, value in asdict(config.training).items() if name not in free}
    return {**asdict(config), "autocast_bf16": None, "training": training}


def _command(
    teacher: str | Path, data: str | Path, out: Path, config: str, method: str | None, init_from: str | Path | None
) -> str:
    shown = data if str(data) == "photos" else Path(data).name
    words = ["ldm-deploy", "distill", Path(teacher).name, "--recipe", "steps", "--data", str(shown)]
    words += ["--config", Path(config).name, "--out", out.name]
    words += [] if method is None else ["--method", method]
    words += [] if init_from is None else ["--init-from", Path(init_from).name]
    return shlex.join(words)
