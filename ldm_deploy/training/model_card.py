"""The model card of a reference, from the record of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown from training.json's content; `figures` may be absent (not measured)."""
    config, data = record["config"], record["data"]
    lines = [
        f"# {config['name']}: a text-conditioned latent diffusion model",
        "",
        f"Images of {config['resolution']}x{config['resolution']} pixels from a caption. Weights are rounded to fp16; "
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
        + f"torch {record['torch']}, {record['threads']} threads, seed {config['seed']}.",
        "",
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
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in _flattened(figures)]
    return "\n".join(lines) + "\n"


def _flattened(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            rows += _flattened(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            rows.append((prefix + name, value))
    return rows


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
