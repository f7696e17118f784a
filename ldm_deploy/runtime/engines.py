"""Engines: one component, ready to run. Every runtime has one class here with the same three things."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ldm_deploy.errors import EngineError

if TYPE_CHECKING:
    from ldm_deploy.runtime.bundle import EngineRecord


# What this version runs.
TARGETS = (
    "onnxruntime-cpu", "openvino-cpu", "onnxruntime-cuda", "tensorrt-cuda", "torch-tensorrt-cuda", "aoti-cuda",
)  # fmt: skip
# ONNX Runtime's names; TF32, on by default, has the mantissa of fp16.
PROVIDERS: dict[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}


@dataclass(frozen=True)
class TensorInfo:
    """Name, numpy dtype name, and shape with integers for fixed and names for symbolic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Engine(Protocol):
    """What the pipeline, the parity check and the latency harness need."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Named arrays in, named arrays out."""
        ...


ONNX_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(bool)": "bool",
}


class OnnxRuntimeEngine:
    """An ONNX file in ONNX Runtime, on the CPU or, `device` "cuda", on an NVIDIA GPU.

    `threads` None leaves the number to ONNX Runtime. `spinning`: worker threads wait busily between calls: faster
    for an application that runs nothing else, a nuisance where several engines share a machine. `profile_prefix`
    writes a kernel profile, whose path `end_profiling` returns. Raises `EngineError` if the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        spinning: bool = True,
        profile_prefix: Path | None = None,
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_prefix)
        _check_device(device, onnxruntime.get_available_providers(), Path(path))
        missing = _load_cuda_libraries() if device == "cuda" else ""
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS[device])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            reason = _first_line(error)
            raise EngineError(f"ONNX Runtime cannot open {path}: {reason}; build the engine again") from None
        # Without a GPU, or a library of CUDA, it goes on with the CPU.
        _check_device(device, self._session.get_providers(), Path(path), missing)
        self.path, self.device = Path(path), device
        self.inputs = [_info(value) for value in self._session.get_inputs()]
        self.outputs = [_info(value) for value in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises `EngineError` with ONNX Runtime's own first line."""
        try:
            values = self._session.run(None, dict(feeds))
        except Exception as error:
            given = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in feeds.items())
            raise EngineError(f"engine {self.path.name} failed: {_first_line(error)}; it was given {given}") from None
        return {info.name: value for info, value in zip(self.outputs, values, strict=True)}

    def close(self) -> None:
        """Give the memory back; the engine runs no more."""
        del self._session

    def end_profiling(self) -> Path:
        return Path(self._session.end_profiling())


def _load_cuda_libraries() -> str:
    """CUDA's libraries as pip installed them, where ONNX Runtime does not look by itself unless torch is imported
    first. Returns what it said of one that it cannot load."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()) as said:
        onnxruntime.preload_dlls()
    return next(iter(said.getvalue().splitlines()), "")


def _check_device(device: str, providers: list[str], path: Path, missing: str = "") -> None:
    if device == "cuda" and "CUDAExecutionProvider" not in providers:
        reason = f" ({missing})" if missing else ""
        raise EngineError(
            f"ONNX Runtime finds no NVIDIA GPU here for {path}{reason}; pip install 'ldm-deploy[gpu]' where there is "
            "one, or choose a variant for the CPU"
        )


def _info(value: Any) -> TensorInfo:
    return TensorInfo(value.name, ONNX_DTYPES.get(value.type, value.type), tuple(value.shape))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_supported(record: EngineRecord) -> None:
    """Raises `EngineError` for an engine of a runtime or device that this version does not have."""
    if f"{record.runtime}-{record.device}" not in TARGETS:
        raise EngineError(
            f"engine {record.id} is for {record.runtime} on {record.device}; this version runs {', '.join(TARGETS)}: "
            "choose another variant, or upgrade ldm_deploy"
        )


def open_engine(record: EngineRecord, root: Path, *, threads: int | None = None, spinning: bool = True) -> Engine:
    """Open an engine of a bundle in its runtime. Raises `EngineError` as `check_supported` and the engine do."""
    check_supported(record)
    path = root / record.files[0]
    if record.runtime == "openvino":
        from ldm_deploy.cache import user_cache
        from ldm_deploy.runtime.engine_openvino import OpenVinoEngine

        compiled = user_cache().compiled("openvino")
        return OpenVinoEngine(path, precision=record.precision, rest=record.rest, threads=threads, compiled=compiled)
    if record.runtime == "tensorrt":
        from ldm_deploy.runtime.engine_tensorrt import TensorRtEngine

        return TensorRtEngine([root / file for file in record.files], record.built_for or {})
    if record.runtime in ("aoti", "torch-tensorrt"):
        from ldm_deploy.runtime.engine_torch import TorchEngine

        inputs, outputs = ([value["name"] for value in values] for values in (record.inputs, record.outputs))
        return TorchEngine(path, record.runtime, inputs, outputs, record.built_for or {}, device=record.device)
    return OnnxRuntimeEngine(path, device=record.device, threads=threads, spinning=spinning)
