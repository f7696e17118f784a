"""The component `pipeline`: a model goes in, a bundle with one engine that draws by itself comes out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.errors import ParityError, StageMissingError
from ldm_deploy.eval.parity import Probe, check_parity, write_probes
from ldm_deploy.export.export import describe_model, provenance, through_cache, value_ranges
from ldm_deploy.export.probes import make_probes
from ldm_deploy.export.targets import TARGETS, Target, choose_target
from ldm_deploy.export.to_onnx import component_axes
from ldm_deploy.export.to_single_graph import PARTS, to_single_graph
from ldm_deploy.export.traced import Traced

if TYPE_CHECKING:
    from ldm_deploy.cache import Cache
    from ldm_deploy.models.sources import Source
    from ldm_deploy.runtime.bundle import Bundle

LARGEST_DIFFERENCE = 1  # of 255, of an fp32 graph from the host's image


def export_pipeline(
    source: str | Path,
    out: Path,
    *,
    precision: str = "fp32",
    target: str = "onnxruntime-cpu",
    sampler: str | None = None,
    steps: int | None = None,
    options: Sequence[str] = (),
    seed: int = 0,
    threads: int | None = None,
    cache: Cache | None = None,
) -> Bundle:
    """Export the whole way to an image as one engine; `sampler` and `steps` (the model's own) are fixed in it.

    The engine's images are compared with those that torch draws with the same noise: in fp32 no pixel may differ by
    more than 1 of 255. Raises as `export_source`, and `ConfigError` for a sampler that draws noise on the way.
    """
    from ldm_deploy.models.sources import resolve_source, source_digest

    chosen = choose_target(target, precision, options)
    if chosen.from_module:
        there = ", ".join(name for name, entry in TARGETS.items() if not entry.from_module)
        raise StageMissingError(f"component pipeline is not built for {target}, which has no loop; there is: {there}")
    path = resolve_source(source)
    digest = source_digest(path)
    asked = {"pipeline": precision, "target": target, "sampler": sampler, "steps": steps, "seed": seed}
    return through_cache(
        cache,
        out,
        " ".join([f"{source} pipeline-{precision}-{target}", *options]),
        {"source": digest, "options": options, **asked},
        lambda directory: _export(path, digest, directory, precision, chosen, sampler, steps, seed, threads),
        threads=threads,
    )


def _export(
    source: Path,
    digest: str,
    out: Path,
    precision: str,
    target: Target,
    sampler: str | None,
    steps: int | None,
    seed: int,
    threads: int | None,
) -> None:
    from ldm_deploy.artifact import staged_directory
    from ldm_deploy.models.sources import load_source
    from ldm_deploy.progress import task
    from ldm_deploy.runtime.bundle import write_bundle
    from ldm_deploy.runtime.request import check_steps

    model = load_source(source)
    if "distilled" in model.model:
        raise StageMissingError(
            f"component pipeline is not built for {source}, a student of few steps; export its components, "
            "without --component"
        )
    sampling = {**model.model["sampling"]}
    sampling["sampler"] = sampling["sampler"] if sampler is None else sampler
    sampling["steps"] = check_steps(sampling["steps"] if steps is None else steps, model.schedule.num_train_timesteps)
    with staged_directory(out) as staging, task("exporting the pipeline", len(PARTS) + 3) as advance:
        parts = _parts(model, precision, staging / "traced", seed, threads, advance)
        probes = draw_probes(model, sampling, seed=seed, threads=threads)
        advance()
        from ldm_deploy.runtime.tokenizer import Tokenizer

        (staging / "tokenizer.json").write_text(model.tokenizer_text(), encoding="utf-8")
        graph = staging / "traced" / f"pipeline-{precision}.onnx"
        empty = Tokenizer(model.tokenizer_text(), model.model["context_length"]).encode([""])[0].tolist()
        to_single_graph(
            parts, graph, model=model.model, schedule=model.schedule, sampler=sampling["sampler"],
            steps=sampling["steps"], empty_ids=empty,
        )  # fmt: skip
        advance()
        engine = _engine(graph, probes, staging, precision, target, value_ranges(model.model), threads)
        advance()
        shutil.rmtree(staging / "traced")
        (staging / "probes").mkdir()
        write_probes(staging / "probes" / "pipeline.safetensors", probes)
        name = f"pipeline-{precision}-{target.name}"
        write_bundle(
            staging,
            {
                **provenance(model.model["name"], {"reference": digest}, [target]),
                "model": describe_model(model),
                "schedule": model.model["schedule"],
                "tokenizer": "tokenizer.json",
                "default_variant": name,
                "engines": [{**engine, "sampler": sampling["sampler"], "steps": sampling["steps"]}],
                "variants": [{"name": name, "engines": [engine["id"]], **sampling}],
                "refused": [],
            },
        )


def _parts(
    model: Source, precision: str, folder: Path, seed: int, threads: int | None, advance: Any
) -> dict[str, Path]:
    probes = make_probes(model, components=PARTS, seed=seed, threads=threads)
    modules, found = model.components(), {}
    for name in PARTS:
        axes = component_axes(name, model.model["downsampling"], model.signatures[name])
        found[name] = Traced(modules[name], probes[name], axes, name, {}, folder).graph(precision)
        advance()
    return found


def draw_probes(model: Source, sampling: dict[str, Any], *, seed: int, threads: int | None) -> list[Probe]:
    """Images that torch draws step by step on the host, with what the single graph needs to draw them, too.

    Two at once, then one of another size and with another guidance.
    """
    from ldm_deploy.export.probes import CAPTIONS
    from ldm_deploy.models.torch_engine import torch_pipeline
    from ldm_deploy.runtime.noise import gaussian_noise
    from ldm_deploy.runtime.request import latent_shape

    pipeline, unit = torch_pipeline(model, threads), model.model["size_multiple"]
    texts = (model.model.get("prompts", {}).get("report") or list(CAPTIONS))[:2]
    scale = sampling["guidance_scale"]
    probes = []
    for captions, size, guidance in (
        (texts, (2 * unit, 2 * unit), scale),
        (texts[:1], (3 * unit, 2 * unit), scale + 2),
    ):
        seeds = [seed + index for index in range(len(captions))]
        image = pipeline(
            captions, seed=seeds, size=size, guidance_scale=guidance, steps=sampling["steps"],
            sampler=sampling["sampler"],
        )  # fmt: skip
        inputs = {
            "input_ids": pipeline.tokenizer.encode(captions),
            "noise": gaussian_noise(seeds, latent_shape(model.model, size)),
            "guidance_scale": np.array(guidance, np.float32),
        }
        probes.append(Probe(inputs, {"image": image}))
    return probes


def _engine(
    graph: Path,
    probes: Sequence[Probe],
    staging: Path,
    precision: str,
    target: Target,
    ranges: dict[str, tuple[float, float]],
    threads: int | None,
) -> dict[str, Any]:
    from ldm_deploy.eval.budget import load_budget
    from ldm_deploy.export.export import describe_engine, engine_record, precision_of
    from ldm_deploy.onnx_graph import load_model, read_opset, read_signature
    from ldm_deploy.runtime.engines import open_engine

    (staging / "engines").mkdir()
    traced = Traced(None, probes, ({}, {}), "pipeline", ranges, graph.parent, {precision: graph})
    built = target.build(traced, precision, staging / "engines" / f"pipeline-{precision}")
    record = engine_record(traced, precision, target, built, staging)
    engine = open_engine(record, staging, threads=threads)
    limit = load_budget(None).parity_limit(precision, "pipeline")
    parity = check_parity(engine, probes, limit, component="pipeline", name=record.id)
    if precision == "fp32":
        worst = max(largest_difference(probe.outputs["image"], engine.run(probe.inputs)["image"]) for probe in probes)
        if worst > LARGEST_DIFFERENCE:
            raise ParityError(
                f"pipeline: engine {record.id} differs from the host's image by {worst} of 255 in a pixel, limit "
                f"{LARGEST_DIFFERENCE}; it is not used: compare the components one by one"
            )
    model = load_model(graph, weights=False)
    return describe_engine(
        record, staging, signature=read_signature(model), opset=read_opset(model),
        found=precision_of(target, built, engine), parity=parity, ranges={key: ranges[key] for key in ("input_ids",)},
    )  # fmt: skip


def largest_difference(first: np.ndarray, second: np.ndarray) -> int:
    """Of two uint8 images of the same shape, in levels of 255."""
    return int(np.abs(first.astype(np.int16) - second.astype(np.int16)).max())
