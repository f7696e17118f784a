"""Attention in one node computes what it computed written out; what is not that pattern stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_deploy.eval.parity import relative_error
from ldm_deploy.export.passes.fused_attention import fuse_attention
from ldm_deploy.export.to_onnx import export_module
from ldm_deploy.models.layers import Attention
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

AXES = {"x": {0: "batch", 1: "tokens"}, "context": {0: "batch", 1: "words"}}


class Block(nn.Module):
    """Self-attention and attention to a context, with another number of heads and a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = Attention(24, 8), Attention(24, 4, context_channels=10, bias=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.own(x)
        return x + self.cross(x, context) * 2


class Masked(Block):
    """Causal: every token sees those before it only."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Attention(24, 8, causal=True)


class Sharpened(Block):
    """The softmax is used twice, so that it must stay."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.own.to_q(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        weights = torch.softmax(q @ q.transpose(-1, -2) * 0.3, dim=-1)
        return (weights @ q).transpose(1, 2).flatten(2) + weights.sum() + 0 * context.sum()


class Scaled(Block):
    """A scale that is not one over the root of the channels."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.own.to_q(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        k = self.cross.to_k(context).unflatten(-1, (-1, 8)).transpose(1, 2)
        v = self.cross.to_v(context).unflatten(-1, (-1, 8)).transpose(1, 2)
        return functional.scaled_dot_product_attention(q, k, v, scale=0.9).transpose(1, 2).flatten(2)


def feeds(batch: int, tokens: int, words: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    return {
        "x": rng.standard_normal((batch, tokens, 24), np.float32),
        "context": rng.standard_normal((batch, words, 10), np.float32),
    }


@pytest.mark.parametrize(("kind", "expected"), [(Block, 2), (Masked, 1), (Sharpened, 0), (Scaled, 1)])
def test_the_result_is_the_same_at_other_sizes(tmp_path: Path, kind: type[nn.Module], expected: int) -> None:
    torch.manual_seed(0)
    module = kind().eval().requires_grad_(False)
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    export_module(module, feeds(2, 6, 5), AXES, {"y": {}}, before, component="unet")
    model = onnx_ir.load(before)
    assert fuse_attention(model) == expected
    onnx_ir.save(model, after)
    kinds = [node.op_type for node in onnx_ir.load(after).graph]
    assert kinds.count("MultiHeadAttention") == expected
    if expected == 2:
        assert "Softmax" not in kinds
        assert "Transpose" not in kinds
    engines = [OnnxRuntimeEngine(path, threads=1) for path in (before, after)]
    for sizes in ((1, 3, 7), (3, 12, 2), (2, 6, 5)):
        plain, fused = (engine.run(feeds(*sizes))["y"] for engine in engines)
        assert relative_error(plain, fused) < 1e-6
    assert fuse_attention(onnx_ir.load(after)) == 0  # nothing is left to do


def test_attention_inside_a_loop_is_found(tmp_path: Path) -> None:
    """As in the graph that holds the whole pipeline."""
    import onnx
    from onnx import TensorProto, helper

    torch.manual_seed(0)
    path = tmp_path / "block.onnx"
    export_module(Block().eval().requires_grad_(False), feeds(2, 6, 5), AXES, {"y": {}}, path, component="unet")
    inner = onnx.load(str(path)).graph
    value, node = helper.make_tensor_value_info, helper.make_node
    free = [None, None, None]
    body = helper.make_graph(
        [node("Identity", ["state"], ["x"]), *inner.node, node("Identity", ["go"], ["on"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("state", TensorProto.FLOAT, free)],
        [value("on", TensorProto.BOOL, []), value("y", TensorProto.FLOAT, free)],
    )
    graph = helper.make_graph(
        [node("Loop", ["count", "", "start"], ["end"], body=body)],
        "loop",
        [value("start", TensorProto.FLOAT, free), value("context", TensorProto.FLOAT, free)],
        [value("end", TensorProto.FLOAT, free)],
        [*inner.initializer, helper.make_tensor("count", TensorProto.INT64, [], [3])],
    )
    looped, fused = tmp_path / "loop.onnx", tmp_path / "fused.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(looped))
    model = onnx_ir.load(looped)
    assert fuse_attention(model) == 2
    onnx_ir.save(model, fused)
    given = {"start": feeds(2, 6, 5)["x"], "context": feeds(2, 6, 5)["context"]}
    plain, found = (OnnxRuntimeEngine(file, threads=1).run(given)["end"] for file in (looped, fused))
    assert relative_error(plain, found) < 1e-6
