"""Real inputs for parity: what each component meets while the reference draws images.

Latents come from short sampler trajectories with and without guidance, captions from the text encoder, images from the
decoder; batch sizes, resolutions and caption lengths differ from probe to probe, so that a fixed axis shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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
    pipeline = Pipeline(recorders, tokenizer, model, source.schedule, {**model["sampling"], "sampler": "ddim"})
    wanted = list(recorders) if components is None else list(components)
    probes: dict[str, list[Probe]] = {name: [] for name in wanted}
    unit = model["size_multiple"]
    guidance = model["sampling"]["guidance_scale"]
    height, width = model["default_size"]
    known = model.get("prompts", {}).get("report") or CAPTIONS
    texts = [known[index % len(known)] for index in range(3)]
    # captions, (height, width), guidance, steps: U-Net batches of 1, 2 and 3
    runs = (
        (texts[:1], (height, width), 1.0, 2),
        (texts[: 2 if guidance == 1 else 1], (2 * unit, 3 * unit), guidance, STEPS),
        (texts, (3 * unit, 2 * unit), 1.0, STEPS),
    )
    for captions, size, scale, steps in runs:
        seeds = [seed + index for index in range(len(captions))]
        latents = pipeline.sample_latents(captions, seed=seeds, steps=steps, guidance_scale=scale, size=size)
        if "vae_decoder" in wanted or "vae_encoder" in wanted:
            pipeline.encode(pipeline.decode(latents))
        calls = {name: recorder.calls for name, recorder in recorders.items()}
        if "unet" in wanted:
            # The start (pure noise) and one step on the way; then two timesteps in one batch, as a server would ask.
            steps_taken = calls["unet"]
            probes["unet"] += [steps_taken[0], steps_taken[max(1, len(steps_taken) - 2)]]
            if scale != 1.0:
                probes["unet"].append(_again(recorders["unet"], _joined(steps_taken[1], steps_taken[-1])))
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


def _joined(first: Probe, second: Probe) -> Arrays:
    return {name: np.concatenate([first.inputs[name], second.inputs[name]]) for name in first.inputs}


def _again(recorder: Recorder, inputs: Arrays) -> Probe:
    return Probe(inputs, {name: np.array(value) for name, value in recorder.engine.run(inputs).items()})
