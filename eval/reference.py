"""Is a reference any good by itself? Reconstruction of images it never saw; are its samples what was asked for?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.errors import DataError, EvaluationError
from ldm_deploy.eval.grid import Grid, load_grid, retrieval_grid
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.metrics import psnr_db_each, ssim
from ldm_deploy.progress import task

if TYPE_CHECKING:
    from ldm_deploy.runtime.pipeline import Pipeline
    from ldm_deploy.training.data import ImageSet

BATCH = 16  # images per pass through the autoencoder
SKIN_TONE = "skin tone"


def score_reference(
    directory: Path | str,
    data: Path | str,
    *,
    threads: int | None = None,
    grid: Grid | None = None,
    steps: int | None = None,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Held-out reconstruction, photographs and retrieval of a reference directory, as plain data.

    `data`: the images it was trained on (the held-out ones are told by their names). `grid`: what is asked for; None
    takes the 50 shipped prompts if the data has them, else those that model.json names. `picture`: a PNG to write, with
    the first sample of every prompt, ten in a row. Figures that need something absent are null with a reason. Raises
    `DataError` for data that does not open.
    """
    from ldm_deploy.models.reference import load_reference
    from ldm_deploy.models.sources import source_digest
    from ldm_deploy.models.torch_engine import torch_pipeline
    from ldm_deploy.training.data import load_images
    from ldm_deploy.training.preview import write_grid

    reference = load_reference(directory)
    height, width = reference.model["default_size"]
    if height != width:
        raise EvaluationError(
            f"the reference draws {height}x{width}; scoring needs a square size, as the data is square"
        )
    images = load_images(data, height, reference.model.get("conditioning", "captions"))
    pipeline = torch_pipeline(reference, threads)
    if grid is None:
        grid = retrieval_grid()
        if not set(grid.prompts) <= {base_text(text) for text in images.texts}:
            grid = load_grid(reference.model.get("prompts", {}).get("report"))
    samples = draw(pipeline, grid, steps)
    if picture is not None:
        firsts = list(samples[:: len(grid.seeds)])
        write_grid(picture, firsts, columns=min(10, len(firsts)))
    guidance = pipeline.guidance_scale
    return {
        "format": 1,
        "reference": {"name": reference.model.get("name"), "digest": source_digest(reference.directory)},
        "data": {"digest": images.digest, "images": len(images.texts), "held_out": int(images.held_out.sum())},
        "held_out": reconstruct_held_out(pipeline, images),
        "photographs": reconstruct_photographs(pipeline),
        "retrieval": {**retrieve(samples, images, grid), **_sampling(pipeline, steps, guidance)},
        "retrieval_without_guidance": None if guidance == 1 or "distilled" in reference.model else {
            **retrieve(draw(pipeline, grid, steps, 1.0), images, grid), **_sampling(pipeline, steps, 1.0)
        },
        "prompts": list(grid.prompts),
    }  # fmt: skip


def draw(pipeline: Pipeline, grid: Grid, steps: int | None = None, guidance_scale: float | None = None) -> np.ndarray:
    """One image per prompt and seed of the grid: uint8 (n, H, W, 3). None takes the pipeline's own value."""
    drawn = []
    with task("drawing samples", len(grid.pairs)) as advance:
        for prompt, seed in grid.pairs:
            drawn.append(pipeline(prompt, seed=seed, steps=steps, guidance_scale=guidance_scale)[0])
            advance()
    return np.stack(drawn)


def _sampling(pipeline: Pipeline, steps: int | None, guidance_scale: float) -> dict[str, Any]:
    return {"sampler": pipeline.sampler, "steps": steps or pipeline.steps, "guidance_scale": guidance_scale}


def reconstruct_held_out(pipeline: Pipeline, images: ImageSet) -> dict[str, Any]:
    """PSNR (peak 255) and SSIM of held-out images, without skin-tone variants, which would count one drawing six times.

    `psnr_db` is over all pixels. White background is easy and flatters it, so `psnr_db_not_white` is over the pixels
    that are not pure white in the original. Both are means over images of each image's PSNR.
    """
    chosen = images.images[images.held_out & ~images.skin_tone]
    if len(chosen) == 0:
        return {"psnr_db": None, "psnr_db_not_white": None, "ssim": None, "n": 0, "reason": "no image is held out"}
    rebuilt = reconstruct(pipeline, chosen)
    inside = psnr_db_inside(chosen, rebuilt, (chosen != 255).any(axis=-1))
    return {
        "psnr_db": float(psnr_db_each(chosen, rebuilt, peak=255).mean()),
        "psnr_db_not_white": None if len(inside) == 0 else float(inside.mean()),
        "ssim": float(ssim(chosen, rebuilt, peak=255).mean()),
        "n": len(chosen),
        "reason": None,
    }


def measure_reconstruction(originals: np.ndarray, rebuilt: np.ndarray) -> dict[str, float]:
    """Figures for a training log: uint8 (n, H, W, 3) twice, peak 255, means over images."""
    return {
        "held_out_psnr_db": float(psnr_db_each(originals, rebuilt, peak=255).mean()),
        "held_out_ssim": float(ssim(originals, rebuilt, peak=255).mean()),
    }


