"""How close are a candidate's images to the reference's? Per image, in the mean, at the worst, and as sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm_deploy.eval.colour import colour_shift_each, delta_e2000_each
from ldm_deploy.eval.distribution import Block, not_measured_set, set_distances
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.metrics import bootstrap_ci, ms_ssim, ms_ssim_weights, mse_each, psnr_db_of, ssim
from ldm_deploy.eval.tiles import TILE, worst_tile_each

PEAK = 255
# Figures of one number per image. Name -> whether the worst image is the one with the lowest value.
WORST_IS_LOW = {
    "psnr_db": True,
    "ssim": True,
    "ms_ssim": True,
    "lpips": False,
    "delta_e2000": False,
    "tile_psnr_db": True,
}
METRICS = tuple(WORST_IS_LOW)
SETS = ("frechet_distance", "kernel_distance")

Pairs = Sequence[tuple[str, int]]  # prompt, seed
Arrays = dict[str, np.ndarray]  # first axis: the image
Label = dict[str, Any]  # what names an image in a report


def compare_images(
    reference: np.ndarray, candidate: np.ndarray, pairs: Pairs, lpips: Lpips, *, seed: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """report.json's `quality`, and one entry per image.

    Images are uint8 (n, H, W, 3), drawn for the same `pairs`. A metric that cannot be computed is null with its reason.
    """

    def label(index: int) -> Label:
        return {"prompt": pairs[index][0], "seed": pairs[index][1]}

    found, reasons = measure_pairs(reference, candidate, lpips)
    blocks = [(found["reference_features"], found["candidate_features"])] if "lpips" in found else []
    quality = summarise(found, reasons, label, lpips, blocks, size=reference.shape[1:3], seed=seed)
    return quality, [label(index) | image_entry(found, index) for index in range(len(pairs))]


def measure_pairs(reference: np.ndarray, candidate: np.ndarray, lpips: Lpips | None) -> tuple[Arrays, dict[str, str]]:
    """What is known of every pair by itself, so that pairs may be measured in any parts; and why the rest is not.

    uint8 (n, H, W, 3) twice -> arrays with n rows: `mse` and `tile_mse` in squared grey levels, `tile_at` (top, left),
    `psnr_db`, `ssim`, `ms_ssim`, `delta_e2000`, `colour_shift` (red, green, blue), `lpips`, and `reference_features`
    and `candidate_features` for distances between sets.
    """
    measures: dict[str, Callable[[], Arrays]] = {
        "psnr_db": lambda: _errors(reference, candidate),
        "ssim": lambda: {"ssim": ssim(reference, candidate, peak=PEAK)},
        "ms_ssim": lambda: {"ms_ssim": ms_ssim(reference, candidate, peak=PEAK)},
        "delta_e2000": lambda: {"delta_e2000": delta_e2000_each(reference, candidate)},
        "tile_psnr_db": lambda: _tiles(reference, candidate),
        "colour_shift": lambda: {"colour_shift": colour_shift_each(reference, candidate)},
    }
    arrays: Arrays = {}
    reasons: dict[str, str] = {}
    if lpips is not None and lpips.available:
        measures["lpips"] = lambda: _lpips(reference, candidate, lpips)
    else:
        reasons["lpips"] = str(lpips.reason) if lpips else "it was not asked for"
    for name, measure in measures.items():
        try:
            arrays |= measure()
        except (ValueError, RuntimeError) as error:  # unequal shapes; images too small for a window or the backbone
            reasons[name] = (str(error).splitlines() or [type(error).__name__])[0]
    return arrays, reasons


def _errors(reference: np.ndarray, candidate: np.ndarray) -> Arrays:
    mse = mse_each(reference, candidate)
    return {"mse": mse, "psnr_db": psnr_db_of(mse, peak=PEAK)}


def _tiles(reference: np.ndarray, candidate: np.ndarray) -> Arrays:
    mse, place = worst_tile_each(reference, candidate)
    return {"tile_mse": mse, "tile_at": place, "tile_psnr_db": psnr_db_of(mse, peak=PEAK)}


def _lpips(reference: np.ndarray, candidate: np.ndarray, lpips: Lpips) -> Arrays:
    distance, first, second = lpips.compare(reference, candidate)
    return {"lpips": distance, "reference_features": first, "candidate_features": second}


def image_entry(found: Mapping[str, np.ndarray], index: int) -> dict[str, Any]:
    """One image's own figures, as `variants[].images` of report.json has them."""
    entry: dict[str, Any] = {name: float(found[name][index]) for name in METRICS if name in found}
    if "colour_shift" in found:
        entry["colour_shift"] = [float(value) for value in found["colour_shift"][index]]
    if "tile_at" in found:
        entry["tile_at"] = [int(value) for value in found["tile_at"][index]]
    return entry


