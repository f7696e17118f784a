"""What values each activation takes over a calibration set: streamed, so memory does not grow with the samples."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import QuantizationError
from ldm_deploy.onnx_graph import load_model
from ldm_deploy.quantize.scheme import choose_range

BINS = 2048
CHUNK_BYTES = 2**28  # activations that are fetched from the engine in one run


@dataclass
class Histogram:
    counts: np.ndarray  # int64 (BINS,)
    edges: np.ndarray  # float64 (BINS + 1,)

    def add(self, values: np.ndarray) -> None:
        # Equal-width bins: direct indexing is several times faster than np.histogram.
        low, high = self.edges[0], self.edges[-1]
        index = ((values.ravel() - low) * (BINS / (high - low))).astype(np.int64)
        self.counts += np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)

    def range(self, method: str) -> tuple[float, float]:
        return choose_range(self.counts, self.edges, method)


def observe(
    model_path: Path, tensors: Sequence[str], samples: Iterable[Mapping[str, np.ndarray]], *, threads: int | None = None
) -> dict[str, Histogram]:
    """One histogram per activation named in `tensors`, over all `samples` (feeds of the model; read twice).

    The first pass finds the extremes inside the engine and returns scalars only. The second fetches activations, at
    most `CHUNK_BYTES` at a time, and counts. Raises `QuantizationError` for a value that is not finite, naming it.
    """
    with tempfile.TemporaryDirectory() as folder:
        extremes, sizes = _extremes(model_path, tensors, samples, Path(folder), threads)
        histograms = {
            name: Histogram(np.zeros(BINS, np.int64), np.linspace(low, high if high > low else low + 1e-6, BINS + 1))
            for name, (low, high) in extremes.items()
        }
        path, inputs = _with_outputs(model_path, tensors, Path(folder))
        session = _session(path, threads)
        chunks = _chunks([name for name in tensors if name not in inputs], sizes)
        for sample in samples:
            for name in inputs:
                histograms[name].add(sample[name])
            for chunk in chunks:
                for name, value in zip(chunk, session.run(chunk, dict(sample)), strict=True):
                    histograms[name].add(value)
    return histograms


def _extremes(
    model_path: Path,
    tensors: Sequence[str],
    samples: Iterable[Mapping[str, np.ndarray]],
    folder: Path,
    threads: int | None,
) -> tuple[dict[str, tuple[float, float]], dict[str, int]]:
    """Smallest and largest value of each tensor over all samples, and its largest size in bytes."""
    from onnx import TensorProto, helper

    model = load_model(model_path)
    names = []
    for tensor in tensors:
        for op, dtype in (
            ("ReduceMin", TensorProto.FLOAT),
            ("ReduceMax", TensorProto.FLOAT),
            ("Size", TensorProto.INT64),
        ):
            name = f"{tensor}__{op}"
            attributes: dict[str, Any] = {} if op == "Size" else {"keepdims": 0}
            model.graph.node.append(helper.make_node(op, [tensor], [name], **attributes))
            model.graph.output.append(helper.make_tensor_value_info(name, dtype, []))
            names.append(name)
    session = _session(_save(model, folder / "extremes.onnx"), threads)
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    sizes = np.zeros(len(tensors), np.int64)
    count = 0
    for sample in samples:
        values = session.run(names, dict(sample))
        small, large = np.array(values[0::3], np.float64), np.array(values[1::3], np.float64)
        bad = ~(np.isfinite(small) & np.isfinite(large))
        if bad.any():
            where = f", timestep {sample['timestep'].ravel().tolist()}" if "timestep" in sample else ""
            raise QuantizationError(
                f"activation {tensors[int(bad.argmax())]!r} is not finite on calibration sample {count}{where}; "
                "the fp32 model itself overflows there: repair it, or leave the sample out"
            )
        low, high = np.minimum(low, small), np.maximum(high, large)
        sizes = np.maximum(sizes, np.array(values[2::3], np.int64) * 4)
        count += 1
    if count == 0:
        raise QuantizationError(
            "the calibration set has no samples for this component; collect one, or give another file"
        )
    return {name: (low[i], high[i]) for i, name in enumerate(tensors)}, {
        name: int(sizes[i]) for i, name in enumerate(tensors)
    }


def _with_outputs(model_path: Path, tensors: Sequence[str], folder: Path) -> tuple[Path, list[str]]:
    """The model with `tensors` as outputs; those that are inputs already are returned by name."""
    from onnx import TensorProto, helper

    model = load_model(model_path)
    present = {value.name for value in (*model.graph.input, *model.graph.output)}
    for tensor in tensors:
        if tensor not in present:
            model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    inputs = {value.name for value in model.graph.input}
    return _save(model, folder / "activations.onnx"), [name for name in tensors if name in inputs]


def _save(model: Any, path: Path) -> Path:
    import onnx

    large = model.ByteSize() > 2**31 - 2**24
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)
    return path


def _session(path: Path, threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _chunks(tensors: Sequence[str], sizes: Mapping[str, int]) -> list[list[str]]:
    chunks: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        if chunks[-1] and filled + sizes[name] > CHUNK_BYTES:
            chunks.append([])
            filled = 0
        chunks[-1].append(name)
        filled += sizes[name]
    return chunks
