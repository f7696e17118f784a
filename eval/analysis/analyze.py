"""`ldm-deploy analyze`: the latent space of a reference, what it costs at any size, and what a latent loses."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.artifact import atomic_write_bytes, atomic_write_json
from ldm_deploy.config import PRESETS
from ldm_deploy.errors import DataError, EvaluationError
from ldm_deploy.eval.analysis.cost_model import attention_bytes, measure, model_costs, parts
from ldm_deploy.eval.analysis.latent_space import analyze_latents
from ldm_deploy.eval.analysis.page import to_html
from ldm_deploy.eval.analysis.rate_distortion import decode, encode, rate_distortion
from ldm_deploy.eval.machine import machine

if TYPE_CHECKING:
    from ldm_deploy.models.reference import Reference
    from ldm_deploy.training.data import ImageSet

MOST_IMAGES = 1000  # that the latent statistics and the map look at
RESOLUTIONS = (256, 512, 1024)  # beside the reference's own, where they fit


def analyze_reference(
    source: Path | str, data: Path | str, out: Path, *, study_steps: int = 0, seed: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """Write `out/analysis.json` and `out/analysis.html`; returns the former's content.

    `data`: captioned images, or "photos". `study_steps` above 0: also train the rows of the rate-distortion table, so
    many steps each; they are kept in `out/rate-distortion/`. Raises `ArtifactError` for a damaged reference,
    `DataError` for data that does not open, `EvaluationError` for latents that are not finite.
    """
    import torch

    from ldm_deploy.models.reference import load_reference
    from ldm_deploy.models.sources import source_digest
    from ldm_deploy.training.data import load_images

    if out.exists() and not out.is_dir():
        raise EvaluationError(f"{out} is a file and a directory is to be written; give another --out")
    if threads is not None:
        torch.set_num_threads(threads)
    reference = load_reference(source)
    height, width = reference.model["default_size"]
    if height != width:
        raise EvaluationError(f"the reference draws {height}x{width}; the analysis needs a square size")
    images = load_images(data, height, reference.model.get("conditioning", "captions"))
    latent_space, strips = _latent_space(reference, images, seed)
    result: dict[str, Any] = {
        "format": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "reference": {"name": reference.model.get("name"), "digest": source_digest(reference.directory)},
        "data": {"digest": images.digest},
        "seed": seed,
        "machine": machine(threads),
        "latent_space": latent_space,
        "cost_model": cost_table(reference.model),
        "rate_distortion": {
            "rows": None,
            "reason": "it trains ten small autoencoders; ask for it with --study-steps 300, about half an hour",
        },
    }
    if study_steps:
        size = PRESETS["quick"].resolution
        small = images if size == height else load_images(data, size)
        result["rate_distortion"] = rate_distortion(small, out / "rate-distortion", study_steps, seed=seed)
    atomic_write_bytes(out / "analysis.html", to_html(result, strips).encode())
    atomic_write_json(out / "analysis.json", result)
    return result


def _latent_space(reference: Reference, images: ImageSet, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """Of at most `MOST_IMAGES` images without skin-tone variants, which would count one drawing six times."""
    rows = np.flatnonzero(~images.skin_tone)
    if len(rows) > MOST_IMAGES:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_IMAGES, replace=False))
    if len(rows) < 2:
        raise DataError(f"the data has {len(rows)} images without skin tone; statistics of latents need 2 or more")
    latents = encode(reference.autoencoder, images.images[rows])
    if not np.isfinite(latents).all():
        raise EvaluationError("the latents hold NaN or infinity: the autoencoder diverged in training; train it again")
    labels = [images.groups[row] for row in rows]
    named = labels if any(labels) else None
    result, strips = analyze_latents(latents, lambda latent: decode(reference.autoencoder, latent), named, seed)
    return {**result, "scale_factor": reference.model["scale_factor"]}, strips


def cost_table(model: Mapping[str, Any]) -> dict[str, Any]:
    """Predictions for what model.json describes, at its own size and at `RESOLUTIONS`; measurements at its own size."""
    own, multiple = model["default_size"][0], model["size_multiple"]
    found = {name: measure(module, *inputs) for name, module, inputs in parts(model, own, own)}
    rows = []
    for size in sorted({own, *(size for size in RESOLUTIONS if size % multiple == 0)}):
        for part, cost in model_costs(model, size, size).items():
            measured = found[part].to_dict() if size == own and part in found else None
            rows.append({"resolution": size, "part": part, **cost.to_dict(), "measured": measured})
    tokens = (1024 // 8) ** 2
    return {
        "batch": 1,
        "dtype": "float32",
        "rows": rows,
        "attention_example": {"image": 1024, "downsampling": 8, "tokens": tokens, "bytes": attention_bytes(tokens)},
    }


def print_analysis(result: Mapping[str, Any]) -> None:
    """The findings, and one line for each part, on standard output."""
    latent = result["latent_space"]
    shape = "x".join(map(str, latent["shape"]))
    print(
        f"latents {shape} of {latent['images']} images: {latent['active_units']} of {latent['units']} units are active"
    )
    for row in latent["channels"]:
        kurtosis = "undefined" if row["kurtosis"] is None else f"{row['kurtosis']:+.2f}"
        print(
            f"  channel {row['channel']}: mean {row['mean']:+.3f}, std {row['std']:.3f}, excess kurtosis {kurtosis}, "
            f"{row['active_share']:.0%} active"
        )
    for sentence in latent["findings"]:
        print(f"  {sentence}")
    for row in result["cost_model"]["rows"]:
        if row["measured"] is not None:
            error = max(abs(row[name] / found - 1) for name, found in row["measured"].items())
            print(
                f"{row['part']} at {row['resolution']}: {row['flops'] / 1e9:.3g} GFLOP, "
                f"{row['peak_bytes'] / 1e6:.3g} MB of activations; predicted within {error:.1%} of what was measured"
            )
    study = result["rate_distortion"]
    if study["rows"] is None:
        print(f"rate-distortion: not measured: {study['reason']}")
    for row in study["rows"] or ():
        if row["reason"] is not None:
            print(f"{row['name']}: not trained: {row['reason']}")
        else:
            print(
                f"{row['name']}: {row['psnr_db']:.1f} dB, SSIM {row['ssim']:.3f}; a U-Net step costs "
                f"{row['unet_flops'] / 1e9:.3g} GFLOP, {row['unet_times_lower']:.0f} times less than on pixels"
            )
