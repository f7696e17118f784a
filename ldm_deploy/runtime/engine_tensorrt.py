"""An engine in TensorRT: device buffers bound once per shape, replayed as a CUDA graph.

Never run on a GPU by its authors yet: see the support table in docs/export.md.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import EngineError
from ldm_deploy.runtime.cuda import check_gpu, checked, device_properties, runtime

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "UINT8": "uint8", "BOOL": "bool"}
Key = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class _Bound:
    """Buffers for one set of shapes: name -> (device pointer, host array), and the graph once it was captured."""

    buffers: dict[str, tuple[int, np.ndarray]]
    graph: Any = None


class TensorRtEngine:
    """`files`: the plan and, if it was stripped of its weights, the ONNX file that has them.

    `built_for`: what bundle.json says the engine needs; another TensorRT or GPU is refused by name before the plan is
    read. Raises `EngineError`.
    """

    device = "cuda"

    def __init__(self, files: Sequence[Path], built_for: Mapping[str, Any]) -> None:
        self.path = Path(files[0])
        trt = _import(self.path)
        check_built_for(self.path.stem, built_for, {"tensorrt": trt.__version__, **device_properties()})
        self._trt, self._cuda, self._lock = trt, runtime(), threading.Lock()
        self._log = trt.Logger(trt.Logger.ERROR)
        loader = trt.Runtime(self._log)
        if built_for.get("version_compatible"):
            loader.engine_host_code_allowed = True
        self._engine = loader.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            raise EngineError(f"TensorRT cannot load {self.path}; build the engine again on this machine")
        if len(files) > 1:
            self._refit(Path(files[1]))
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"engine {self.path.stem} finds no room on the GPU; close other programs")
        self._stream = checked(self._cuda.cudaStreamCreate())
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        given = trt.TensorIOMode.INPUT
        self.inputs = [name for name in names if self._engine.get_tensor_mode(name) == given]
        self.outputs = [name for name in names if name not in self.inputs]
        self._bound: dict[Key, _Bound] = {}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises `EngineError` for sizes outside of the engine's profile and for what CUDA reports."""
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise EngineError(f"engine {self.path.stem} needs the input {missing[0]!r}; given: {', '.join(feeds)}")
        with self._lock:
            bound = self._bind({name: feeds[name].shape for name in self.inputs})
            copy, kinds = self._cuda.cudaMemcpyAsync, self._cuda.cudaMemcpyKind
            for name in self.inputs:
                pointer, host = bound.buffers[name]
                np.copyto(host, feeds[name], casting="same_kind")
                checked(copy(pointer, host.ctypes.data, host.nbytes, kinds.cudaMemcpyHostToDevice, self._stream))
            self._launch(bound)
            for name in self.outputs:
                pointer, host = bound.buffers[name]
                checked(copy(host.ctypes.data, pointer, host.nbytes, kinds.cudaMemcpyDeviceToHost, self._stream))
            checked(self._cuda.cudaStreamSynchronize(self._stream))
            return {name: bound.buffers[name][1].copy() for name in self.outputs}

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> _Bound:
        key = tuple(sorted(shapes.items()))
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                smallest, _, largest = self._engine.get_tensor_profile_shape(name, 0)
                raise EngineError(
                    f"engine {self.path.stem} was given {name} of shape {shape}; it was built for "
                    f"{tuple(smallest)} to {tuple(largest)}: ask for another size, or build it for more"
                )
        if key not in self._bound:
            buffers = {}
            for name in (*self.inputs, *self.outputs):
                kind = self._engine.get_tensor_dtype(name).name
                if kind not in DTYPES:
                    raise EngineError(f"engine {self.path.stem} has {name} of type {kind}, which numpy lacks")
                host = np.empty(tuple(self._context.get_tensor_shape(name)), DTYPES[kind])
                buffers[name] = (int(checked(self._cuda.cudaMalloc(max(1, host.nbytes)))), host)
            self._bound[key] = _Bound(buffers)
        for name, (pointer, _) in self._bound[key].buffers.items():
            self._context.set_tensor_address(name, pointer)
        return self._bound[key]

    def _launch(self, bound: _Bound) -> None:
        """The first run of a shape is plain, as TensorRT asks for, and then recorded; later ones are replayed."""
        cuda, stream = self._cuda, self._stream
        if bound.graph is None:
            self._execute()
            checked(cuda.cudaStreamSynchronize(stream))
            checked(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
            self._execute()
            bound.graph = checked(cuda.cudaGraphInstantiate(checked(cuda.cudaStreamEndCapture(stream)), 0))
        else:
            checked(cuda.cudaGraphLaunch(bound.graph, stream))

    def _execute(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise EngineError(f"engine {self.path.stem} failed on the GPU; choose another variant")

    def _refit(self, onnx: Path) -> None:
        trt = self._trt
        refitter = trt.Refitter(self._engine, self._log)
        if (
            not trt.OnnxParserRefitter(refitter, self._log).refit_from_file(str(onnx))
            or not refitter.refit_cuda_engine()
        ):
            raise EngineError(f"the weights in {onnx} do not fit the plan {self.path}; build the engine again")


def check_built_for(name: str, needs: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Raises `EngineError` naming what differs. `found`: tensorrt, gpu and compute_capability of this machine."""
    version = needs.get("version_compatible"), needs.get("tensorrt"), found["tensorrt"]
    if version[1] != version[2] and not (version[0] and _version(version[2]) >= _version(str(version[1]))):
        raise EngineError(
            f"engine {name} was built with TensorRT {version[1]} and {version[2]} is installed; "
            "build it again here, or choose the portable variant"
        )
    check_gpu(name, needs, found)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdecimal())


def _import(path: Path) -> Any:
    try:
        import tensorrt
    except ImportError as error:
        raise EngineError(
            f"engine {path.stem} needs TensorRT, which is not installed ({error}); "
            "pip install 'ldm-deploy[tensorrt]', or choose another variant"
        ) from None
    return tensorrt
