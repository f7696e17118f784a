"""Group normalization by channels computes what torch does; what is not that pattern stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ldm_deploy.eval.parity import relative_error
from ldm_deploy.export.passes.norm_by_channel import norm_by_channel
from ldm_deploy.export.to_onnx import export_module
from ldm_deploy.export.to_openvino import to_openvino
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

CHANNELS = 12


class Block(nn.Module):
    """Convolution, norm, SiLU, convolution."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 3, 1)
        self.norm = nn.GroupNorm(groups, CHANNELS, eps=1e-3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.leave(nn.functional.silu(self.norm(self.enter(image))))
        return out


class Rows(Block):
    """The norm over tokens, as before attention: (batch, C, pixels)."""

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.enter(image)
        out: Tensor = self.leave(self.norm(hidden.flatten(2)).reshape(hidden.shape))
        return out


def exported(module: nn.Module, path: Path) -> Path:
    free = {0: "batch", 2: "height", 3: "width"}
    image = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).numpy()
    torch.manual_seed(0)
    export_module(module.eval(), {"image": image}, {"image": free}, {"out": free}, path, component="vae_decoder")
    return path


def rewritten(path: Path) -> tuple[Path, int]:
    model = onnx_ir.load(path)
    count = norm_by_channel(model)
    out = path.with_name("rewritten.onnx")
    onnx_ir.save(model, out)
    onnx.checker.check_model(str(out))
    return out, count


@pytest.mark.parametrize("groups", [1, 4, CHANNELS])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_it_is_the_norm_of_torch_at_every_size(tmp_path: Path, groups: int, mean: float) -> None:
    """Also where the mean is a hundred times the spread: a variance by squares would have three digits left."""
    torch.manual_seed(1)
    module = Block(groups).eval()
    with torch.no_grad():
        assert module.enter.bias is not None
        module.enter.bias += mean
    path, count = rewritten(exported(module, tmp_path / "block.onnx"))
    assert count == 1
    operators = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert "InstanceNormalization" not in operators
    engine = OnnxRuntimeEngine(path, threads=1)
    for size in ((1, 3, 6, 5), (3, 3, 16, 8)):
        image = torch.randn(size, generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            expected = module.double()(image.double()).float().numpy()
        module.float()
        assert relative_error(expected, engine.run({"image": image.numpy()})["out"]) < (1e-6 if mean == 0 else 1e-4)


def test_a_norm_over_tokens_stays(tmp_path: Path) -> None:
    before = exported(Rows(), tmp_path / "block.onnx")
    path, count = rewritten(before)
    assert count == 0
    image = {"image": np.random.default_rng(0).random((2, 3, 4, 4), np.float32)}
    outputs = [OnnxRuntimeEngine(file, threads=1).run(image)["out"] for file in (before, path)]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("change", ["a scale of its own", "an output", "old axes"])
def test_what_only_looks_like_it_stays(tmp_path: Path, change: str) -> None:
    model: Any = onnx.load(str(exported(Block(), tmp_path / "block.onnx")))
    norm = next(node for node in model.graph.node if node.op_type == "InstanceNormalization")
    if change == "a scale of its own":
        ones = next(tensor for tensor in model.graph.initializer if tensor.name == norm.input[1])
        ones.CopyFrom(numpy_helper.from_array(np.full(4, 2, np.float32), ones.name))
    if change == "an output":
        model.graph.output.append(helper.make_tensor_value_info(norm.output[0], TensorProto.FLOAT, None))
    if change == "old axes":
        model.opset_import[0].version = 17
    assert norm_by_channel(onnx_ir.from_proto(model)) == 0


def test_an_autoencoder_has_it_in_openvino_and_a_unet_does_not(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    path = exported(Block(), tmp_path / "block.onnx")
    for component, norms in (("vae_decoder", 0), ("vae_encoder", 0), ("unet", 1)):
        xml, _ = to_openvino(path, tmp_path / f"{component}.xml", component=component)
        kinds = [node.get_type_name() for node in openvino.Core().read_model(xml).get_ops()]
        assert kinds.count("MVN") == norms
    assert sorted(file.name for file in tmp_path.glob("*.onnx")) == ["block.onnx"]
