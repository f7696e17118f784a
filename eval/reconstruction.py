"""What autoencoders, of variants or of a reference, make of images of the user's own: encoded, decoded, compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.errors import DataError, LdmDeployError, PromptError
from ldm_deploy.eval.image_files import Size, image_size, list_images, read_images
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.measure import BASELINE
from ldm_deploy.eval.quality import Arrays, describe_figure, measure_pairs, summarise
from ldm_deploy.progress import task

if TYPE_CHECKING:
    from ldm_deploy.runtime.pipeline import Pipeline

BATCH_PIXELS = 2**16  # through the autoencoder at once: 16 images of 64x64, one of 256x256
METADATA = ("metadata.csv", "metadata.jsonl")

Record = dict[str, Any]


@dataclass(frozen=True)
class Originals:
    """Images of one size. `read(start, stop)`: uint8 (stop - start, H, W, 3)."""

    names: list[str]
    size: Size
    read: Callable[[int, int], np.ndarray]


def is_plain_folder(data: Path | str) -> bool:
    """Whether `data` is a folder of images without the metadata of a training set."""
    return Path(data).is_dir() and not any((Path(data) / name).is_file() for name in METADATA)


def open_originals(data: Path | str, model: Mapping[str, Any]) -> Originals:
    """A folder of images as they are, of any one size that the model takes; or the held-out images of a training set.

    `model`: the model's description. A training set (see `training/data.py`) is read at the model's default size, and
    without skin-tone variants. Raises `DataError` for images of unequal size, of a size that the model does not take,
    or if none is held out.
    """
    if not is_plain_folder(data):
        from ldm_deploy.training.data import load_images

        images = load_images(data, model["default_size"][0])
        chosen = images.select(images.held_out & ~images.skin_tone)
        if not chosen.names:
            raise DataError(f"data {data} holds no held-out image; give a folder of images without metadata")
        return Originals(chosen.names, chosen.images.shape[1:3], lambda start, stop: chosen.images[start:stop])
    from ldm_deploy.runtime.request import latent_shape

    folder = Path(data)
    names = list_images(folder)
    first = folder / names[0]
    size = image_size(first)
    try:
        latent_shape(model, size)
    except PromptError as error:
        raise DataError(f"image {first} does not fit this model: {error}; cut the images to such a size") from None
    return Originals(names, size, lambda start, stop: read_images(folder, names[start:stop], size, first))


def reconstruct(pipeline: Pipeline, originals: Originals, lpips: Lpips, *, seed: int = 0) -> Record:
    """`reconstruction` of report.json: images, size, reason, and quality against the originals.

    An engine that fails, or returns what is not finite, is the reason; the figures are then missing.
    """
    count = max(1, BATCH_PIXELS // (originals.size[0] * originals.size[1]))
    total = len(originals.names)
    record: Record = {"images": total, "size": list(originals.size), "reason": None, "quality": None}
    parts: list[Arrays] = []
    reasons: dict[str, str] = {}
    with task("reconstructing", total) as advance:
        for start in range(0, total, count):
            batch = originals.read(start, min(start + count, total))
            try:
                rebuilt = pipeline.decode(pipeline.encode(batch))
            except LdmDeployError as error:
                return record | {"reason": str(error)}
            arrays, reasons = measure_pairs(batch, rebuilt, lpips)
            parts.append(arrays)
            advance(len(batch))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    blocks = [(found["reference_features"], found["candidate_features"])] if "lpips" in found else []
    return record | {
        "quality": summarise(
            found, reasons, lambda index: {"file": originals.names[index]}, lpips, blocks,
            size=originals.size, seed=seed,
        )
    }  # fmt: skip


def reconstruct_all(
    bundle: Path,
    data: Mapping[str, Any],
    source: Path | None,
    originals: Originals,
    *,
    threads: int | None,
    seed: int = 0,
) -> dict[str, Record]:
    """`reconstruction` of every variant of a bundle, by name, and of the baseline where its `source` is there.

    `data`: the content of bundle.json. Variants with the same encoder and decoder are measured once.
    """
    import ldm_deploy

    component = {engine["id"]: engine["component"] for engine in data["engines"]}
    done: dict[tuple[str, ...], Record] = {}
    found = {}
    if source is not None:
        found[BASELINE] = reconstruct(_reference_pipeline(source, threads), originals, Lpips(), seed=seed)
    for variant in data["variants"]:
        own = tuple(name for name in variant["engines"] if component[name] in ("vae_encoder", "vae_decoder"))
        if own not in done:
            pipeline = ldm_deploy.load(bundle, variant=variant["name"], threads=threads)
            done[own] = reconstruct(pipeline, originals, Lpips(), seed=seed)
        found[variant["name"]] = done[own]
    return found


def reconstruct_reference(reference: Path, data: Path | str, *, threads: int | None, seed: int = 0) -> Record:
    """`reconstruction` of a reference in torch, fp32; `data` as `open_originals` takes it."""
    pipeline = _reference_pipeline(reference, threads)
    return reconstruct(pipeline, open_originals(data, pipeline.model), Lpips(), seed=seed)


def _reference_pipeline(reference: Path, threads: int | None) -> Pipeline:
    from ldm_deploy.models.sources import load_source
    from ldm_deploy.models.torch_engine import torch_pipeline

    return torch_pipeline(load_source(reference), threads)


def describe(name: str, record: Mapping[str, Any]) -> list[str]:
    """What a person reads of one reconstruction."""
    height, width = record["size"]
    title = f"{name}: reconstruction of {record['images']} images of {height}x{width}"
    if record["reason"] is not None:
        return [f"{title}: not measured: {record['reason']}"]
    return [title, *(f"  {metric}: {describe_figure(figure)}" for metric, figure in record["quality"].items())]
