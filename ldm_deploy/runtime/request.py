"""What a caller asks of the pipeline, checked before any work starts. Each function raises `PromptError`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from ldm_deploy.diffusion.samplers import SAMPLERS
from ldm_deploy.errors import PromptError
from ldm_deploy.runtime.noise import LARGEST_SEED


def prompt_list(prompt: str | Sequence[str], count: int | None = None) -> list[str]:
    """The prompts of a batch. With `count`, negative prompts: one for all of them, or that many."""
    if count is not None and isinstance(prompt, str):
        return [prompt] * count
    kind = "prompt" if count is None else "negative_prompt"
    try:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    except TypeError:
        raise PromptError(f"{kind} is {prompt!r}; give a text or a list of texts") from None
    if not prompts:
        raise PromptError(f"there is no {kind}; give one or more")
    if count is not None and len(prompts) != count:
        raise PromptError(f"{len(prompts)} negative prompts for {count} prompts; give one, or one per prompt")
    for text in prompts:
        if not isinstance(text, str):
            raise PromptError(f"{kind} is {text!r}, of type {type(text).__name__}; give text")
    return prompts


def image_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed per image: those given, or n, n + 1, … for a single number n."""
    if isinstance(seed, list | tuple | range | np.ndarray):
        given = list(seed)
        if len(given) != count:
            raise PromptError(f"{len(given)} seeds for {count} prompts; give one seed per prompt, or one number")
        return [_seed(value, LARGEST_SEED, "2^64 - 1") for value in given]
    upper = "2^64 - 1" if count == 1 else f"2^64 - {count}, for {count} images"
    first = _seed(seed, LARGEST_SEED - count + 1, upper)
    return [first + index for index in range(count)]


def _seed(value: Any, largest: int, shown: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) <= largest:
        raise PromptError(f"seed is {value!r}; give an integer from 0 to {shown}")
    return int(value)


def check_steps(steps: Any, limit: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise PromptError(f"steps is {steps!r}; give an integer from 1 to {limit}")
    if not 1 <= int(steps) <= limit:
        raise PromptError(f"steps is {steps}; allowed: 1 to {limit}, the timesteps the model was trained on")
    return int(steps)


def check_guidance_scale(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= float(scale) < math.inf:
        raise PromptError(f"guidance_scale is {scale!r}; give a number of 0 or more (1: no guidance)")
    return float(scale)


def check_guidance_rescale(amount: Any) -> float:
    if isinstance(amount, bool) or not isinstance(amount, Real) or not 0 <= float(amount) <= 1:
        raise PromptError(f"guidance_rescale is {amount!r}; give a number from 0 (none) to 1")
    return float(amount)


def check_sampler(sampler: str) -> str:
    if sampler not in SAMPLERS:
        raise PromptError(f"sampler is {sampler!r}; allowed: {', '.join(SAMPLERS)}")
    return sampler


def check_student(
    distilled: Mapping[str, Any], *, sampler: str, steps: int, scale: float, negative: bool, rescale: float
) -> None:
    """What a model distilled to few steps can be asked for (docs/bundle.md); its guidance is folded in."""
    for name, value, allowed in (("sampler", sampler, [distilled["sampler"]]), ("steps", steps, distilled["steps"])):
        if value not in allowed:
            raise PromptError(
                f"{name} is {value!r}; this model was distilled for {', '.join(map(str, allowed))}: "
                "ask for that, or choose a variant of its teacher"
            )
    low, high = distilled["guidance_range"] or (1, 1)
    if not low <= scale <= high:
        between = f"guidance from {low:g} to {high:g}" if low < high else "no guidance (1)"
        raise PromptError(f"guidance_scale is {scale:g}; this model was distilled for {between}: ask for that")
    for name, given in (("negative_prompt", negative), ("guidance_rescale", rescale != 0)):
        if given:
            raise PromptError(f"{name} is not to be had from a model whose guidance is folded in; leave it out")


def latent_shape(model: Mapping[str, Any], size: Any) -> tuple[int, int, int]:
    """(z, H/f, W/f) for images of `size` (height, width) in pixels; None: the model's default."""
    size = model["default_size"] if size is None else size
    multiple, factor = model["size_multiple"], model["downsampling"]
    try:
        height, width = size
    except (TypeError, ValueError):
        raise PromptError(f"size is {size!r}; give (height, width) in pixels") from None
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise PromptError(f"{name} is {value!r}; give an integer, a multiple of {multiple}")
        if value < multiple or value % multiple:
            below = max(int(value) // multiple, 1) * multiple
            raise PromptError(
                f"{name} is {value}; it must be a multiple of {multiple}, as {below} or {below + multiple}"
            )
    return model["latent_channels"], int(height) // factor, int(width) // factor
