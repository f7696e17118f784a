"""How much does a latent lose? The same small training at several downsampling factors, widths and losses.

Every row is a configuration whose autoencoder is trained for the same number of steps and measured on images it never
saw. Rows are kept one by one: the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.artifact import atomic_write_json, content_key
from ldm_deploy.config import PRESETS, Config
from ldm_deploy.errors import ConfigError, DataError
from ldm_deploy.eval.analysis.cost_model import measure, model_costs, parts
from ldm_deploy.eval.analysis.semantic import GroupClassifier, preservation
from ldm_deploy.eval.latency import interleaved, summary, warm_up
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.metrics import psnr_db_each, ssim
from ldm_deploy.progress import task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm_deploy.models.autoencoder import Autoencoder
    from ldm_deploy.training.data import ImageSet

FACTORS = (4, 8, 16)
Z_CHANNELS = (4, 16)
LATENCY_ROUNDS = 20
TEST_CROPS = 48  # of the held-out photographs, where the data holds nothing out
BATCH = 16

# What courses and blog posts say, to be read beside the table: factor -> (PSNR in dB, U-Net cost: times lower).
CLASSIC_CLAIM: dict[int, tuple[str, int]] = {4: ("above 30", 16), 8: ("about 27", 64), 16: ("about 23", 256)}


@dataclass(frozen=True)
class Row:
    """One line of the table. `reason` says why it cannot be trained, where it cannot."""

    name: str
    study: str  # "rate", "loss" or "discriminator"
    config: Config
    reason: str | None = None


def study_rows(base: Config, steps: int, lpips_reason: str | None) -> list[Row]:
    """The rows, from a configuration that gives model widths, batch size, learning rate and resolution.

    `lpips_reason`: why LPIPS cannot be computed here, None if it can; rows that train on it then say so. Raises
    `ConfigError` for fewer steps than 1.
    """
    if steps < 1:
        raise ConfigError(f"the number of steps per row is {steps}; give 1 or more")
    stage = dataclasses.replace(base.autoencoder_training, steps=steps, restarts=(), resolutions=(), grow_at=())
    plain = _with_loss(dataclasses.replace(base, autoencoder_training=stage), perceptual_weight=0.0, gan_weight=0.0)
    rows = [
        Row(_network(config), "rate", config)
        for config in (_with_latent(plain, factor, z) for factor in FACTORS for z in Z_CHANNELS)
    ]
    perceptual = _with_loss(_with_latent(plain, 8, 4), perceptual_weight=1.0)
    rows.append(Row("f8-z4-perceptual", "loss", perceptual, lpips_reason))
    for start in (0, steps // 4, steps // 2):
        config = _with_loss(perceptual, gan_weight=0.5, disc_start=start)
        rows.append(Row(f"f8-z4-discriminator-from-{start}", "discriminator", config, lpips_reason))
    return rows


def _with_latent(config: Config, downsampling: int, z_channels: int) -> Config:
    """The configuration with another latent: levels are dropped from the end, or the last one is repeated."""
    levels, widths = round(math.log2(downsampling)) + 1, config.autoencoder.ch_mult
    widths = (*widths, *[widths[-1]] * levels)[:levels]
    autoencoder = dataclasses.replace(config.autoencoder, ch_mult=widths, z_channels=z_channels)
    return dataclasses.replace(config, autoencoder=autoencoder)


def _with_loss(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, autoencoder_loss=dataclasses.replace(config.autoencoder_loss, **changes))


def rate_distortion(images: ImageSet, directory: Path, steps: int, *, seed: int = 0) -> dict[str, Any]:
    """Train and measure every row; `directory` keeps checkpoints and finished rows.

    `images` at the resolution of the preset "quick", whose networks the rows have. Raises `DataError` for fewer
    training images than a batch.
    """
    base = dataclasses.replace(PRESETS["quick"], seed=seed)
    lpips = Lpips()
    rows = study_rows(base, steps, lpips.reason)
    chosen = images.select(~images.held_out & ~images.skin_tone)
    batch_size = base.autoencoder_training.batch_size
    if len(chosen.texts) < batch_size:
        raise DataError(
            f"the data has {len(chosen.texts)} images to train on, fewer than one batch ({batch_size}); add images"
        )
    originals, labels, which = _test_images(images, base.resolution)
    found = {row.name: _kept(_folder(directory, row, images.digest)) for row in rows}
    missing = [row for row in rows if row.reason is None and found[row.name] is None]
    classifier = None
    if labels is not None and missing and len(set(chosen.groups)) > 1:
        classifier = GroupClassifier(chosen.images, chosen.groups, seed=seed)
    with task(f"rate-distortion, {steps} steps a row", len(rows), len(rows) - len(missing)) as advance:
        for row in missing:
            place = _folder(directory, row, images.digest)
            rebuilt = reconstruct(_train(row.config, chosen, place), originals)
            semantic = {"accuracy": None, "reason": "the held-out images have no groups to tell apart"}
            if classifier is not None and labels is not None:
                semantic = preservation(classifier, originals, rebuilt, labels)
            result = {
                "psnr_db": float(psnr_db_each(originals, rebuilt, peak=255).mean()),
                "ssim": float(ssim(originals, rebuilt, peak=255).mean()),
                "lpips": float(lpips(originals, rebuilt).mean()) if lpips.available else None,
                "semantic": semantic,
            }
            atomic_write_json(place / "result.json", result)
            found[row.name] = result
            advance(1)
    trained = [row for row in rows if row.reason is None]
    networks = {_network(row.config): _described(row.config) for row in trained}  # some rows differ in the loss only
    costs = {name: _costs(model, base.resolution) for name, model in networks.items()}
    latency = _latency(networks, base.resolution, seed)
    return {
        "protocol": (
            f"{base.resolution}x{base.resolution} pixels, {steps} steps of batch {batch_size} per row on "
            f"{len(chosen.texts)} images, measured on {len(originals)} {which}; PSNR with peak 255, mean over images; "
            f"LPIPS: {lpips.backbone if lpips.available else lpips.reason}; U-Net and decoder untrained, one pass, "
            "eager fp32 at batch 1, interleaved rounds."
        ),
        "steps": steps,
        "rows": [
            {
                "name": row.name,
                "study": row.study,
                "reason": row.reason,
                **_latent(row.config),
                **(found[row.name] or {}),
                **(costs[_network(row.config)] if row.reason is None else {}),
                "latency_ms": latency[_network(row.config)] if row.reason is None else None,
            }
            for row in rows
        ],
        "claim": [
            {"downsampling": factor, "psnr_db": psnr, "unet_times_lower": times}
            for factor, (psnr, times) in CLASSIC_CLAIM.items()
        ],
        "reason": None,
    }


def encode(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """uint8 (n, H, W, 3) -> posterior means float32 (n, z, h, w), unscaled."""
    import torch

    from ldm_deploy.training.autoencoder import to_tensor

    with torch.inference_mode():
        batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        return np.concatenate([autoencoder.encode(to_tensor(batch))[0].numpy() for batch in batches])


def decode(autoencoder: Autoencoder, latents: np.ndarray) -> np.ndarray:
    """float32 (n, z, h, w), unscaled -> uint8 (n, H, W, 3), rounded as the runtime rounds."""
    import torch

    from ldm_deploy.training.autoencoder import to_images

    with torch.inference_mode():
        batches = [latents[start : start + BATCH] for start in range(0, len(latents), BATCH)]
        return np.concatenate([to_images(autoencoder.decode(torch.from_numpy(batch))) for batch in batches])


def reconstruct(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """Through the posterior mean and back: uint8 (n, H, W, 3) -> uint8 (n, H, W, 3)."""
    return decode(autoencoder, encode(autoencoder, images))


class _Turn:
    """One network in this process, for `interleaved`."""

    def __init__(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.name, self._module, self._inputs = name, module, inputs

    def stop(self) -> None:
        pass

    def time_ms(self) -> float:
        began = time.perf_counter()
        self._module(*self._inputs)
        return 1000 * (time.perf_counter() - began)


def _latency(models: Mapping[str, Mapping[str, Any]], size: int, seed: int) -> dict[str, Any]:
    """Name -> {"unet", "decoder"}: milliseconds of one pass, all networks in interleaved rounds."""
    import torch

    turns: dict[str, list[_Turn]] = {"unet": [], "decoder": []}
    for name, model in models.items():
        for part, module, inputs in parts(model, size, size):
            if part in turns:
                turns[part].append(_Turn(name, module, inputs))
    result: dict[str, dict[str, Any]] = {name: {} for name in models}
    with torch.inference_mode():
        for part, candidates in turns.items():
            for turn in candidates:
                warm_up(turn.time_ms)
            samples, _ = interleaved(
                candidates, lambda turn, _: turn.time_ms(), LATENCY_ROUNDS, seed=seed, time_limit_s=60, least=5
            )
            for name, times in samples.items():
                result[name][part] = summary(times)
    return result


def _described(config: Config) -> dict[str, Any]:
    """model.json's content as far as the cost of a row's networks depends on it."""
    from ldm_deploy.models.reference import describe

    text = {"context_length": config.text_encoder.context_length, "width": config.text_encoder.width}
    return {**describe(config, 1.0, text, {}), "size_multiple": 1}


def _latent(config: Config) -> dict[str, Any]:
    side, z = config.resolution // config.autoencoder.downsampling, config.autoencoder.z_channels
    return {
        "downsampling": config.autoencoder.downsampling,
        "z_channels": z,
        "latent_shape": [z, side, side],
        "latent_values": z * side * side,
        "compression": 3 * config.resolution**2 / (z * side * side),  # values of the image per value of the latent
    }


def _network(config: Config) -> str:
    return f"f{config.autoencoder.downsampling}-z{config.autoencoder.z_channels}"


def _costs(model: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Predicted FLOPs and measured memory of a row's networks."""
    costs = model_costs(model, size, size)
    found = {name: measure(module, *inputs) for name, module, inputs in parts(model, size, size)}
    return {
        "unet_flops": costs["unet"].flops,
        "unet_times_lower": costs["unet_in_pixel_space"].flops / costs["unet"].flops,
        "decoder_flops": costs["decoder"].flops,
        "unet_peak_bytes": found["unet"].peak_bytes,
        "decoder_peak_bytes": found["decoder"].peak_bytes,
    }


