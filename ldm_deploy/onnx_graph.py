"""Reading an ONNX file back: what it takes and returns, which axes are free, which precision its kernels have."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_deploy.errors import EngineError

# Node types that do the arithmetic a precision is about, as they are named in a graph that ONNX Runtime has optimized.
FLOAT_OPS = frozenset(
    {"Conv", "ConvTranspose", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Attention"}
    | {"MultiHeadAttention"}
)
INT8_OPS = frozenset(
    {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    | {"ConvInteger", "QAttention"}
)


@dataclass(frozen=True)
class ValueInfo:
    """One input or output: name, numpy dtype name, shape with integers for fixed and names for symbolic axes.

    `range` is the closed interval that values lie in, or None where nothing bounds them.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    range: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["shape"] = list(self.shape)
        data["range"] = None if self.range is None else list(self.range)
        return data


def read_signature(model: Any) -> tuple[list[ValueInfo], list[ValueInfo]]:
    """Inputs and outputs of an `onnx.ModelProto`, initializers left out."""
    import onnx

    def describe(value: Any) -> ValueInfo:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
        return ValueInfo(value.name, dtype, shape)

    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = [describe(value) for value in model.graph.input if value.name not in initializers]
    return inputs, [describe(value) for value in model.graph.output]


def read_opset(model: Any) -> int:
    """The opset of the default domain."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def load_model(path: Path, *, weights: bool = True) -> Any:
    """Parse an ONNX file. Raises `EngineError` if it is none."""
    import onnx

    try:
        return onnx.load(str(path), load_external_data=weights)
    except Exception as error:  # a protobuf DecodeError, an OSError, or onnx's own ValidationError
        raise EngineError(f"{path} is no readable ONNX file ({error}); build it again") from None


def optimized_model(path: Path, *, device: str = "cpu") -> Any:
    """The graph that ONNX Runtime really runs on this machine, all optimizations applied; weights left out."""
    import onnxruntime

    from ldm_deploy.runtime.engines import PROVIDERS

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns that an optimized file is for one machine: that is what we want
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_prepacking", "1")  # it is not to run
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        # Small file with the weights beside it: only the graph is read back.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS[device])
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise EngineError(f"ONNX Runtime cannot open {path}: {reason}; build the engine again") from None
        return load_model(Path(options.optimized_model_filepath), weights=False)


def count_precisions(model: Any) -> dict[str, int]:
    """How many nodes that multiply matrices or convolve run in which precision, as {"int8": 140, "fp32": 21}."""
    import onnx

    names = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found: Counter[str] = Counter()
    for node in nodes_of(model.graph):
        if node.op_type in INT8_OPS:
            found["int8"] += 1
        elif node.op_type in FLOAT_OPS:
            known = (types.get(name) for name in (*node.output, *node.input))
            found[next((names[kind] for kind in known if kind in names), "fp32")] += 1
    return dict(sorted(found.items()))


def precision_found(path: Path, *, device: str = "cpu") -> dict[str, int]:
    """`count_precisions` of the graph that ONNX Runtime makes of the file."""
    return count_precisions(optimized_model(path, device=device))


def nodes_of(graph: Any) -> Iterable[Any]:
    """All nodes, those of subgraphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)
            for subgraph in attribute.graphs:
                yield from nodes_of(subgraph)
