"""A reference goes in, a bundle of fp32 ONNX engines comes out, each compared with torch before it is accepted."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.errors import ConfigError, ExportError, StageMissingError
from ldm_deploy.onnx_graph import ValueInfo, load_model, precision_found, read_opset, read_signature

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ldm_deploy.eval.parity import ParityResult, Probe
    from ldm_deploy.models.reference import Reference
    from ldm_deploy.runtime.bundle import Bundle

Axes = Mapping[str, Mapping[int, str]]  # input or output name -> {dimension: its symbol}

OPSET = 20  # the first with Gelu; what the dynamo exporter writes without a conversion
EXTERNAL_DATA_BYTES = 2**31 - 2**24  # a protobuf holds less than 2 GiB; the graph itself needs some of it
RUNTIME_VERSIONS = ">=1.22"  # ONNX Runtime


def component_axes(component: str, downsampling: int) -> tuple[Axes, Axes]:
    """The symbolic axes of a component's inputs and outputs, as CONTRACTS.md names them."""
    image = {0: "batch", 2: "H", 3: "W"}
    latent = {0: "batch", 2: f"H/{downsampling}", 3: f"W/{downsampling}"}
    sample = {0: "batch", 2: "height", 3: "width"}
    tokens = {0: "batch", 1: "sequence"}
    table: dict[str, tuple[Axes, Axes]] = {
        "text_encoder": ({"input_ids": tokens}, {"encoder_hidden_states": tokens}),
        "unet": (
            {"sample": sample, "timestep": {0: "batch"}, "encoder_hidden_states": tokens},
            {"prediction": sample},
        ),
        "vae_encoder": ({"image": image}, {"latent_mean": latent, "latent_logvar": latent}),
        "vae_decoder": ({"latent": latent}, {"image": image}),
    }
    return table[component]


