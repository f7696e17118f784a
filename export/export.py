"""A model goes in, a bundle of engines comes out, each compared with torch before it is accepted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.errors import ConfigError, EngineError, ExportError
from ldm_deploy.export.targets import Built, Target, choose_target
from ldm_deploy.export.to_onnx import component_axes
from ldm_deploy.export.traced import Ranges, Traced, read_module
from ldm_deploy.runtime.bundle import EngineRecord

if TYPE_CHECKING:
    from ldm_deploy.cache import Cache
    from ldm_deploy.eval.parity import ParityResult
    from ldm_deploy.models.sources import Source
    from ldm_deploy.onnx_graph import ValueInfo
    from ldm_deploy.runtime.bundle import Bundle


def export_source(
    source: str | Path,
    out: Path,
    *,
    variants: Sequence[tuple[str, str]] = (("fp32", "onnxruntime-cpu"),),
    components: Sequence[str] | None = None,
    options: Sequence[str] = (),
    seed: int = 0,
    threads: int | None = None,
    cache: Cache | None = None,
) -> Bundle:
    """Export a reference, a checkpoint of diffusers or "reference" (the shipped one) to the bundle directory `out`.

    `variants`: (precision, target) each; the bundle holds a variant `<precision>-<target>` for each. Every engine is
    compared with torch on real inputs at several batch sizes and resolutions; the inputs stay in the bundle under
    `probes/`, so that engines made from it later are judged on the same. What the first variant lacks raises
    (`ExportError`, `ParityError`); of the others it is in the bundle's `refused`, with the reason. `components`: only
    these (all); such a bundle holds no variant. `options`: of the target, see `to_tensorrt.read_options`. `out` appears
    when complete. With a `cache`, what was exported before of the same bytes with the same options is taken from there,
    before the source is loaded.
    """
    from ldm_deploy.models.sources import resolve_source, source_digest

    chosen = [(precision, choose_target(target, precision, options)) for precision, target in variants]
    path = resolve_source(source)
    digest = source_digest(path)
    return through_cache(
        cache,
        out,
        " ".join([str(source), *(components or ()), *("-".join(variant) for variant in variants), *options]),
        {"source": digest, "variants": variants, "components": components, "options": options, "seed": seed},
        lambda directory: _export(path, digest, directory, chosen, components, seed, threads),
        threads=threads,
    )


def through_cache(
    cache: Cache | None,
    out: Path,
    about: str,
    ingredients: Mapping[str, Any],
    build: Callable[[Path], object],
    *,
    threads: int | None,
) -> Bundle:
    """The bundle at `out`: built, or what the cache has of the same ingredients, tools and machine."""
    from ldm_deploy.cache import made_with
    from ldm_deploy.eval.machine import machine
    from ldm_deploy.runtime.bundle import read_bundle

    found = False
    if cache is None:
        build(out)
    else:
        # What a CPU can run is part of what is exported: the machine is in the key.
        local = made_with(threads, machine(threads)["fingerprint"])
        found = cache.fill(out, about, {**ingredients, **local}, build)
    return read_bundle(out, check_digests=not found)


def _export(
    source: Path,
    digest: str,
    out: Path,
    chosen: Sequence[tuple[str, Target]],
    components: Sequence[str] | None,
    seed: int,
    threads: int | None,
) -> None:
    from ldm_deploy.artifact import staged_directory
    from ldm_deploy.eval.parity import write_probes
    from ldm_deploy.export.probes import make_probes
    from ldm_deploy.models.sources import load_source
    from ldm_deploy.progress import task
    from ldm_deploy.runtime.bundle import write_bundle

    model = load_source(source)
    modules = model.components()
    wanted = list(modules) if components is None else list(components)
    for component in wanted:
        if component not in modules:
            raise ConfigError(f"component {component!r} is not in this model; there are: {', '.join(modules)}")
    with staged_directory(out) as staging, task("exporting", 1 + len(wanted) * len(chosen)) as advance:
        probes = make_probes(model, components=wanted, seed=seed, threads=threads)
        advance()
        (staging / "tokenizer.json").write_text(model.tokenizer_text(), encoding="utf-8")
        (staging / "probes").mkdir()
        engines: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        for component in wanted:
            write_probes(staging / "probes" / f"{component}.safetensors", probes[component])
            axes = component_axes(component, model.model["downsampling"], model.signatures[component])
            ranges, folder = value_ranges(model.model), staging / "traced"
            folder.mkdir()
            traced = Traced(modules[component], probes[component], axes, component, ranges, folder)
            for precision, target in chosen:
                try:
                    engines.append(build_engine(traced, staging, precision=precision, target=target, threads=threads))
                except (EngineError, ExportError) as error:
                    if (precision, target) == chosen[0]:
                        raise
                    refused.append(refusal(component, precision, target, str(error)))
                advance()
            shutil.rmtree(folder)
        complete = set(wanted) == set(modules)
        drawn = _variants(chosen, engines, model.model["sampling"]) if complete else []
        write_bundle(
            staging,
            {
                **provenance(model.model["name"], {"reference": digest}, [target for _, target in chosen]),
                "model": describe_model(model),
                "schedule": model.model["schedule"],
                "tokenizer": "tokenizer.json",
                "default_variant": drawn[0]["name"] if drawn else None,
                "engines": engines,
                "variants": drawn,
                "refused": refused,
            },
        )


def build_engine(
    traced: Traced, staging: Path, *, precision: str, target: Target, threads: int | None
) -> dict[str, Any]:
    """Build, open, compare: the entry of bundle.json for one engine.

    Raises `ExportError` where the graph cannot be built, `EngineError` where the engine cannot run here, and
    `ParityError` where it is not the module. No file is left of what failed.
    """
    from ldm_deploy.eval.budget import load_budget
    from ldm_deploy.eval.parity import check_parity
    from ldm_deploy.onnx_graph import load_model, read_opset, read_signature
    from ldm_deploy.runtime.engines import open_engine

    component, stem = traced.component, f"{traced.component}-{precision}"
    folder = staging / "engines"
    folder.mkdir(exist_ok=True)
    built = target.build(traced, precision, folder / stem)
    record = engine_record(traced, precision, target, built, staging)
    try:
        engine = open_engine(record, staging, threads=threads)
        limit = load_budget(None).parity_limit(precision, component)
        parity = check_parity(engine, traced.probes, limit, component=component, name=record.id)
        found = precision_of(target, built, engine)
        computes = target.precisions[precision]
        if found and computes not in found:
            raise ExportError(f"{component}: engine {record.id} computes nothing in {computes} (read back: {found})")
    except (EngineError, ExportError):
        for file in built.files:
            file.unlink()
        raise
    signature, opset = read_module(traced), None
    if not target.from_module:
        model = load_model(traced.graph(precision), weights=False)
        signature, opset = read_signature(model), read_opset(model)
    entry = describe_engine(
        record, staging, signature=signature, opset=opset, found=found, parity=parity, ranges=traced.ranges
    )
    report = traced.reports.get(precision)
    return entry if report is None else {**entry, "narrowed": report.to_dict()}


def refusal(component: str, precision: str, target: Target, reason: str) -> dict[str, Any]:
    """An entry of a bundle's `refused`: what was tried, and why it is not there."""
    return {
        "name": f"{component}-{precision}-{target.name}",
        "component": component,
        "runtime": target.runtime,
        "device": target.device,
        "precision": precision,
        "reason": reason,
    }


