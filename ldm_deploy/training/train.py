"""Both training stages, from a configuration and a data set to a reference directory."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.artifact import atomic_write_bytes, content_key, file_digest, staged_directory, write_manifest
from ldm_deploy.config import AutoencoderConfig, Config, StageConfig, load_config
from ldm_deploy.errors import ConfigError, DataError, TrainingError
from ldm_deploy.training.data import ImageSet, load_images, resize
from ldm_deploy.training.model_card import model_card

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from ldm_deploy.training.loop import Measure
    from ldm_deploy.training.losses import Perceptual

HELD_OUT_SHOWN = 32  # held-out images that a preview measures
PROMPTS_SHOWN = 16
PICTURE = "samples.png"
# reference directory, data source, PNG of samples to write -> figures for the model card
Score = Callable[[Path, str | Path, Path], Mapping[str, Any]]


def train(
    config: str | Path | Config,
    data: str | Path,
    out: Path,
    *,
    resume: bool = False,
    threads: int | None = None,
    seed: int | None = None,
    score: Score | None = None,
    measure: Measure | None = None,
    perceptual: Callable[[str], Perceptual | None] = lambda backbone: None,
    init_from: str | Path | None = None,
    report_prompts: Sequence[str] = (),
) -> dict[str, Any]:
    """Train a reference and write it to `out`; checkpoints, logs and previews lie beside it in `<out>.training/`.

    Skin-tone variants and held-out images are not trained on. `measure` gives the figures of held-out images in
    previews, `score` those of the model card; `perceptual` makes the perceptual distance of a backbone, if that is to
    be had. `init_from`: a reference whose autoencoder, scale factor and tokenizer are kept and whose text encoder and
    U-Net are trained further, or only given adapters (`lora_rank`), which are merged. `report_prompts`: what reports of
    this model draw, if the data has them; else captions of the data. Of several processes the first
    one writes. Raises `TrainingError` if `out` exists.
    """
    import torch

    from ldm_deploy.models.clip import weights_file
    from ldm_deploy.models.reference import describe, load_reference
    from ldm_deploy.models.sources import source_digest
    from ldm_deploy.training.autoencoder import train_autoencoder
    from ldm_deploy.training.conditioning import choose_prompts, conditioning
    from ldm_deploy.training.diffusion import encode_images, latent_scale, train_denoiser
    from ldm_deploy.training.lora import merged_state
    from ldm_deploy.training.preview import reconstructions, samples
    from ldm_deploy.training.processes import processes
    from ldm_deploy.training.record import training_record

    resolved = config if isinstance(config, Config) else load_config(config)
    if seed is not None:
        resolved = Config(**{**vars(resolved), "seed": seed})
    if resolved.lora_rank and init_from is None:
        raise ConfigError(
            f"lora_rank is {resolved.lora_rank} and there are no weights to adapt; "
            "give a reference with --init-from, or set lora_rank = 0"
        )
    if out.exists():
        raise TrainingError(f"{out} exists; remove it or give another --out")
    if threads is not None:
        torch.set_num_threads(threads)
    images = load_images(data, resolved.resolution, resolved.conditioning)
    chosen = images.select(~images.held_out & ~images.skin_tone)
    smallest = resolved.diffusion_training.batch_size
    if init_from is None:
        smallest = max(smallest, resolved.autoencoder_training.batch_size)
    if len(chosen.texts) < smallest:
        raise DataError(
            f"data {str(data)!r} has {len(chosen.texts)} images to train on, fewer than one batch ({smallest}); "
            "add images or lower batch_size"
        )
    directory = out.with_name(out.name + ".training")
    previews = directory / "previews"
    held_out = images.images[images.held_out & ~images.skin_tone][:HELD_OUT_SHOWN]
    initial = None if init_from is None else load_reference(init_from)
    if initial is not None:
        _check_autoencoder(initial.model["autoencoder"], resolved, init_from)
        autoencoder = initial.autoencoder
    else:
        autoencoder = train_autoencoder(
            resolved, chosen, directory, _autoencoder_key(resolved, chosen), resume=resume,
            preview=reconstructions(held_out, previews, measure) if len(held_out) else None,
            perceptual=perceptual(resolved.autoencoder_loss.perceptual_backbone)
            if resolved.autoencoder_loss.perceptual_weight else None,
        )  # fmt: skip
    # Stage two sees the autoencoder that ships: rounded to fp16.
    for parameter in autoencoder.parameters():
        parameter.data = parameter.data.half().float()

    condition = conditioning(resolved, chosen.texts, initial)
    tokenizer = condition.tokenizer

    @functools.cache
    def latents(size: int) -> tuple[Tensor, Tensor]:
        return encode_images(autoencoder, resize(chosen.images, size))

    if initial is None:
        scale_factor = latent_scale(*latents(resolved.resolution))
    else:  # the U-Net to go on with knows its own scale
        scale_factor = initial.model["scale_factor"]
    model = describe(resolved, scale_factor, condition.text_encoder, choose_prompts(chosen.texts, report_prompts))
    key = {"training": _diffusion_key(resolved, images)}
    if initial is not None:
        key["init_from"] = source_digest(initial.directory)
    if resolved.text_encoder.pretrained:
        key["text_encoder"] = file_digest(weights_file(Path(resolved.text_encoder.pretrained)))
    team = processes()
    if team.first:
        atomic_write_bytes(directory / "tokenizer.json", tokenizer.to_str().encode())
    denoiser = train_denoiser(
        resolved, model, latents, condition.encode(chosen.texts), tokenizer.encode("").ids,
        directory, content_key(key), resume=resume, initial=initial, frozen=condition.frozen,
        preview=samples(
            model, autoencoder, directory / "tokenizer.json",
            chosen.texts[:: max(1, len(chosen.texts) // PROMPTS_SHOWN)][:PROMPTS_SHOWN], previews,
        ),
    )  # fmt: skip

    stages = ("autoencoder", "diffusion") if initial is None else ("diffusion",)
    logs = {stage: directory / f"{stage}.jsonl" for stage in stages}
    command = _command(config, data, out, init_from)
    record = training_record(command, images, len(chosen.texts), logs, resolved.to_dict())
    if initial is not None:
        record["init_from"] = {"name": initial.model["name"], "digest": key["init_from"]}
    if team.first:
        weights = {
            "autoencoder": autoencoder.state_dict(),
            "text_encoder": denoiser.text_encoder.state_dict(),
            "unet": merged_state(denoiser.unet),
        }
        figures = None if score is None else lambda directory: score(directory, data, directory / PICTURE)
        _write(out, model, weights, tokenizer, record, figures)
    team.wait()
    return record


def _write(
    out: Path,
    model: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, Tensor]],
    tokenizer: Tokenizer,
    record: dict[str, Any],
    figures: Callable[[Path], Mapping[str, Any]] | None,
) -> None:
    """The reference directory with its model card; `figures` of the finished directory are added to `record`."""
    from ldm_deploy.models.reference import save_reference

    with staged_directory(out) as staging:
        save_reference(staging, model, weights)
        tokenizer.save(str(staging / "tokenizer.json"))
        if figures is not None:
            record["figures"] = dict(figures(staging))
        (staging / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(
            model_card(record, PICTURE if (staging / PICTURE).exists() else None), encoding="utf-8"
        )
        write_manifest(staging, "reference", content_key(record), {"data": record["data"]["digest"]})


def _autoencoder_key(config: Config, data: ImageSet) -> str:
    names = ("resolution", "seed", "photo_fraction", "autocast_bf16")
    return content_key(
        {
            "data": data.digest,
            "model": asdict(config.autoencoder),
            "training": _what_matters(config.autoencoder_training),
            "loss": asdict(config.autoencoder_loss),
            **{name: getattr(config, name) for name in names},
        }
    )


def _diffusion_key(config: Config, data: ImageSet) -> str:
    stages = ("autoencoder_training", "diffusion_training")
    matters = {name: _what_matters(getattr(config, name)) for name in stages}
    return content_key({"data": data.digest, "config": {**config.to_dict(), **matters}})


def _what_matters(stage: StageConfig) -> dict[str, Any]:
    """A stage without what may change between two sittings, as it does not change the result."""
    free = ("checkpoint_every", "preview_every", "gradient_checkpointing")
    return {name: value for name, value in asdict(stage).items() if name not in free}


def _check_autoencoder(found: Mapping[str, Any], config: Config, init_from: str | Path | None) -> None:
    if found.get("small_encoder") or found.get("small_decoder"):
        raise TrainingError(
            f"{init_from} has a distilled encoder or decoder, which is not trained further; "
            "give the reference that it was distilled from"
        )
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    theirs = AutoencoderConfig(**values)
    if theirs != config.autoencoder:
        raise TrainingError(
            f"{init_from} has the autoencoder {asdict(theirs)} and the configuration {asdict(config.autoencoder)}; "
            "give the one that it was trained with"
        )


def _command(config: str | Path | Config, data: str | Path, out: Path, init_from: str | Path | None) -> str:
    name = config.name if isinstance(config, Config) else str(config)
    shown = data if str(data) == "photos" else Path(data).name
    start = [] if init_from is None else ["--init-from", Path(init_from).name]
    return shlex.join(["ldm-deploy", "train", name, "--data", str(shown), "--out", out.name, *start])
