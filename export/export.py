"""A model goes in, a bundle of engines comes out, each compared with torch before it is accepted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.errors import ConfigError, EngineError, ExportError, StageMissingError
from ldm_deploy.export.targets import TARGETS, Built, Shapes, Target
from ldm_deploy.export.to_onnx import Axes, component_axes, export_module
from ldm_deploy.runtime.bundle import EngineRecord

if TYPE_CHECKING:
    from torch import nn

    from ldm_deploy.cache import Cache
    from ldm_deploy.eval.parity import ParityResult, Probe
    from ldm_deploy.export.half import HalfReport
    from ldm_deploy.models.sources import Source
    from ldm_deploy.onnx_graph import ValueInfo
    from ldm_deploy.runtime.bundle import Bundle

Ranges = Mapping[str, tuple[float, float]]


def export_source(
    source: str | Path,
    out: Path,
    *,
    variants: Sequence[tuple[str, str]] = (("fp32", "onnxruntime-cpu"),),
    components: Sequence[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    cache: Cache | None = None,
) -> Bundle:
    """Export a reference, a checkpoint of diffusers or "reference" (the shipped one) to the bundle directory `out`.

    `variants`: (precision, target) each; the bundle holds a variant `<precision>-<target>` for each. Every engine is
    compared with torch on real inputs at several batch sizes and resolutions; the inputs stay in the bundle under
    `probes/`, so that engines made from it later are judged on the same. What the first variant lacks raises
    (`ExportError`, `ParityError`); of the others it is in the bundle's `refused`, with the reason. `components`: only
    these (all); such a bundle holds no variant. `out` appears when complete. With a `cache`, what was exported before
    of the same bytes with the same options is taken from there, before the source is loaded.
    """
    from ldm_deploy.models.sources import resolve_source, source_digest

    chosen = [(precision, choose_target(target, precision)) for precision, target in variants]
    path = resolve_source(source)
    digest = source_digest(path)
    return through_cache(
        cache,
        out,
        " ".join([str(source), *(components or ()), *(f"{precision}-{target.name}" for precision, target in chosen)]),
        {"source": digest, "variants": variants, "components": components, "seed": seed},
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


def choose_target(name: str, precision: str) -> Target:
    """Raises `StageMissingError` for a target or a precision of it that is not built."""
    if name not in TARGETS:
        raise StageMissingError(f"target {name!r} is not built yet; there is: {', '.join(TARGETS)}")
    target = TARGETS[name]
    if precision not in target.precisions:
        raise StageMissingError(
            f"precision {precision!r} is not built for {name}; there is: {', '.join(target.precisions)}"
        )
    return target


@dataclass
class Traced:
    """A component on its way: the module, what it is judged on, and its graphs, one per precision, in `folder`."""

    module: nn.Module | None  # None once `release` was called
    probes: Sequence[Probe]
    axes: tuple[Axes, Axes]
    component: str
    ranges: Ranges
    folder: Path
    graphs: dict[str, Path] = field(default_factory=dict)
    reports: dict[str, HalfReport] = field(default_factory=dict)

    def graph(self, precision: str) -> Path:
        """The ONNX file in a precision, written when it is first asked for.

        A narrower one than fp32 is proven in torch first: on a CPU, engines may compute wider than the graph says and
        hide that a value overflows (`ParityError`).
        """
        if precision not in self.graphs:
            path = self.folder / f"{self.component}-{precision}.onnx"
            assert self.module is not None
            module = self.module if precision == "fp32" else self._narrow(self.module, precision)
            export_module(module, largest(self.probes).inputs, *self.axes, path, component=self.component)
            self.graphs[precision] = path
        return self.graphs[precision]

    def release(self) -> None:
        """Give the module's memory back: only graphs that are written already can be asked for from here."""
        self.module = None

    def _narrow(self, wide: nn.Module, precision: str) -> nn.Module:
        from ldm_deploy.eval.budget import load_budget
        from ldm_deploy.eval.parity import check_parity
        from ldm_deploy.export.half import to_half
        from ldm_deploy.models.torch_engine import TorchEngine

        samples = [probe.inputs for probe in self.probes]
        module, self.reports[precision] = to_half(wide, samples, self.axes[0], precision)
        engine = TorchEngine(self.component, module, (tuple(self.axes[0]), tuple(self.axes[1])))
        limit = load_budget(None).parity_limit(precision, self.component)
        check_parity(engine, self.probes, limit, component=self.component, name=f"{precision} in torch")
        return module


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
    graph = traced.graph(precision)
    built = target.build(graph, folder / stem, proven_shapes(traced.probes))
    record = engine_record(component, precision, target, built, staging)
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
    model = load_model(graph, weights=False)
    entry = describe_engine(
        record, staging, signature=read_signature(model), opset=read_opset(model), found=found, parity=parity,
        ranges=traced.ranges,
    )  # fmt: skip
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


def engine_record(component: str, precision: str, target: Target, built: Built, root: Path) -> EngineRecord:
    """What the runtime opens; its files lie in `root`."""
    return EngineRecord(
        id=f"{component}-{precision}-{target.name}",
        component=component,
        precision=precision,
        runtime=target.runtime,
        runtime_versions=target.versions,
        device=target.device,
        files=tuple(file.relative_to(root).as_posix() for file in built.files),
        built_for=built.built_for,
    )


def precision_of(target: Target, built: Built, engine: Any) -> Mapping[str, int]:
    """What the build told, else what the opened engine tells."""
    if built.precision_found is not None:
        return built.precision_found
    assert target.precision_found is not None
    return target.precision_found(engine)


def proven_shapes(probes: Sequence[Probe]) -> Shapes:
    """Of every input, axis by axis, the smallest and the largest size among the probes; usual is the first probe."""
    found = {}
    for name, value in probes[0].inputs.items():
        shapes = [probe.inputs[name].shape for probe in probes]
        found[name] = (tuple(map(min, *shapes)) if len(shapes) > 1 else value.shape, value.shape,
                       tuple(map(max, *shapes)) if len(shapes) > 1 else value.shape)  # fmt: skip
    return found


def describe_engine(
    record: EngineRecord,
    root: Path,
    *,
    signature: tuple[Sequence[ValueInfo], Sequence[ValueInfo]],
    opset: int,
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
    return {
        "input_ids": (0, model["text_encoder"]["vocab_size"] - 1),
        "timestep": (0, model["schedule"]["num_train_timesteps"] - 1),
        "image": (-1, 1),
    }


def largest(probes: Sequence[Probe]) -> Probe:
    """The probe to trace with: no symbolic axis may have length 1."""
    return max(probes, key=lambda probe: min(size for value in probe.inputs.values() for size in value.shape))


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
        "license", "conditioning", "prompts",
    )  # fmt: skip
    return {key: model.model[key] for key in kept if key in model.model}