def _variants(
    chosen: Sequence[tuple[str, Target]], engines: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One per (precision, target) that has an engine for every component."""
    components = {engine["component"] for engine in engines}
    found = []
    for precision, target in chosen:
        ending = f"-{precision}-{target.name}"
        own = [engine["id"] for engine in engines if engine["id"] == engine["component"] + ending]
        if len(own) == len(components):
            found.append({"name": ending[1:], "engines": own, **sampling})
    return found


def engine_record(traced: Traced, precision: str, target: Target, built: Built, root: Path) -> EngineRecord:
    """What the runtime opens; its files lie in `root`."""
    return EngineRecord(
        id=f"{traced.component}-{precision}-{target.name}",
        component=traced.component,
        precision=precision,
        runtime=target.runtime,
        runtime_versions=target.versions,
        device=target.device,
        files=tuple(file.relative_to(root).as_posix() for file in built.files),
        built_for=built.built_for,
        inputs=tuple({"name": name} for name in traced.probes[0].inputs),
        outputs=tuple({"name": name} for name in traced.probes[0].outputs),
    )


def precision_of(target: Target, built: Built, engine: Any) -> Mapping[str, int]:
    """What the build told, else what the opened engine tells."""
    if built.precision_found is not None:
        return built.precision_found
    assert target.precision_found is not None
    return target.precision_found(engine)


def describe_engine(
    record: EngineRecord,
    root: Path,
    *,
    signature: tuple[Sequence[ValueInfo], Sequence[ValueInfo]],
    opset: int | None,
    found: Mapping[str, int],
    parity: ParityResult,
    ranges: Ranges,
) -> dict[str, Any]:
    """The entry of bundle.json for an engine. `found`: precisions read back from what really runs."""

    def with_range(value: ValueInfo) -> dict[str, Any]:
        return replace(value, range=ranges.get(value.name)).to_dict()

    return {
        "id": record.id,
        "component": record.component,
        "precision": record.precision,
        "runtime": record.runtime,
        "runtime_versions": record.runtime_versions,
        "device": record.device,
        "built_for": record.built_for,
        "files": list(record.files),
        "inputs": [with_range(value) for value in signature[0]],
        "outputs": [with_range(value) for value in signature[1]],
        "size_bytes": sum((root / file).stat().st_size for file in record.files),
        "opset": opset,
        "precision_found": dict(found),
        "parity": parity.to_dict(),
    }


def value_ranges(model: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Closed intervals of the inputs and outputs that have one."""
    low, high = model.get("distilled", {}).get("guidance_range") or (0, 0)
    return {
        "input_ids": (0, model["text_encoder"]["vocab_size"] - 1),
        "timestep": (0, model["schedule"]["num_train_timesteps"] - 1),
        "image": (-1, 1),
        **({"guidance_scale": (low, high)} if low < high else {}),
    }


def provenance(name: str, parents: Mapping[str, str], targets: Sequence[Target]) -> dict[str, Any]:
    """What bundle.json says of where a bundle comes from."""
    from ldm_deploy.artifact import tool_versions

    versions = tool_versions(
        "ldm-deploy", "torch", "onnx", *(package for target in targets for package in target.packages)
    )
    return {
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "toolchain": {key.replace("-", "_"): version for key, version in versions.items()},
        "parents": dict(parents),
    }


def describe_model(model: Source) -> dict[str, Any]:
    """What bundle.json says of the model."""
    kept = (
        "kind", "downsampling", "latent_channels", "scale_factor", "default_size", "size_multiple", "context_length",
        "license", "conditioning", "prompts", "distilled",
    )  # fmt: skip
    return {key: model.model[key] for key in kept if key in model.model}
