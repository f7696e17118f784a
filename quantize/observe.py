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
    channels: tuple[np.ndarray, np.ndarray] | None = None  # smallest and largest value of each, where it was asked for

    def add(self, values: np.ndarray) -> None:
        # Equal-width bins: direct indexing is several times faster than np.histogram.
        low, high = self.edges[0], self.edges[-1]
        index = ((values.ravel() - low) * (BINS / (high - low))).astype(np.int64)
        self.counts += np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)

    def range(self, method: str) -> tuple[float, float]:
        return choose_range(self.counts, self.edges, method)


def observe(
    model_path: Path,
    tensors: Sequence[str],
    samples: Iterable[Mapping[str, np.ndarray]],
    *,
    channels: Mapping[str, int] | None = None,
    threads: int | None = None,
) -> dict[str, Histogram]:
    """One histogram per activation named in `tensors`, over all `samples` (feeds of the model; read twice).

    `channels`: of these, by name, the rank; their second axis are channels, whose extremes are told apart.
    The first pass finds the extremes inside the engine. The second fetches activations, at most `CHUNK_BYTES` at a
    time, and counts. Raises `QuantizationError` for a value that is not finite, naming it.
    """
    with tempfile.TemporaryDirectory() as folder:
        extremes, sizes = _extremes(model_path, tensors, samples, channels or {}, Path(folder), threads)
        histograms = {}
        for name, (low, high) in extremes.items():
            least, most = float(low.min()), float(high.max())
            edges = np.linspace(least, most if most > least else least + 1e-6, BINS + 1)
            each = (low, high) if name in (channels or {}) else None
            histograms[name] = Histogram(np.zeros(BINS, np.int64), edges, each)
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
    channels: Mapping[str, int],
    folder: Path,
    threads: int | None,
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, int]]:
    """Smallest and largest value of each tensor, or of each of its `channels`, over all samples; its largest size in
    bytes."""
    from onnx import TensorProto, helper, numpy_helper

    model = load_model(model_path)
    for rank in set(channels.values()):
        axes = np.array([axis for axis in range(rank) if axis != 1], np.int64)
        model.graph.initializer.append(numpy_helper.from_array(axes, f"__all_but_channels_of_{rank}"))
    names = []
    for tensor in tensors:
        inputs = [tensor, *([f"__all_but_channels_of_{channels[tensor]}"] if tensor in channels else [])]
        for op in ("ReduceMin", "ReduceMax"):
            names.append(f"{tensor}__{op}")
            model.graph.node.append(helper.make_node(op, inputs, [names[-1]], keepdims=0))
            model.graph.output.append(helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, None))
        names.append(f"{tensor}__Size")
        model.graph.node.append(helper.make_node("Size", [tensor], [names[-1]]))
        model.graph.output.append(helper.make_tensor_value_info(names[-1], TensorProto.INT64, []))
    session = _session(_save(model, folder / "extremes.onnx"), threads)
    extremes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    sizes = dict.fromkeys(tensors, 0)
    count = 0
    for count, sample in enumerate(samples, 1):
        values = session.run(names, dict(sample))
        for tensor, small, large, size in zip(tensors, values[0::3], values[1::3], values[2::3], strict=True):
            if not (np.isfinite(small).all() and np.isfinite(large).all()):
                where = f", timestep {sample['timestep'].ravel().tolist()}" if "timestep" in sample else ""
                raise QuantizationError(
                    f"activation {tensor!r} is not finite on calibration sample {count - 1}{where}; "
                    "the fp32 model itself overflows there: repair it, or leave the sample out"
                )
            low, high = extremes.get(tensor, (np.inf, -np.inf))
            extremes[tensor] = np.minimum(low, small, dtype=np.float64), np.maximum(high, large, dtype=np.float64)
            sizes[tensor] = max(sizes[tensor], int(size) * 4)
    if count == 0:
        raise QuantizationError(
            "the calibration set has no samples for this component; collect one, or give another file"
        )
    return extremes, sizes


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
