"""The targets that engines are built for, a line each: runtime, precisions, how files are made and read back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm_deploy.errors import ConfigError, StageMissingError
from ldm_deploy.export.traced import Traced, largest, proven_shapes


@dataclass(frozen=True)
class Built:
    """An engine's files; what it needs of the machine, and which precisions it has, where the build tells that."""

    files: list[Path]
    built_for: dict[str, Any] | None = None
    precision_found: dict[str, int] | None = None


@dataclass(frozen=True)
class Target:
    """`build` makes the files of an engine in a precision, at a path without suffix; `precision_found` asks an opened
    engine."""

    runtime: str
    device: str
    versions: str  # of the runtime
    packages: tuple[str, ...]  # whose versions are recorded
    precisions: Mapping[str, str]  # precision of an engine -> what the runtime then computes in
    build: Callable[[Traced, str, Path], Built]
    precision_found: Callable[[Any], dict[str, int]] | None = None
    from_module: bool = False  # made of the torch module, not of its ONNX graph

    @property
    def name(self) -> str:
        return f"{self.runtime}-{self.device}"


def _to_onnxruntime(traced: Traced, precision: str, stem: Path) -> Built:
    from ldm_deploy.export.to_onnxruntime import to_onnxruntime

    return Built(to_onnxruntime(traced.graph(precision), stem.parent))


def _found_in_onnxruntime(engine: Any) -> dict[str, int]:
    from ldm_deploy.onnx_graph import precision_found

    engine.close()  # it is opened once more, to see what becomes of the graph: not twice in memory
    return precision_found(engine.path, device=engine.device)


def _to_openvino(traced: Traced, precision: str, stem: Path) -> Built:
    from ldm_deploy.export.to_openvino import to_openvino

    return Built(to_openvino(traced.graph(precision), stem.with_name(f"{stem.name}.xml"), component=traced.component))


def _to_tensorrt(traced: Traced, precision: str, stem: Path, words: Sequence[str] = ()) -> Built:
    from ldm_deploy.export.tensorrt_rules import check_graph
    from ldm_deploy.export.to_tensorrt import read_options, to_tensorrt
    from ldm_deploy.onnx_graph import load_model

    onnx = traced.graph(precision)
    check_graph(load_model(onnx), onnx.stem)
    plan = stem.with_name(f"{stem.name}.plan")
    options = read_options(words)
    found = to_tensorrt(onnx, plan, proven_shapes(traced.probes), options)
    files = [plan]
    if options.strip_plan:  # the weights come from the graph when the plan is loaded
        for file in (onnx, onnx.with_name(f"{onnx.name}.data")):
            if file.exists():
                files.append(Path(shutil.copyfile(file, plan.with_name(file.name))))
    return Built(files, **found)


def _to_torch_tensorrt(traced: Traced, precision: str, stem: Path) -> Built:
    from ldm_deploy.export.to_torch_tensorrt import to_torch_tensorrt

    path, shapes = stem.with_name(f"{stem.name}.ep"), proven_shapes(traced.probes)
    module, inputs = traced.module_in(precision), largest(traced.probes).inputs
    found = to_torch_tensorrt(module, inputs, traced.axes[0], shapes, path, component=traced.component)
    return Built([path], **found)


def _to_aoti(traced: Traced, precision: str, stem: Path) -> Built:
    from ldm_deploy.export.to_aoti import to_aoti

    path, inputs = stem.with_name(f"{stem.name}.pt2"), largest(traced.probes).inputs
    found = to_aoti(traced.module_in(precision), inputs, traced.axes[0], path, component=traced.component)
    return Built([path], **found)


def _found_in_openvino(engine: Any) -> dict[str, int]:
    found: dict[str, int] = engine.precision_found()
    return found


# ONNX Runtime's CPU holds fp16 weights and computes in fp32: half the size, the same speed. It has no bf16 convolution.
_ORT = Target(
    "onnxruntime",
    "cpu",
    ">=1.22",
    ("onnxruntime",),
    {"fp32": "fp32", "fp16": "fp32"},
    _to_onnxruntime,
    _found_in_onnxruntime,
)
# Given fp16, OpenVINO's CPU plugin returned NaN for the shipped reference (2026.4, a CPU without fp16): not offered.
_OPENVINO = Target(
    "openvino", "cpu", ">=2025.2", ("openvino",), {"fp32": "fp32", "bf16": "bf16"}, _to_openvino, _found_in_openvino
)
_ALL = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
# Checked against NVIDIA's bindings only: no engine was built and measured on a GPU yet.
_TENSORRT = Target("tensorrt", "cuda", ">=10.13", ("tensorrt",), _ALL, _to_tensorrt)
_ORT_CUDA = Target(
    "onnxruntime",
    "cuda",
    ">=1.22",
    ("onnxruntime-gpu",),
    {"fp32": "fp32", "fp16": "fp16"},
    _to_onnxruntime,
    _found_in_onnxruntime,
)
_TORCH_TENSORRT = Target(
    "torch-tensorrt", "cuda", ">=2.11", ("torch-tensorrt",), _ALL, _to_torch_tensorrt, from_module=True
)
_AOTI = Target("aoti", "cuda", ">=2.11", ("torch",), _ALL, _to_aoti, from_module=True)
TARGETS = {target.name: target for target in (_ORT, _OPENVINO, _ORT_CUDA, _TENSORRT, _TORCH_TENSORRT, _AOTI)}


def choose_target(name: str, precision: str, options: Sequence[str] = ()) -> Target:
    """The target, with what it is told about building. Raises `StageMissingError` for a target or a precision of it
    that is not built, `ConfigError` for an option it does not have."""
    if name not in TARGETS:
        raise StageMissingError(f"target {name!r} is not built yet; there is: {', '.join(TARGETS)}")
    target = TARGETS[name]
    if precision not in target.precisions:
        raise StageMissingError(
            f"precision {precision!r} is not built for {name}; there is: {', '.join(target.precisions)}"
        )
    if not options:
        return target
    if target is not _TENSORRT:
        raise ConfigError(f"option {options[0]!r} is for tensorrt-cuda; {name} has none: leave it out")
    from ldm_deploy.export.to_tensorrt import read_options

    read_options(options)
    return replace(target, build=lambda traced, precision, stem: _to_tensorrt(traced, precision, stem, options))
