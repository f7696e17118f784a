"""A linear layer that is split computes what it computed; what is not that pattern stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_deploy.eval.parity import relative_error
from ldm_deploy.export.passes.split_linear import split_linear
from ldm_deploy.export.to_onnx import export_module
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

AXES = {"x": {0: "batch", 1: "tokens"}}


class Gated(nn.Module):
    """Parts of different widths, each with its own use."""

    def __init__(self, parts: tuple[int, ...] = (16, 16)) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(12, sum(parts))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.linear(x).split(self.parts, dim=-1)
        gate = torch.cat(others, -1)[..., : first.shape[-1]]
        return first * functional.gelu(gate)


class Chunked(Gated):
    """As diffusers writes it."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.linear(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class Read(Gated):
    """What is split is used whole as well."""

    def forward(self, x: Tensor) -> Tensor:
        whole = self.linear(x)
        value, gate = whole.chunk(2, dim=-1)
        return value * functional.gelu(gate) + whole.mean()


class Rows(Gated):
    """Split along another axis."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x).unflatten(-1, (2, 16)).transpose(-1, -2).split((6, 10), dim=-2)
        return first.mean() + second


class NoBias(Gated):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = (x @ self.linear.weight.T).chunk(2, dim=-1)
        return value * gate


def feeds(batch: int, tokens: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(tokens).standard_normal((batch, tokens, 12), np.float32)}


@pytest.mark.parametrize(
    ("module", "layers"),
    [(Chunked(), 2), (Gated(), 2), (Gated((8, 20, 4)), 3), (Read(), 1), (Rows(), 1), (NoBias(), 1)],
    ids=["chunk", "split", "unequal", "read", "rows", "no-bias"],
)
def test_the_result_is_the_same_at_other_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: nn.Module, layers: int
) -> None:
    torch.manual_seed(0)
    module = module.eval().requires_grad_(False)
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    export_module(module, feeds(2, 6), AXES, {"y": {}}, after, component="unet")
    with monkeypatch.context() as patch:
        patch.setattr("ldm_deploy.export.passes.split_linear.split_linear", lambda model: 0)
        export_module(module, feeds(2, 6), AXES, {"y": {}}, before, component="unet")
    kinds = [[node.op_type for node in onnx.load(str(path)).graph.node] for path in (before, after)]
    assert [one.count("MatMul") for one in kinds] == [1, layers]
    assert ("Split" in kinds[1]) == ("Split" in kinds[0] and layers == 1)
    sizes = [sum(np.prod(tensor.dims) for tensor in onnx.load(str(path)).graph.initializer) for path in (before, after)]
    assert abs(sizes[1] - sizes[0]) < 12  # no weight twice, none left behind
    engines = [OnnxRuntimeEngine(path, threads=1) for path in (before, after)]
    for size in ((1, 3), (3, 12), (2, 6)):
        plain, split = (engine.run(feeds(*size))["y"] for engine in engines)
        assert relative_error(plain, split) < 1e-6
    assert split_linear(onnx_ir.load(after)) == 0  # nothing is left to do


def test_an_axis_that_may_be_any_is_left_alone() -> None:
    """A file without shapes does not tell whether axis 2 is the last."""
    from onnx import TensorProto, helper

    def graph(axis: int) -> onnx_ir.Model:
        value, node = helper.make_tensor_value_info, helper.make_node
        made = helper.make_graph(
            [
                node("MatMul", ["x", "w"], ["p"]),
                node("Add", ["p", "b"], ["s"]),
                node("Split", ["s"], ["y", "z"], axis=axis, num_outputs=2),
            ],
            "graph",
            [value("x", TensorProto.FLOAT, None)],
            [value(name, TensorProto.FLOAT, None) for name in "yz"],
            [
                helper.make_tensor("w", TensorProto.FLOAT, [2, 4], range(8)),
                helper.make_tensor("b", TensorProto.FLOAT, [4], range(4)),
            ],
        )
        return onnx_ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))

    assert split_linear(graph(2)) == 0
    model = graph(-1)
    assert split_linear(model) == 1
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert {node.op_type for node in model.graph} == {"MatMul", "Add"}