def summarise(
    found: Mapping[str, np.ndarray],
    reasons: Mapping[str, str],
    label: Callable[[int], Label],
    lpips: Lpips,
    blocks: Iterable[Block],
    *,
    size: Sequence[int],
    seed: int = 0,
) -> dict[str, Any]:
    """report.json's `quality` from what `measure_pairs` found; `label` names image i, `blocks` are their features.

    Every figure has a 95 % interval over images. Both images of a pair are resampled together, and the same seed draws
    the same images for every metric. `size`: height and width of the images.
    """
    backbone = {"backbone": lpips.backbone, "weights_sha256": lpips.weights_sha256}
    quality: dict[str, Any] = {}
    for name in METRICS:
        if name in reasons:
            quality[name] = not_measured(reasons[name])
        else:
            quality[name] = _figure(found[name], label, WORST_IS_LOW[name], seed)
    quality["lpips"] |= backbone
    if "mse" in found:
        quality["psnr_db"] |= {
            "peak": PEAK,
            "identical": int((found["mse"] == 0).sum()),
            "pooled": _pooled(found["mse"], seed),
        }
    if "tile_at" in found:
        worst = int(found["tile_psnr_db"].argmin())
        top, left = (int(value) for value in found["tile_at"][worst])
        quality["tile_psnr_db"] |= {"tile": TILE, "worst_tile": {"top": top, "left": left}}
    if "ms_ssim" in found:
        quality["ms_ssim"]["scales"] = len(ms_ssim_weights(size[0], size[1]))
    quality["colour_shift"] = (
        not_measured(reasons["colour_shift"])
        if "colour_shift" in reasons
        else _shift(found["colour_shift"], label, seed)
    )
    if "lpips" in reasons:
        sets = {name: not_measured_set(reasons["lpips"]) for name in SETS}
    else:
        sets = set_distances(blocks, seed)
    about = {"features": lpips.set_features, "weights_sha256": lpips.weights_sha256}
    return quality | {name: figure | about for name, figure in sets.items()}


def nothing_measured(reason: str, lpips: Lpips | None) -> dict[str, Any]:
    """`quality` of a variant that drew no images."""
    about = {"backbone": lpips and lpips.backbone, "weights_sha256": lpips and lpips.weights_sha256}
    quality = {name: not_measured(reason) for name in (*METRICS, "colour_shift")}
    quality["lpips"] |= about
    return quality | {name: not_measured_set(reason) for name in SETS}


def not_measured(reason: str) -> dict[str, Any]:
    return {"mean": None, "worst": None, "ci95": None, "n": 0, "reason": reason}


def _figure(values: np.ndarray, label: Callable[[int], Label], worst_is_low: bool, seed: int) -> dict[str, Any]:
    worst = int(values.argmin() if worst_is_low else values.argmax())
    interval = bootstrap_ci(values, np.mean, seed=seed)
    return {
        "mean": float(values.mean()),
        "worst": float(values[worst]),
        "worst_image": label(worst),
        "ci95": list(interval) if interval else None,
        "n": len(values),
        "reason": None,
    }


def _pooled(mse: np.ndarray, seed: int) -> dict[str, Any]:
    """PSNR of the mean squared error over all images: what one image made of all would have."""

    def pooled(values: np.ndarray, axis: int) -> np.ndarray:
        return psnr_db_of(values.mean(axis=axis), peak=PEAK)

    interval = bootstrap_ci(mse, pooled, seed=seed)
    return {"value": float(pooled(mse, 0)), "ci95": list(interval) if interval else None}


def _shift(values: np.ndarray, label: Callable[[int], Label], seed: int) -> dict[str, Any]:
    """As `_figure`, with red, green and blue in every place."""
    worst = int(np.abs(values).max(axis=1).argmax())
    intervals = [bootstrap_ci(channel, np.mean, seed=seed) for channel in values.T]
    return {
        "mean": [float(value) for value in values.mean(axis=0)],
        "worst": [float(value) for value in values[worst]],
        "worst_image": label(worst),
        "ci95": None if None in intervals else [list(interval) for interval in intervals if interval],
        "n": len(values),
        "reason": None,
    }


def describe_figure(figure: Mapping[str, Any]) -> str:
    """One figure of `quality` in words: its value, interval, worst image, number of images; or why it is missing."""
    if figure["reason"] is not None:
        return f"not measured: {figure['reason']}"

    def text(value: Any) -> str:
        return " / ".join(f"{number:.4g}" for number in (value if isinstance(value, list) else [value]))

    words = f"mean {text(figure['mean'])}" if "mean" in figure else text(figure["value"])
    if figure["ci95"]:
        nested = isinstance(figure["ci95"][0], list)
        low, high = ([list(side) for side in zip(*figure["ci95"], strict=True)]) if nested else figure["ci95"]
        words += f" (95 % {text(low)} to {text(high)})"
    if "worst" in figure:
        words += f", worst {text(figure['worst'])} ({', '.join(map(str, figure['worst_image'].values()))})"
    return f"{words}, n = {figure['n']}"


def flat_each(images: np.ndarray) -> np.ndarray:
    """Whether each of (n, H, W, C) is one flat colour, what a sampler that broke down usually returns: bool (n,)."""
    return np.asarray((images == images[:, :1, :1]).all(axis=(1, 2, 3)))


def constant_images(images: np.ndarray, pairs: Pairs) -> list[tuple[str, int]]:
    """The (prompt, seed) whose image is one flat colour."""
    return [pairs[int(index)] for index in np.flatnonzero(flat_each(images))]


def flat_reason(candidate: Sequence[tuple[str, int]], reference: Sequence[tuple[str, int]]) -> str | None:
    """One sentence where the candidate drew flat images and the baseline did not; else None."""
    new = [pair for pair in candidate if pair not in set(reference)]
    if not new:
        return None
    prompt, seed = new[0]
    more = f" and {len(new) - 1} more" if len(new) > 1 else ""
    return f"the image of {prompt!r}, seed {seed}{more} is constant (one flat colour); the baseline's is not"
