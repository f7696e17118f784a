"""From a prompt to an image: tokenizer, text encoder, sampler loop around the U-Net, decoder. numpy only."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from ldm_deploy.diffusion.samplers import SAMPLERS, SamplerRun
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import BundleError, EngineError, PromptError
from ldm_deploy.runtime.bundle import Bundle, VariantRecord, check_runtime_versions, read_bundle
from ldm_deploy.runtime.engines import Engine, check_supported, open_engine
from ldm_deploy.runtime.noise import gaussian_noise
from ldm_deploy.runtime.request import (
    check_guidance_rescale,
    check_guidance_scale,
    check_sampler,
    check_steps,
    check_student,
    image_seeds,
    latent_shape,
    prompt_list,
)
from ldm_deploy.runtime.tokenizer import Tokenizer, read_tokenizer

# (index of the step, timestep, latents after it)
OnStep = Callable[[int, int, np.ndarray], None]


class LazyEngines(Mapping[str, Engine]):
    """The engines of a variant by component, each opened when it is first asked for."""

    def __init__(self, bundle: Bundle, variant: VariantRecord, threads: int | None, spinning: bool) -> None:
        self._bundle = bundle
        self._records = {bundle.engines[name].component: bundle.engines[name] for name in variant.engines}
        self._options: dict[str, Any] = {"threads": threads, "spinning": spinning}
        self._opened: dict[str, Engine] = {}

    def __getitem__(self, component: str) -> Engine:
        if component not in self._opened:
            self._opened[component] = open_engine(self._records[component], self._bundle.root, **self._options)
        return self._opened[component]

    def __contains__(self, component: object) -> bool:
        return component in self._records  # Mapping's own would open the engine

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


class Pipeline:
    """A variant, ready to draw. `components` maps component names to engines.

    `model`: model.json's or bundle.json's description (scale_factor, downsampling, latent_channels, size_multiple,
    default_size). `defaults`: sampler, steps and guidance_scale of a call that names none. A pipeline keeps nothing
    between calls, so several threads may share one.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        tokenizer: Tokenizer,
        model: Mapping[str, Any],
        schedule: Schedule,
        defaults: Mapping[str, Any],
    ) -> None:
        self.components = engines
        self.tokenizer = tokenizer
        self.model = model
        self.schedule = schedule
        self.sampler: str = defaults["sampler"]
        self.steps: int = defaults["steps"]
        self.guidance_scale: float = defaults["guidance_scale"]

    def with_engines(self, engines: Mapping[str, Engine]) -> Pipeline:
        """The same pipeline with some components replaced, as calibration does to listen in. Opens no engine."""
        defaults = {"sampler": self.sampler, "steps": self.steps, "guidance_scale": self.guidance_scale}
        # A ChainMap only reads all but its first mapping.
        replaced = ChainMap(dict(engines), cast("dict[str, Engine]", self.components))
        return Pipeline(replaced, self.tokenizer, self.model, self.schedule, defaults)

    @property
    def at_once(self) -> bool:
        """Whether one engine holds the whole pipeline: sampler and steps are fixed in it, and it tells of no step."""
        return "pipeline" in self.components

    def __call__(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        sampler: str | None = None,
        guidance_rescale: float = 0.0,
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """Draw one image per prompt: uint8 (batch, H, W, 3).

        `seed`: one per image, or one number n for seeds n, n + 1, …. `size`: (height, width) in pixels. Guidance
        (Ho and Salimans 2022, arXiv:2207.12598): uncond + guidance_scale · (cond - uncond), where uncond is asked for
        `negative_prompt` (one, or one per image; by default the empty text); a scale of 1 skips that half.
        A model distilled to few steps is told the scale instead; it draws in the steps, with the sampler and in the
        range of scales that it was distilled for. `guidance_rescale` 0 to 1: see `rescale_guidance`. `on_step` is
        called after every step; an exception it raises ends the call.
        Raises `PromptError` for a request that cannot be served, and `EngineError` naming the component for an engine
        that fails or returns what is not finite.
        """
        if self.at_once:
            asked = {"steps": steps, "sampler": sampler}
            refused = {"negative_prompt": negative_prompt, "guidance_rescale": guidance_rescale, "on_step": on_step}
            return self._draw_at_once(prompt, seed, guidance_scale, size, asked, refused)
        latents = self.sample_latents(
            prompt, seed, steps, guidance_scale,
            negative_prompt=negative_prompt, size=size, sampler=sampler, guidance_rescale=guidance_rescale,
            on_step=on_step,
        )  # fmt: skip
        return self.decode(latents)

    def _draw_at_once(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int],
        guidance_scale: float | None,
        size: tuple[int, int] | None,
        asked: Mapping[str, Any],
        refused: Mapping[str, Any],
    ) -> np.ndarray:
        """With an engine that holds everything; what was fixed when it was made cannot be asked for differently."""
        for name, value in asked.items():
            fixed = getattr(self, name)
            if value is not None and value != fixed:
                raise PromptError(f"{name} is {value!r}; in this variant's engine it is fixed: {fixed!r}")
        for name, value in refused.items():
            if value:
                raise PromptError(f"{name} is not to be had from an engine that holds the whole pipeline; leave it out")
        prompts = prompt_list(prompt)
        seeds = image_seeds(seed, len(prompts))
        scale = check_guidance_scale(self.guidance_scale if guidance_scale is None else guidance_scale)
        feeds = {
            "input_ids": self.tokenizer.encode(prompts),
            "noise": gaussian_noise(seeds, latent_shape(self.model, size)),
            "guidance_scale": np.array(scale, np.float32),
        }
        return self._run("pipeline", feeds)["image"]

    def sample_latents(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        size: tuple[int, int] | None = None,
        sampler: str | None = None,
        guidance_rescale: float = 0.0,
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """As `__call__`, without the decoder: scaled latents, float32 (batch, z, H/f, W/f)."""
        prompts = prompt_list(prompt)
        negatives = prompt_list("" if negative_prompt is None else negative_prompt, count=len(prompts))
        seeds = image_seeds(seed, len(prompts))
        steps = check_steps(self.steps if steps is None else steps, self.schedule.num_train_timesteps)
        scale = check_guidance_scale(self.guidance_scale if guidance_scale is None else guidance_scale)
        sampler = check_sampler(self.sampler if sampler is None else sampler)
        rescale = check_guidance_rescale(guidance_rescale)
        shape = latent_shape(self.model, size)
        student = self.model.get("distilled")
        if student is not None:
            negative = negative_prompt is not None
            check_student(student, sampler=sampler, steps=steps, scale=scale, negative=negative, rescale=rescale)

        guided = scale != 1 and student is None
        ids = self.tokenizer.encode([*(negatives if guided else []), *prompts])
        conditions = self._run("text_encoder", {"input_ids": ids})
        if student is not None and student["guidance_range"] is not None:
            conditions["guidance_scale"] = np.full(len(prompts), scale, dtype=np.float32)
        latents = gaussian_noise(seeds, shape)
        run = SamplerRun(
            sampler, self.schedule, steps, noise=lambda index: gaussian_noise(seeds, shape, stream=index + 1)
        )
        for index, (timestep, _, _) in enumerate(run.levels):
            where = f" at step {index + 1} of {steps} (timestep {timestep})"
            prediction = self._predict(latents, timestep, conditions, scale if guided else None, rescale, where)
            latents = run.step(index, latents, prediction)
            latents = latents.astype(np.float32)
            if on_step is not None:
                on_step(index, timestep, latents)
        return latents

    def _predict(
        self,
        latents: np.ndarray,
        timestep: int,
        conditions: Mapping[str, np.ndarray],
        scale: float | None,
        rescale: float,
        where: str,
    ) -> np.ndarray:
        """The model's prediction; with guidance both halves go through the U-Net as one batch."""
        sample = latents if scale is None else np.concatenate([latents, latents])
        feeds = {
            "sample": sample,
            "timestep": np.full(len(sample), timestep, dtype=np.int64),
            **conditions,  # whatever the text encoder has for the U-Net: SDXL's has more than the states
        }
        prediction = self._run("unet", feeds, where)["prediction"]
        if scale is None:
            return prediction
        unconditional, conditional = np.split(prediction, 2)
        guided = unconditional + np.float32(scale) * (conditional - unconditional)
        return rescale_guidance(guided, conditional, rescale) if rescale else guided

    def _run(self, component: str, feeds: Mapping[str, np.ndarray], where: str = "") -> dict[str, np.ndarray]:
        """The outputs of one component; no NaN or infinity travels on from here."""
        if component not in self.components:
            there = ", ".join(self.components)
            raise EngineError(f"this variant has no engine for {component}; it has: {there}: choose another variant")
        outputs = self.components[component].run(feeds)
        if not all(np.isfinite(value).all() for value in outputs.values()):
            raise EngineError(
                f"{component} returned values that are not finite{where}; "
                "this engine must not be used: choose another variant"
            )
        return outputs

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents, float32 (batch, z, h, w) -> uint8 (batch, h·f, w·f, 3)."""
        latents = np.asarray(latents)
        if latents.ndim != 4 or latents.shape[1] != self.model["latent_channels"]:
            raise PromptError(
                f"latents have shape {latents.shape}; give (batch, {self.model['latent_channels']}, height, width)"
            )
        unscaled = (latents / self.model["scale_factor"]).astype(np.float32)
        image = self._run("vae_decoder", {"latent": unscaled})["image"]
        # Half up, as floor(x + 1/2): the same in every language.
        pixels = np.floor(np.clip((image + 1) * 127.5, 0, 255) + 0.5)
        return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))

    def encode(self, image: np.ndarray) -> np.ndarray:
        """uint8 (batch, H, W, 3) or (H, W, 3) -> scaled latents (posterior mean), float32 (batch, z, H/f, W/f)."""
        image = np.asarray(image)
        if image.ndim == 3:
            image = image[None]
        if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] != 3:
            raise PromptError(
                f"image is {image.dtype} of shape {image.shape}; give uint8 (batch, H, W, 3) or (H, W, 3)"
            )
        latent_shape(self.model, (image.shape[1], image.shape[2]))
        mean = self._run("vae_encoder", {"image": scaled_images(image)})["latent_mean"]
        return (mean * self.model["scale_factor"]).astype(np.float32)


def scaled_images(images: np.ndarray) -> np.ndarray:
    """uint8 (batch, H, W, 3) -> what encoders take: float32 (batch, 3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1)


def rescale_guidance(guided: np.ndarray, conditional: np.ndarray, amount: float) -> np.ndarray:
    """Bring a guided prediction back towards the spread of the conditional one: both (batch, z, h, w).

    Guidance inflates the standard deviation, which over-exposes images (Lin et al. 2023, arXiv:2305.08891, eq. 15 and
    16). `amount` 0 changes nothing, 1 restores the standard deviation of each image.
    """
    ratio = conditional.std(axis=(1, 2, 3), keepdims=True) / guided.std(axis=(1, 2, 3), keepdims=True)
    return (amount * ratio + (1 - amount)).astype(np.float32) * guided


def load(
    path: str | Path, *, variant: str | None = None, threads: int | None = None, spinning: bool = True
) -> Pipeline:
    """Check a bundle and make its default variant, or the one named, ready to draw.

    `threads` None: as many as the process may use. Every check is made now; an engine is opened when it is first
    needed. Raises `BundleError` for the bundle, `EngineError` for an engine that this version cannot run and
    `ConfigError` for a variant that is not there.
    """
    import os

    bundle = read_bundle(path)
    record = bundle.variant(variant)
    for engine_id in record.engines:
        check_supported(bundle.engines[engine_id])
    check_runtime_versions(bundle, record)
    if record.sampler not in SAMPLERS:
        raise BundleError(
            f"variant {record.name} is drawn with the sampler {record.sampler!r}; this version has: "
            f"{', '.join(SAMPLERS)}: choose another variant, or upgrade ldm_deploy"
        )
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    engines = LazyEngines(bundle, record, threads, spinning)
    tokenizer = read_tokenizer(bundle.root / bundle.data["tokenizer"], bundle.data["model"]["context_length"])
    defaults = {"sampler": record.sampler, "steps": record.steps, "guidance_scale": record.guidance_scale}
    schedule = Schedule.from_dict(bundle.data["schedule"])
    return Pipeline(engines, tokenizer, bundle.data["model"], schedule, defaults)
