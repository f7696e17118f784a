"""A small denoiser as an ONNX graph, written node by node: what quantization must cope with, without an exporter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 16


def tiny_denoiser() -> onnx.ModelProto:
    """Convolution, attention over pixels with constant projections, timestep Gemm, convolution; axes symbolic."""
    rng = np.random.default_rng(0)
    constants = {
        "first.weight": rng.standard_normal((CHANNELS, 4, 3, 3)) / 6,
        "first.bias": rng.standard_normal(CHANNELS),
        "middle.weight": rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / 12,
        "middle.bias": rng.standard_normal(CHANNELS),
        "time.weight": rng.standard_normal((CHANNELS, 1)) / 1000,
        "time.bias": rng.standard_normal(CHANNELS),
        "q.weight": rng.standard_normal((CHANNELS, CHANNELS)) / 4,
        "k.weight": rng.standard_normal((8, CHANNELS)) / 3,
        "v.weight": rng.standard_normal((8, CHANNELS)) / 3,
        "last.weight": rng.standard_normal((4, CHANNELS, 3, 3)) / 12,
        "last.bias": rng.standard_normal(4),
    }
    # Channels of very different size: per-tensor weight scales would lose the small ones.
    constants["middle.weight"] *= np.geomspace(0.05, 5, CHANNELS)[:, None, None, None]
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    initializers += [
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in (("axes1", [1]), ("axes23", [2, 3]), ("flat", [0, 0, -1]), ("tail", [-1]))
    ]
    padding = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["sample", "first.weight", "first.bias"], ["h0"], "first", **padding),
        helper.make_node("Cast", ["timestep"], ["t0"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["t0", "axes1"], ["t1"], "unsqueeze"),
        helper.make_node("Gemm", ["t1", "time.weight", "time.bias"], ["t2"], "time", transB=1),
        helper.make_node("Unsqueeze", ["t2", "axes23"], ["t3"], "unsqueeze2"),
        helper.make_node("Add", ["h0", "t3"], ["h1"], "add"),
        helper.make_node("Relu", ["h1"], ["h2"], "relu"),
        helper.make_node("Conv", ["h2", "middle.weight", "middle.bias"], ["h3"], "middle", **padding),
        helper.make_node("Reshape", ["h3", "flat"], ["h4"], "flatten"),
        helper.make_node("Transpose", ["h4"], ["h5"], "tokens", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["h5", "q.weight"], ["q"], "to_q"),
        helper.make_node("MatMul", ["encoder_hidden_states", "k.weight"], ["k"], "to_k"),
        helper.make_node("MatMul", ["encoder_hidden_states", "v.weight"], ["v"], "to_v"),
        helper.make_node("Transpose", ["k"], ["kt"], "transpose_k", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["attention"], "softmax", axis=-1),
        helper.make_node("MatMul", ["attention", "v"], ["attended"], "attend"),
        helper.make_node("Add", ["h5", "attended"], ["h6"], "residual"),
        helper.make_node("Transpose", ["h6"], ["h7"], "pixels", perm=[0, 2, 1]),
        helper.make_node("Shape", ["h3"], ["shape"], "shape"),
        helper.make_node("Reshape", ["h7", "shape"], ["h8"], "unflatten"),
        helper.make_node("Conv", ["h8", "last.weight", "last.bias"], ["prediction"], "last", **padding),
    ]
    values = [
        ("sample", TensorProto.FLOAT, ["batch", 4, "height", "width"]),
        ("timestep", TensorProto.INT64, ["batch"]),
        ("encoder_hidden_states", TensorProto.FLOAT, ["batch", "sequence", 8]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*value) for value in values],
        [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["batch", 4, "height", "width"])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def make_feeds(seed: int, batch: int = 1, height: int = 8, width: int = 12, sequence: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, 4, height, width), np.float32),
        "timestep": rng.integers(0, 1000, batch),
        "encoder_hidden_states": rng.standard_normal((batch, sequence, 8), np.float32),
    }


@pytest.fixture(scope="session")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("denoiser") / "unet-fp32.onnx"
    onnx.save(tiny_denoiser(), str(path))
    return path


@pytest.fixture(scope="session")
def samples() -> list[dict[str, np.ndarray]]:
    return [make_feeds(seed) for seed in range(12)]
