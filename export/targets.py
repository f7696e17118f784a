"""The targets that engines are built for, a line each: runtime, precisions, how files are made and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Sizes = tuple[int, ...]
Shapes = Mapping[str, tuple[Sizes, Sizes, Sizes]]  # input -> the smallest, the usual and the largest it was proven on


@dataclass(frozen=True)
class Built:
    """An engine's files; what it needs of the machine, and which precisions it has, where the build tells that."""

    files: list[Path]
    built_for: dict[str, Any] | None = None
    precision_found: dict[str, int] | None = None


@dataclass(frozen=True)
class Target:
    """`build` makes engine files of an ONNX file, at a path without suffix; `precision_found` asks an opened engine."""

    runtime: str
    device: str
    versions: str  # of the runtime
    packages: tuple[str, ...]  # whose versions are recorded
    precisions: Mapping[str, str]  # precision of an engine -> what the runtime then computes in
    build: Callable[[Path, Path, Shapes], Built]
    precision_found: Callable[[Any], dict[str, int]] | None = None

    @property
    def name(self) -> str:
        return f"{self.runtime}-{self.device}"


def _to_onnxruntime(onnx: Path, stem: Path, shapes: Shapes) -> Built:
    from ldm_deploy.export.to_onnxruntime import to_onnxruntime

    return Built(to_onnxruntime(onnx, stem.parent))


def _found_in_onnxruntime(engine: Any) -> dict[str, int]:
    from ldm_deploy.onnx_graph import precision_found

    engine.close()  # it is opened once more, to see what becomes of the graph: not twice in memory
    return precision_found(engine.path)


def _to_openvino(onnx: Path, stem: Path, shapes: Shapes) -> Built:
    from ldm_deploy.export.to_openvino import to_openvino

    return Built(to_openvino(onnx, stem.with_name(f"{stem.name}.xml")))


def _to_tensorrt(onnx: Path, stem: Path, shapes: Shapes) -> Built:
    from ldm_deploy.export.tensorrt_rules import check_graph
    from ldm_deploy.export.to_tensorrt import to_tensorrt
    from ldm_deploy.onnx_graph import load_model

    check_graph(load_model(onnx), onnx.stem)
    plan = stem.with_name(f"{stem.name}.plan")
    found = to_tensorrt(onnx, plan, shapes)
    return Built([plan], **found)


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
# Checked against NVIDIA's bindings only: no engine was built and measured on a GPU yet.
_TENSORRT = Target(
    "tensorrt", "cuda", ">=10.13", ("tensorrt",), {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}, _to_tensorrt
)
TARGETS = {target.name: target for target in (_ORT, _OPENVINO, _TENSORRT)}
