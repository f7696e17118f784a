"""The targets that engines are built for, a line each: runtime, precisions, how files are made and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """`build` makes engine files of an ONNX file, at a path without suffix; `precision_found` asks an opened engine."""

    runtime: str
    device: str
    versions: str  # of the runtime
    packages: tuple[str, ...]  # whose versions are recorded
    precisions: Mapping[str, str]  # precision of an engine -> what the runtime then computes in
    build: Callable[[Path, Path], list[Path]]
    precision_found: Callable[[Any], dict[str, int]]

    @property
    def name(self) -> str:
        return f"{self.runtime}-{self.device}"


def _copy(onnx: Path, stem: Path) -> list[Path]:
    """The file itself, with another name for its external data."""
    from ldm_deploy.export.to_onnx import copy_onnx

    return copy_onnx(onnx, stem.with_name(f"{stem.name}.onnx"))


def _found_in_onnxruntime(engine: Any) -> dict[str, int]:
    from ldm_deploy.onnx_graph import precision_found

    return precision_found(engine.path)


def _to_openvino(onnx: Path, stem: Path) -> list[Path]:
    from ldm_deploy.export.to_openvino import to_openvino

    return to_openvino(onnx, stem.with_name(f"{stem.name}.xml"))


def _found_in_openvino(engine: Any) -> dict[str, int]:
    found: dict[str, int] = engine.precision_found()
    return found


# ONNX Runtime's CPU holds fp16 weights and computes in fp32: half the size, the same speed. It has no bf16 convolution.
_ORT = Target(
    "onnxruntime", "cpu", ">=1.22", ("onnxruntime",), {"fp32": "fp32", "fp16": "fp32"}, _copy, _found_in_onnxruntime
)
# Given fp16, OpenVINO's CPU plugin returned NaN for the shipped reference (2026.4, a CPU without fp16): not offered.
_OPENVINO = Target(
    "openvino", "cpu", ">=2025.2", ("openvino",), {"fp32": "fp32", "bf16": "bf16"}, _to_openvino, _found_in_openvino
)
TARGETS = {target.name: target for target in (_ORT, _OPENVINO)}
