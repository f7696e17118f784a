"""The model card of a reference, from the record of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONDITIONED_ON = {
    "captions": ("a text-conditioned", " from a caption"),
    "labels": ("a class-conditional", " from the name of a class"),
    "none": ("an unconditional", ""),
}


def model_card(record: Mapping[str, Any], picture: str | None = None) -> str:
    """Markdown from training.json's content; `figures` may be absent (not measured). `picture`: the samples' file."""
    config, data = record["config"], record["data"]
    kind, given = CONDITIONED_ON[config.get("conditioning", "captions")]
    lines = [
        f"# {config['name']}: {kind} latent diffusion model",
        "",
        f"Images of {config['resolution']}x{config['resolution']} pixels{given}. Weights are rounded to fp16; "
        "the rounded model, computed in fp32, is the reference that engines are compared with. Licence: Apache-2.0.",
        "",
        "## Made by",
        "",
        f"    {record['command']}",
        "",
        f"Data: {data['images_trained_on']} images with captions (digest `{data['digest']}`; {data['held_out']} images "
        "held out: sha256 of the base name mod 20 = 0, skin-tone variants with their base). "
        "Skin-tone variants are not trained on. "
        + (
            f"{config['photo_fraction']:.0%} of each autoencoder batch are crops of the photographs in scikit-image. "
            if config["photo_fraction"]
            else ""
        )
        + f"torch {record['torch']}, {_where(record)}, seed {config['seed']}.",
        "",
        *(_origin(record["init_from"], config["lora_rank"]) if "init_from" in record else ()),
        "| stage | steps | batch | learning rate | minutes | final loss |",
        "|---|---|---|---|---|---|",
    ]
    for stage, summary in record["stages"].items():
        training = config[f"{stage}_training"]
        lines.append(
            f"| {stage} | {summary['steps']} | {training['batch_size']} | {training['learning_rate']:g} "
            f"| {summary['minutes']} | {summary['final_loss']:.4f} |"
        )
    lines += ["", "## Figures", ""]
    figures = record.get("figures")
    if figures is None:
        lines.append("Not measured: `ldm-deploy eval` on this directory, with the data, measures them.")
    else:
        lines += ["| figure | value | how |", "|---|---|---|"]
        lines += [f"| {name} | {value} | {how} |" for name, value, how in _rows(figures)]
        if picture is not None:
            lines += ["", "## Samples", "", f"![samples]({picture})", "", f"Seed 0, row by row: {_listed(figures)}."]
    return "\n".join(lines) + "\n"


def _listed(figures: Mapping[str, Any]) -> str:
    return ", ".join(prompt or "no prompt" for prompt in figures["prompts"])


def _where(record: Mapping[str, Any]) -> str:
    device = record.get("device", "cpu")
    return f"{record['threads']} threads" if device == "cpu" else str(device)


def _origin(start: Mapping[str, Any], rank: int) -> tuple[str, ...]:
    what = f"adapters of rank {rank} in the U-Net's attention, merged" if rank else "text encoder and U-Net"
    return (f"Fine-tuned from `{start['name']}` (digest `{start['digest']}`): {what}.", "")


def _rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, value, how it was measured) from what `ldm-deploy eval` says of a reference."""
    held_out, retrieval = figures["held_out"], figures["retrieval"]
    how = held_out["reason"] or f"mean over {held_out['n']} held-out images, peak 255"
    rows = [
        ("reconstruction, PSNR", _shown(held_out["psnr_db"], " dB"), how),
        ("the same, where the original is not white", _shown(held_out["psnr_db_not_white"], " dB"), how),
        ("reconstruction, SSIM", _shown(held_out["ssim"]), how),
    ]
    for name, photograph in figures["photographs"].items():
        how = photograph["reason"] or f"{photograph['size']} pixels, never trained on"
        rows.append((f"photograph {name}, PSNR", _shown(photograph["psnr_db"], " dB"), how))
    rows.append(("retrieval", *_retrieval(retrieval)))
    if figures.get("retrieval_without_guidance"):
        rows.append(("retrieval without guidance", *_retrieval(figures["retrieval_without_guidance"])))
    return rows


def _retrieval(found: Mapping[str, Any]) -> tuple[str, str]:
    if found["rate"] is None:
        return "not measured", found["reason"]
    return f"{found['rate']:.1%}", (
        f"{found['hits']} of {found['n']} samples are nearest, of {found['gallery']} images by {found['method']}, to "
        f"one with the caption asked for; {found['sampler']}, {found['steps']} steps, guidance "
        f"{found['guidance_scale']:g}"
    )


def _shown(value: float | None, unit: str = "") -> str:
    return "not measured" if value is None else f"{value:.4g}{unit}"
