"""An engine in OpenVINO, on the CPU."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import EngineError

# What an engine of a precision computes in where it is not told otherwise node by node. Left alone, OpenVINO runs an
# fp32 graph in bf16 on a CPU that has it. In int8 it is the graph's Q/DQ that says which nodes are.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32", "w8": "f32", "w4": "f32"}
NEEDS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
ARITHMETIC = frozenset({"Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul"})
NAMES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
# With its sizes known OpenVINO fuses element-wise chains and plans where all is kept: a U-Net of 71 M parameters on
# two Zen 4 cores has 1.15 times the speed in INT8, 1.13 in bf16 and 1.09 in fp32, for 2.4 s of compiling.
FIXED = 4

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class OpenVinoEngine:
    """`<name>.xml` with its weights beside it. `threads` None leaves the number to OpenVINO.

    `rest`: what the nodes of an int8 engine that are not int8 compute in, "fp32" or "bf16"; where the CPU has no bf16
    they compute in fp32, which is finer. `profiled` counts the time of every node, see `profile`.
    The first `FIXED` shapes of inputs each get a graph of their own, compiled in their first call; further ones share
    one with free axes. What OpenVINO compiled for this CPU is kept in the folder `compiled` and taken from there the
    next time. Raises `EngineError` if the file cannot be compiled, the CPU lacks the precision, or what was compiled
    does not compute in it.
    """

    def __init__(
        self,
        path: Path,
        *,
        precision: str = "fp32",
        rest: str | None = None,
        threads: int | None = None,
        compiled: Path | None = None,
        profiled: bool = False,
        fixed: int = FIXED,
    ) -> None:
        import openvino

        self.path = Path(path)
        self._core = openvino.Core()
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        narrowed = precision == "int8" and rest == "bf16" and NEEDS["bf16"] in capabilities
        hint = HINTS["bf16"] if narrowed else HINTS[precision]
        if NEEDS[hint] not in capabilities:
            raise EngineError(
                f"engine {path.stem} computes in {precision}, which this CPU does not have "
                f"(it has {', '.join(capabilities)}); choose another variant"
            )
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
        }
        if profiled:
            self._options["PERF_COUNT"] = "YES"
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        if compiled is not None:
            self._options["CACHE_DIR"] = str(compiled)
        self.precision = precision
        self._lock, self._local = threading.Lock(), threading.local()
        self._fixed = fixed
        try:
            self._graphs: dict[Shapes | None, Any] = {None: self._compile(None)}  # None: the one with free axes
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot open {path}: {_reason(error)}; build the engine again") from None
        self.outputs = [output.any_name for output in self._graphs[None].outputs]
        self.from_cache = bool(self._graphs[None].get_property("LOADED_FROM_CACHE"))

    def _compile(self, shapes: Shapes | None) -> Any:
        if shapes is None:
            graph = self._core.compile_model(str(self.path), "CPU", self._options)
        else:
            model = self._core.read_model(self.path)
            model.reshape({name: list(shape) for name, shape in shapes})
            self._graphs.pop(None, None)  # it would hold the weights once more
            graph = self._core.compile_model(model, "CPU", self._options)
        hint = self._options["INFERENCE_PRECISION_HINT"]
        asked = graph.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if asked != hint:
            raise EngineError(
                f"engine {self.path.stem} was to compute in {hint}, OpenVINO says {asked}; report this as a bug"
            )
        return graph

    def _prepare(self, shapes: Shapes) -> Shapes | None:
        """Compile what inputs of these shapes need; returns its key in `_graphs`."""
        with self._lock:
            if shapes in self._graphs:
                return shapes
            if len(self._graphs.keys() - {None}) < self._fixed:
                self._graphs[shapes] = self._compile(shapes)
                return shapes
            if None not in self._graphs:
                self._graphs[None] = self._compile(None)
            return None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises `EngineError` with OpenVINO's own reason. May be called from several threads."""
        shapes = tuple((name, value.shape) for name, value in sorted(feeds.items()))
        requests = self._local.__dict__.setdefault("requests", {})
        try:
            key = shapes if shapes in requests else self._prepare(shapes)
            if key not in requests:
                requests[key] = self._graphs[key].create_infer_request()
            self._local.request = requests[key]
            found = self._local.request.infer(dict(feeds), share_inputs=True)
        except (RuntimeError, TypeError, ValueError) as error:
            given = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in feeds.items())
            raise EngineError(f"engine {self.path.name} failed: {_reason(error)}; it was given {given}") from None
        return {name: np.array(found[name]) for name in self.outputs}

    def profile(self) -> list[tuple[str, str, str, float]]:
        """(name, kind, kernel, milliseconds) of every node that ran in this thread's last call of a `profiled` engine.

        No part has a space in it.
        """
        return [
            (
                node.node_name.replace(" ", "_"),
                node.node_type,
                node.exec_type.replace(" ", "_"),
                node.real_time / timedelta(milliseconds=1),
            )
            for node in self._local.request.get_profiling_info()
            if node.status == node.Status.EXECUTED
        ]

    def precision_found(self) -> dict[str, int]:
        """How many nodes that multiply matrices or convolve run in which precision, read from the compiled model."""
        found: Counter[str] = Counter()
        for node in next(iter(self._graphs.values())).get_runtime_model().get_ops():
            information = node.get_rt_info()
            kind = information["layerType"].astype(str) if "layerType" in information else ""
            if kind in ARITHMETIC:
                precision = information["runtimePrecision"].astype(str)
                found[NAMES.get(precision, precision)] += 1
        return dict(sorted(found.items()))


def _reason(error: Exception) -> str:
    """OpenVINO ends its messages with what was wrong; the lines before say where in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