def value_ranges(model: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Closed intervals of the inputs and outputs that have one."""
    return {
        "input_ids": (0, model["text_encoder"]["vocab_size"] - 1),
        "timestep": (0, model["schedule"]["num_train_timesteps"] - 1),
        "image": (-1, 1),
    }


def export_module(
    module: nn.Module,
    inputs: Mapping[str, np.ndarray],
    input_axes: Axes,
    output_axes: Axes,
    path: Path,
    *,
    component: str,
) -> None:
    """Write `module` as ONNX.

    `inputs`: example arrays in the order of `module.forward`; every symbolic axis must be 2 or longer in them,
    because torch treats lengths of 0 and 1 as constants. `input_axes` and `output_axes` name the symbolic axes; an
    axis that the trace fixed, or tied to another one, raises `ExportError`. Weights beyond 2 GiB go to `<file>.data`.
    """
    import onnx_ir
    import torch

    from ldm_deploy.export.attention import written_out

    for name, axes in input_axes.items():
        for axis, symbol in axes.items():
            if inputs[name].shape[axis] < 2:
                raise ExportError(
                    f"{component}: example input {name!r} has length {inputs[name].shape[axis]} on axis {axis} "
                    f"({symbol}); give 2 or more, shorter ones are traced as constants"
                )
    dynamic = tuple(dict.fromkeys(input_axes.get(name, {}), torch.export.Dim.AUTO) for name in inputs)
    try:
        with _quiet_exporter(), written_out():
            program = torch.onnx.export(
                module,
                tuple(torch.from_numpy(value) for value in inputs.values()),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(output_axes),
                dynamic_shapes=dynamic,
            )
    except Exception as error:
        raise ExportError(
            f"{component}: torch.onnx.export failed: {_root_cause(error)}; "
            "rewrite the part of forward() that depends on tensor values or uses an operator without ONNX form"
        ) from error
    assert program is not None
    model = program.model
    _name_axes(model.graph.inputs, input_axes, "input", component)
    _name_axes(model.graph.outputs, output_axes, "output", component)
    _remove_traces(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None)


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost exception: the outer ones only say that some step failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _name_axes(values: Sequence[Any], axes: Axes, kind: str, component: str) -> None:
    """Give symbolic axes their names. Raises `ExportError` for one that is fixed or tied to another."""
    symbols: dict[str, str] = {}
    for value in values:
        shape = list(value.shape)
        for axis, symbol in axes.get(value.name, {}).items():
            found = shape[axis]
            if isinstance(found, int):
                raise ExportError(
                    f"{component}: axis {axis} ({symbol}) of {kind} {value.name!r} was fixed to {found} by the export; "
                    "forward() must not turn this size into a Python number"
                )
            other = symbols.setdefault(str(found), symbol)
            if other != symbol and kind == "input":
                raise ExportError(
                    f"{component}: axis {axis} ({symbol}) of {kind} {value.name!r} was tied to {other!r} by the "
                    "export; forward() only works where the two are equal"
                )
        value.shape = type(value.shape)([axes.get(value.name, {}).get(axis, size) for axis, size in enumerate(shape)])


def _remove_traces(model: Any) -> None:
    """Drop what the exporter notes about this machine (file paths, stack traces) and shapes in torch's own symbols."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch and onnxscript warn about their own innards; what matters is checked on the result."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def describe_engine(
    path: Path,
    root: Path,
    *,
    component: str,
    precision: str,
    parity: ParityResult,
    ranges: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    """The entry of bundle.json for an ONNX file: everything in it is read back from the file."""
    model = load_model(path, weights=False)
    files = [path, *(file for file in (path.with_name(f"{path.name}.data"),) if file.exists())]

    def with_range(value: ValueInfo) -> dict[str, Any]:
        return replace(value, range=ranges.get(value.name)).to_dict()

    inputs, outputs = read_signature(model)
    return {
        "id": f"{component}-{precision}-onnxruntime-cpu",
        "component": component,
        "precision": precision,
        "runtime": "onnxruntime",
        "runtime_versions": RUNTIME_VERSIONS,
        "device": "cpu",
        "built_for": None,
        "files": [file.relative_to(root).as_posix() for file in files],
        "inputs": [with_range(value) for value in inputs],
        "outputs": [with_range(value) for value in outputs],
        "size_bytes": sum(file.stat().st_size for file in files),
        "opset": read_opset(model),
        "precision_found": precision_found(path),
        "parity": parity.to_dict(),
    }


def export_reference(
    source: str | Path,
    out: Path,
    *,
    precision: str = "fp32",
    components: Sequence[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Bundle:
    """Export a reference directory (or "reference", the shipped one) to the bundle directory `out`.

    Every engine is compared with torch on real inputs at several batch sizes and resolutions (`ParityError`); the
    inputs stay in the bundle under `probes/`, so that engines made from it later are judged on the same. `components`
    None exports all four, and the bundle then holds the variant `fp32-onnxruntime-cpu`. `out` appears when complete.
    """
    from ldm_deploy.artifact import staged_directory, tool_versions
    from ldm_deploy.eval.budget import load_budget
    from ldm_deploy.eval.parity import check_parity, write_probes
    from ldm_deploy.export.probes import make_probes
    from ldm_deploy.models.components import component_modules
    from ldm_deploy.models.reference import load_reference, reference_digest
    from ldm_deploy.progress import task
    from ldm_deploy.runtime.bundle import read_bundle, write_bundle
    from ldm_deploy.runtime.engines import OnnxRuntimeEngine

    if precision != "fp32":
        raise StageMissingError(f"export precision {precision!r} is not built yet; there is: fp32")
    reference = load_reference(source)
    modules = component_modules(reference)
    wanted = list(modules) if components is None else list(components)
    for component in wanted:
        if component not in modules:
            raise ConfigError(f"component {component!r} is not in this model; there are: {', '.join(modules)}")
    budget, ranges = load_budget(None), value_ranges(reference.model)
    engines: list[dict[str, Any]] = []
    with staged_directory(out) as staging, task("exporting to ONNX", 1 + 2 * len(wanted)) as advance:
        probes = make_probes(reference, seed=seed, threads=threads)
        advance()
        (staging / "probes").mkdir()
        for component in wanted:
            path = staging / "engines" / f"{component}-{precision}.onnx"
            input_axes, output_axes = component_axes(component, reference.model["downsampling"])
            example = _largest(probes[component])
            export_module(modules[component], example.inputs, input_axes, output_axes, path, component=component)
            advance()
            engine = OnnxRuntimeEngine(path, threads=threads)
            limit = budget.parity_limit(precision, component)
            parity = check_parity(engine, probes[component], limit, component=component, name=path.stem)
            engines.append(
                describe_engine(path, staging, component=component, precision=precision, parity=parity, ranges=ranges)
            )
            write_probes(staging / "probes" / f"{component}.safetensors", probes[component])
            advance()
        shutil.copyfile(reference.tokenizer_path, staging / "tokenizer.json")
        complete = set(wanted) == set(modules)
        write_bundle(
            staging,
            _bundle_data(
                reference,
                engines,
                complete,
                reference_digest(reference.directory),
                tool_versions("ldm-deploy", "torch", "onnx"),
            ),
        )
    return read_bundle(out)


def _largest(probes: Sequence[Probe]) -> Probe:
    """The probe to trace with: no symbolic axis may have length 1."""
    return max(probes, key=lambda probe: min(size for value in probe.inputs.values() for size in value.shape))


def _bundle_data(
    reference: Reference, engines: list[dict[str, Any]], complete: bool, digest: str, versions: Mapping[str, str]
) -> dict[str, Any]:
    model, name = reference.model, "fp32-onnxruntime-cpu"
    kept = (
        "kind",
        "downsampling",
        "latent_channels",
        "scale_factor",
        "default_size",
        "size_multiple",
        "context_length",
    )
    variant = {"name": name, "engines": [engine["id"] for engine in engines], **model["sampling"]}
    return {
        "format": 1,
        "name": model["name"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "toolchain": {key.replace("-", "_"): version for key, version in versions.items()},
        "parents": {"reference": digest},
        "model": {key: model[key] for key in (*kept, "license", "conditioning", "prompts") if key in model},
        "schedule": model["schedule"],
        "tokenizer": "tokenizer.json",
        "default_variant": name if complete else None,
        "engines": engines,
        "variants": [variant] if complete else [],
        "refused": [],
    }