def psnr_db_inside(reference: np.ndarray, candidate: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """PSNR (peak 255) of each image over the pixels in `mask` (bool (n, H, W)); images without any are left out."""
    kept = mask.any(axis=(1, 2))
    squared = ((reference.astype(np.float64) - candidate.astype(np.float64)) ** 2).mean(axis=-1)
    mse = (squared * mask).sum(axis=(1, 2))[kept] / mask.sum(axis=(1, 2))[kept]
    return np.asarray(10 * np.log10(255**2 / np.maximum(mse, 1e-10 * 255**2)))  # equal pixels count as 100 dB


def reconstruct_photographs(pipeline: Pipeline) -> dict[str, dict[str, Any]]:
    """scikit-learn's two photographs, never trained on, box-resized to half, rounded down to multiples of 64."""
    from PIL import Image

    from ldm_deploy.training.data import held_out_photographs

    try:
        photographs = held_out_photographs()
    except DataError as error:
        return {"none": {"size": None, "psnr_db": None, "ssim": None, "reason": str(error)}}
    unit = math.lcm(64, pipeline.model["size_multiple"])
    rows: dict[str, dict[str, Any]] = {}
    for name, photograph in photographs.items():
        height, width = (max(unit, length // 2 // unit * unit) for length in photograph.shape[:2])
        resized = np.asarray(Image.fromarray(photograph).resize((width, height), Image.Resampling.BOX))[None]
        rebuilt = reconstruct(pipeline, resized)
        rows[name] = {
            "size": f"{height}x{width}",
            "psnr_db": float(psnr_db_each(resized, rebuilt, peak=255)[0]),
            "ssim": float(ssim(resized, rebuilt, peak=255)[0]),
            "reason": None,
        }
    return rows


def reconstruct(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """Through the autoencoder and back: uint8 (n, H, W, 3) -> uint8 (n, H, W, 3)."""
    parts = []
    with task("reconstructing", len(images)) as advance:
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            parts.append(pipeline.decode(pipeline.encode(batch)))
            advance(len(batch))
    return np.concatenate(parts)


def retrieve(samples: np.ndarray, images: ImageSet, grid: Grid) -> dict[str, Any]:
    """The share of samples, uint8 (n, H, W, 3) in the grid's order, whose nearest image of all has the text asked for.

    Skin tones do not count. Distance: LPIPS where its weights are there, else the root mean squared pixel difference;
    `method` says which.
    """
    there = {base_text(text) for text in images.texts}
    absent = [prompt for prompt in grid.prompts if prompt not in there]
    if set(grid.prompts) == {""}:
        return {"rate": None, "n": 0, "reason": "the model takes no prompt"}
    if absent:
        return {"rate": None, "n": 0, "reason": f"the data has no image of {absent[0]!r}, so it cannot be retrieved"}
    lpips = Lpips()
    if lpips.available:
        nearest, distance = lpips.nearest(samples, images.images)
    else:
        nearest, distance = nearest_by_pixels(samples, images.images)
    rows: list[dict[str, Any]] = []
    for (prompt, seed), index, value in zip(grid.pairs, nearest, distance, strict=True):
        text = images.texts[int(index)]
        hit = base_text(text) == prompt
        rows.append({"prompt": prompt, "seed": seed, "nearest": text, "distance": float(value), "hit": hit})
    return {
        "rate": sum(row["hit"] for row in rows) / len(rows),
        "hits": sum(row["hit"] for row in rows),
        "n": len(rows),
        "method": f"LPIPS ({lpips.backbone})" if lpips.available else "pixels (root mean squared difference)",
        "weights_sha256": lpips.weights_sha256,
        "reason": lpips.reason,
        "gallery": len(images.texts),
        "prompts_sha256": grid.prompts_sha256,
        "samples": rows,
    }


def base_text(text: str) -> str:
    """A caption without its skin tones: "thumbs up: dark skin tone" -> "thumbs up"; "man: bald" stays."""
    base, colon, rest = text.partition(":")
    kept = [part.strip() for part in rest.split(",") if part.strip() and not part.strip().endswith(SKIN_TONE)]
    return f"{base}: {', '.join(kept)}" if colon and kept else base


def nearest_by_pixels(queries: np.ndarray, gallery: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (q, H, W, 3), (g, H, W, 3) -> index int64 (q,), distance in grey levels float64 (q,)."""
    query = queries.reshape(len(queries), -1).astype(np.float64)
    best = np.zeros(len(queries), np.int64)
    least = np.full(len(queries), np.inf)
    for start in range(0, len(gallery), 256):
        block = gallery[start : start + 256].reshape(-1, query.shape[1]).astype(np.float64)
        squared = (query**2).sum(1)[:, None] + (block**2).sum(1)[None] - 2 * query @ block.T
        place = squared.argmin(1)
        found = np.maximum(squared[np.arange(len(query)), place], 0)
        better = found < least
        best[better], least[better] = start + place[better], found[better]
    return best, np.sqrt(least / query.shape[1])