def _test_images(images: ImageSet, size: int) -> tuple[np.ndarray, Sequence[str] | None, str]:
    """Held-out images with their groups; where the data holds none out, crops of scikit-learn's photographs."""
    from ldm_deploy.training.data import held_out_photographs, random_crop

    chosen = images.select(images.held_out & ~images.skin_tone)
    if chosen.texts:
        return chosen.images, chosen.groups, "held-out images"
    draw = np.random.default_rng(0)
    photographs = list(held_out_photographs().values())
    crops = [random_crop(photographs[index % len(photographs)], size, draw) for index in range(TEST_CROPS)]
    return np.stack(crops), None, "crops of photographs that are never trained on"


def _train(config: Config, images: ImageSet, directory: Path) -> Autoencoder:
    from ldm_deploy.training.autoencoder import train_autoencoder

    loss = config.autoencoder_loss
    perceptual = Lpips(loss.perceptual_backbone).as_loss() if loss.perceptual_weight else None
    key = content_key(config.to_dict())
    return train_autoencoder(config, images, directory, key, resume=True, perceptual=perceptual)


def _folder(directory: Path, row: Row, data_digest: str) -> Path:
    """Names the configuration and the data by content: another budget or other images never meet an old checkpoint."""
    key = content_key({"config": row.config.to_dict(), "data": data_digest})
    return directory / f"{row.name}-{key.removeprefix('sha256:')[:12]}"


def _kept(folder: Path) -> dict[str, Any] | None:
    """The result of an earlier run, None if there is none or it is damaged."""
    try:
        content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "psnr_db" in content else None
