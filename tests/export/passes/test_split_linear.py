"""A linear layer that is split computes what it computed; what is not that pattern stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from ldm_deploy.eval.parity import relative_error
from ldm_deploy.export.passes.split_linear import split_linear
from ldm_deploy.export.to_onnx import export_module
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

CHANNELS = 6


def linear_and_split(
    parts: Sequence[int],
    *,
    axis: int = -1,
    swapped: bool = False,
    read: bool = False,
    bias: bool = True,
    sizes: bool = True,
    rank: int | None = 3,
) -> Any:
    """x (batch, tokens, 6) through a linear layer whose result is split into `parts`, an output each.

    `swapped`: the bias is the sum's first input. `read`: what is split is an output as well. `rank` None: no shapes.
    """
    width, rng = sum(parts), np.random.default_rng(0)
    names = [f"y{index}" for index in range(len(parts))]
    total = ["b", "p"] if swapped else ["p", "b"]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
        helper.make_node("Add" if bias else "Identity", total if bias else ["p"], ["s"], "sum"),
        helper.make_node("Split", ["s", "sizes"], names, "split", axis=axis)
        if sizes
        else helper.make_node("Split", ["s"], names, "split", axis=axis, num_outputs=len(parts)),
    ]
    weights = {
        "w": rng.standard_normal((CHANNELS, width), np.float32),
        "b": rng.standard_normal(width, np.float32),
        "sizes": np.array(parts, np.int64),
    }
    shape = None if rank is None else [None] * rank
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", TensorProto.FLOAT, shape)],
        [value(name, TensorProto.FLOAT, shape) for name in [*names, *(["s"] if read else [])]],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        value_info=[] if shape is None else [value("s", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (linear_and_split((4, 4)), 2),
        (linear_and_split((4, 4), sizes=False), 2),
        (linear_and_split((4, 4), axis=2), 2),
        (linear_and_split((5, 1, 3), swapped=True), 3),
        (linear_and_split((4, 4), axis=2, rank=None, sizes=False), 1),  # may be another axis than the last
        (linear_and_split((3, 2), axis=1), 1),
        (linear_and_split((4, 4), read=True), 1),
        (linear_and_split((4, 4), bias=False), 1),
        (linear_and_split((4, 4, 2), sizes=False), 1),  # ONNX makes the last part shorter
    ],
    ids=["sizes", "count", "axis", "unequal", "any-axis", "rows", "read", "no-bias", "rest"],
)
def test_the_result_is_the_same(tmp_path: Path, model: Any, layers: int) -> None:
    paths = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(model, str(paths[0]))
    changed = onnx_ir.load(paths[0])
    assert split_linear(changed) == (layers > 1)
    onnx_ir.save(changed, paths[1])
    graph = onnx.load(str(paths[1])).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMul") == layers
    assert ("Split" in kinds) == (layers == 1)
    if layers > 1:  # no weight twice, none left behind
        width = len(numpy_helper.to_array(model.graph.initializer[1]))
        assert sum(np.prod(tensor.dims) for tensor in graph.initializer) == (CHANNELS + 1) * width
    engines = [OnnxRuntimeEngine(path, threads=1) for path in paths]
    for batch in (1, 3):
        feeds = {"x": np.random.default_rng(batch).standard_normal((batch, 5, CHANNELS), np.float32)}
        plain, split = (engine.run(feeds) for engine in engines)
        assert plain.keys() == split.keys()
        assert all(relative_error(plain[name], split[name]) < 1e-6 for name in plain)
    assert split_linear(onnx_ir.load(paths[1])) == 0  # nothing is left to do


def test_the_exporter_knows_which_axis_is_the_last(tmp_path: Path) -> None:
    """Shapes are gone from the file; the layer of diffusers' feed-forward blocks is found all the same."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(CHANNELS, 8)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.linear(x).chunk(2, dim=-1)
            return value * functional.gelu(gate)

    torch.manual_seed(0)
    module, path = Gated().eval().requires_grad_(False), tmp_path / "gated.onnx"
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, CHANNELS), np.float32)}
    export_module(module, feeds, {"x": {0: "batch", 1: "tokens"}}, {"y": {}}, path, component="unet")
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert (kinds.count("MatMul"), kinds.count("Split")) == (2, 0)
    expected = module(torch.from_numpy(feeds["x"])).numpy()
    assert relative_error(expected, OnnxRuntimeEngine(path, threads=1).run(feeds)["y"]) < 1e-6
