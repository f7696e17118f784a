"""The model card of a student of few steps, from the record of its training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS = {
    "consistency": "latent consistency distillation (Luo et al. 2023, arXiv:2310.04378)",
    "progressive": "progressive distillation (Salimans and Ho 2022, arXiv:2202.00512)",
}


def student_card(model: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Markdown from model.json's and training.json's content."""
    distilled, teacher, data, config = model["distilled"], record["teacher"], record["data"], record["config"]
    training = config["training"]
    span = distilled["guidance_range"]
    guidance = (
        f"The guidance scale, {span[0]:g} to {span[1]:g}, is an input of the U-Net: there is one evaluation per step."
        if span
        else "It is drawn without guidance: there is one evaluation per step."
    )
    where = f"{record['threads']} threads" if record["device"] == "cpu" else record["device"]
    start = record.get("init_from")
    lines = [
        f"# {model['name']}: a student that draws in {_listed(distilled['steps'])} steps",
        "",
        f"Distilled from `{teacher['name']}` (digest `{teacher['digest']}`), whose autoencoder, text encoder and "
        f"tokenizer it has, by {METHODS[distilled['method']]}. {guidance} Licence: {model['license']}.",
        "",
        *((f"Its U-Net started as that of `{start['name']}` (digest `{start['digest']}`).", "") if start else ()),
        "## Made by",
        "",
        f"    {record['command']}",
        "",
        f"Data: {data['images_trained_on']} images with captions (digest `{data['digest']}`; {data['held_out']} held "
        f"out). torch {record['torch']}, {where}, seed {config['seed']}"
        + (f", adapters of rank {config['lora_rank']}, merged." if config["lora_rank"] else "."),
        "",
        "| stage | steps | batch | learning rate | minutes | final loss |",
        "|---|---|---|---|---|---|",
    ]
    for stage, summary in record["stages"].items():
        what = f"to {stage} steps" if stage.isdigit() else stage
        lines.append(
            f"| {what} | {summary['steps']} | {training['batch_size']} | {training['learning_rate']:g} "
            f"| {summary['minutes']} | {summary['final_loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def _listed(steps: list[int]) -> str:
    words = [str(count) for count in steps]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
