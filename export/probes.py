"""Real inputs for parity: what each component meets while the reference draws images.

Latents come from short sampler trajectories with and without guidance, captions from the text encoder, images from the
decoder; batch sizes, resolutions and caption lengths differ from probe to probe, so that a fixed axis shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.eval.parity import Arrays, Probe, Runnable

if TYPE_CHECKING:
    from ldm_deploy.models.sources import Source

CAPTIONS = ("red apple", "cat face", "rocket")
STEPS = 4


class Recorder:
    """An engine that keeps every call as a probe."""

    def __init__(self, engine: Runnable) -> None:
        self.engine = engine
        self.calls: list[Probe] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        outputs = self.engine.run(feeds)
        # Copies: a sampler may go on to write into its arrays.
        self.calls.append(
            Probe({k: np.array(v) for k, v in feeds.items()}, {k: np.array(v) for k, v in outputs.items()})
        )
        return outputs


def make_probes(
    source: Source, *, components: Sequence[str] | None = None, seed: int = 0, threads: int | None = None
) -> dict[str, list[Probe]]:
    """component -> probes with torch's fp32 outputs. About 0.3 MB for a model that draws 64x64.

    `components`: those that are wanted (all); the autoencoder does not run where neither half of it is.
    """
    from ldm_deploy.models.torch_engine import torch_engines
    from ldm_deploy.runtime.pipeline import Pipeline
    from ldm_deploy.runtime.tokenizer import Tokenizer

    model = source.model
    recorders = {name: Recorder(engine) for name, engine in torch_engines(source, threads).items()}
    tokenizer = Tokenizer(source.tokenizer_text(), model["context_length"])
    sampler = model["distilled"]["sampler"] if "distilled" in model else "ddim"
    pipeline = Pipeline(recorders, tokenizer, model, source.schedule, {**model["sampling"], "sampler": sampler})
    wanted = list(recorders) if components is None else list(components)
    probes: dict[str, list[Probe]] = {name: [] for name in wanted}
    for captions, size, scale, steps in _runs(model):
        seeds = [seed + index for index in range(len(captions))]
        latents = pipeline.sample_latents(captions, seed=seeds, steps=steps, guidance_scale=scale, size=size)
        if "vae_decoder" in wanted or "vae_encoder" in wanted:
            pipeline.encode(pipeline.decode(latents))
        calls = {name: recorder.calls for name, recorder in recorders.items()}
        if "unet" in wanted:
            # The start (pure noise) and one step on the way; then two timesteps in one batch, as a server would ask.
            steps_taken = calls["unet"]
            later = steps_taken[1:] or steps_taken  # a student may know one step only
            probes["unet"] += [steps_taken[0], later[max(0, len(later) - 2)]]
            if scale != 1.0:
                probes["unet"].append(_again(recorders["unet"], _joined(later[0], later[-1])))
        for name in ("text_encoder", "vae_encoder", "vae_decoder"):
            if name in wanted:
                probes[name] += calls[name][-1:]
        for recorder in recorders.values():
            recorder.calls = []
    # A shorter caption than the tokenizer pads to.
    for name, key in (("text_encoder", "input_ids"), ("unet", "encoder_hidden_states")):
        if name in wanted:
            last = probes[name][-1].inputs
            probes[name].append(
                _again(recorders[name], {**last, key: np.ascontiguousarray(last[key][:, : last[key].shape[1] // 2])})
            )
    return probes


def _runs(model: Mapping[str, Any]) -> list[tuple[list[str], tuple[int, int], float, int]]:
    """(captions, (height, width), guidance, steps) of each trajectory: U-Net batches of 1, 2 and 3."""
    unit = model["size_multiple"]
    height, width = model["default_size"]
    known = model.get("prompts", {}).get("report") or CAPTIONS
    texts = [known[index % len(known)] for index in range(3)]
    guidance = model["sampling"]["guidance_scale"]
    scales, steps = (1.0, guidance, 1.0), (2, STEPS)
    if "distilled" in model:
        low, high = model["distilled"]["guidance_range"] or (1.0, 1.0)
        scales = (low, guidance, high)
        allowed = model["distilled"]["steps"]
        steps = (allowed[0], max((count for count in allowed if count <= STEPS), default=allowed[0]))
    doubled = guidance != 1 and "distilled" not in model  # with guidance both predictions are asked for at once
    return [
        (texts[:1], (height, width), scales[0], steps[0]),
        (texts[: 1 if doubled else 2], (2 * unit, 3 * unit), scales[1], steps[1]),
        (texts, (3 * unit, 2 * unit), scales[2], steps[1]),
    ]


def _joined(first: Probe, second: Probe) -> Arrays:
    return {name: np.concatenate([first.inputs[name], second.inputs[name]]) for name in first.inputs}


def _again(recorder: Recorder, inputs: Arrays) -> Probe:
    return Probe(inputs, {name: np.array(value) for name, value in recorder.engine.run(inputs).items()})
