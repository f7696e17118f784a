"""What a training run shows of itself now and then: a grid of images, and figures of images it does not train on."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ldm_deploy.artifact import atomic_write_bytes
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.models.components import VaeDecoder
from ldm_deploy.models.torch_engine import TorchEngine
from ldm_deploy.runtime.pipeline import Pipeline
from ldm_deploy.runtime.tokenizer import read_tokenizer
from ldm_deploy.training.autoencoder import to_images, to_tensor
from ldm_deploy.training.loop import Measure, Preview

STEPS = 20


def reconstructions(held_out: np.ndarray, directory: Path, measure: Measure | None) -> Preview:
    """A preview of stage one: `held_out` uint8 (n, H, W, 3) above its reconstructions, and `measure` of both."""

    def preview(autoencoder: Any, step: int) -> Mapping[str, float]:
        device = next(autoencoder.parameters()).device
        rebuilt = np.concatenate(
            [
                to_images(autoencoder.decode(autoencoder.encode(to_tensor(image[None]).to(device))[0]))
                for image in held_out
            ]
        )
        shown = min(8, len(held_out))
        write_grid(directory / f"autoencoder-{step:06d}.png", [*held_out[:shown], *rebuilt[:shown]], columns=shown)
        return {} if measure is None else measure(held_out, rebuilt)

    return preview


def samples(
    model: Mapping[str, Any], autoencoder: Any, tokenizer: Path, prompts: Sequence[str], directory: Path
) -> Preview:
    """A preview of stage two: one sample per prompt, with guidance; seeds 0, 1, ….

    `model`: the content of model.json. `tokenizer`: its file, which need not be there before the first preview.
    """

    def preview(denoiser: Any, step: int) -> Mapping[str, float]:
        modules: dict[str, nn.Module] = {
            "text_encoder": denoiser.text_encoder,
            "unet": denoiser.unet,
            "vae_decoder": VaeDecoder(autoencoder),
        }
        engines = {name: TorchEngine(name, module) for name, module in modules.items()}
        defaults = {"sampler": "ddim", "steps": STEPS, "guidance_scale": model["sampling"]["guidance_scale"]}
        words = read_tokenizer(tokenizer, model["context_length"])
        pipeline = Pipeline(engines, words, model, Schedule.from_dict(model["schedule"]), defaults)
        images = pipeline(list(prompts), seed=0)
        write_grid(directory / f"diffusion-{step:06d}.png", list(images), columns=math.ceil(math.sqrt(len(images))))
        return {}

    return preview


def write_grid(path: Path, images: Sequence[np.ndarray], columns: int) -> None:
    """uint8 (H, W, 3) each -> one PNG, row by row; empty places are white."""
    from PIL import Image

    height, width = images[0].shape[:2]
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG")
    atomic_write_bytes(path, buffer.getvalue())
