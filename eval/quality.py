"""How close are a variant's images to the baseline's? Per image and in the mean; and are any of them flat?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.metrics import bootstrap_ci, psnr_db_each, ssim

Pairs = Sequence[tuple[str, int]]  # prompt, seed
METRICS = ("psnr_db", "ssim", "lpips")


def compare_images(
    reference: np.ndarray, candidate: np.ndarray, pairs: Pairs, lpips: Lpips, *, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """report.json's `quality`, and one entry per image.

    Images are uint8 (n, H, W, 3), drawn for the same `pairs`. A metric that cannot be computed is null with its reason.
    """
    values: dict[str, np.ndarray] = {}
    reasons: dict[str, str] = {}
    extra = {"lpips": {"backbone": lpips.backbone, "weights_sha256": lpips.weights_sha256}}
    for name in METRICS:
        try:
            if name == "psnr_db":
                values[name] = psnr_db_each(reference, candidate, peak=255)
            elif name == "ssim":
                values[name] = ssim(reference, candidate, peak=255)
            elif lpips.available:
                values[name] = lpips(reference, candidate)
            else:
                reasons[name] = str(lpips.reason)
        except (ValueError, RuntimeError) as error:  # unequal shapes; images too small for a window or the backbone
            reasons[name] = (str(error).splitlines() or [type(error).__name__])[0]
    quality = {
        name: {
            **(
                _figures(values[name], pairs, worst_is_low=name != "lpips", seed=seed)
                if name in values
                else not_measured(reasons[name])
            ),
            **extra.get(name, {}),
        }
        for name in METRICS
    }
    if "psnr_db" in values:
        quality["psnr_db"]["peak"] = 255
        quality["psnr_db"]["identical"] = int((reference == candidate).all(axis=(1, 2, 3)).sum())
    images = [
        {"prompt": prompt, "seed": number, **{name: float(found[index]) for name, found in values.items()}}
        for index, (prompt, number) in enumerate(pairs)
    ]
    return quality, images


def not_measured(reason: str) -> dict[str, Any]:
    return {"mean": None, "worst": None, "ci95": None, "n": 0, "reason": reason}


def _figures(values: np.ndarray, pairs: Pairs, *, worst_is_low: bool, seed: int) -> dict[str, Any]:
    worst = int(values.argmin() if worst_is_low else values.argmax())
    interval = bootstrap_ci(values, np.mean, seed=seed)
    return {
        "mean": float(values.mean()),
        "worst": float(values[worst]),
        "worst_image": {"prompt": pairs[worst][0], "seed": pairs[worst][1]},
        "ci95": list(interval) if interval else None,
        "n": len(values),
        "reason": None,
    }


def constant_images(images: np.ndarray, pairs: Pairs) -> list[tuple[str, int]]:
    """The (prompt, seed) whose image is one flat colour: what a sampler that broke down usually returns."""
    flat = (images == images[:, :1, :1]).all(axis=(1, 2, 3))
    return [pairs[int(index)] for index in np.flatnonzero(flat)]


def flat_reason(candidate: Sequence[tuple[str, int]], reference: Sequence[tuple[str, int]]) -> str | None:
    """One sentence where the candidate drew flat images and the baseline did not; else None."""
    new = [pair for pair in candidate if pair not in set(reference)]
    if not new:
        return None
    prompt, seed = new[0]
    more = f" and {len(new) - 1} more" if len(new) > 1 else ""
    return f"the image of {prompt!r}, seed {seed}{more} is constant (one flat colour); the baseline's is not"
