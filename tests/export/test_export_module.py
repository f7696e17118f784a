"""One module to ONNX: axes that must stay free, faults that must be caught, nothing of this machine in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from ldm_deploy.errors import EngineError, ExportError, ParityError
from ldm_deploy.eval.parity import Probe, check_parity
from ldm_deploy.export.to_onnx import component_axes, export_module
from ldm_deploy.models.components import SIGNATURES
from ldm_deploy.onnx_graph import load_model, precision_found, read_opset, read_signature

onnxruntime_engine = pytest.importorskip("ldm_deploy.runtime.engines")


class Denoiser(nn.Module):
    """A U-Net's signature in three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.embed = nn.Embedding(1000, 16)
        self.context = nn.Linear(8, 16)
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        h = self.first(sample) + self.embed(timestep)[:, :, None, None]
        tokens = h.flatten(2).transpose(1, 2)
        context = self.context(encoder_hidden_states)
        attended = nn.functional.scaled_dot_product_attention(tokens[:, None], context[:, None], context[:, None])
        tokens = tokens + attended[:, 0]
        return self.last(tokens.transpose(1, 2).unflatten(2, h.shape[-2:]))


def feeds(batch: int, height: int, width: int, sequence: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    return {
        "sample": rng.standard_normal((batch, 4, height, width), np.float32),
        "timestep": rng.integers(0, 1000, batch),
        "encoder_hidden_states": rng.standard_normal((batch, sequence, 8), np.float32),
    }


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exported(denoiser: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "unet-fp32.onnx"
    export_module(denoiser, feeds(2, 8, 12, 5), *component_axes("unet", 4, SIGNATURES["unet"]), path, component="unet")
    return path


@pytest.fixture(scope="module")
def probes(denoiser: nn.Module) -> list[Probe]:
    found = []
    for sizes in ((1, 4, 4, 1), (3, 16, 8, 7), (2, 8, 12, 5)):
        inputs = feeds(*sizes)
        output = denoiser(*(torch.from_numpy(value) for value in inputs.values()))
        found.append(Probe(inputs, {"prediction": output.numpy()}))
    return found


def judge(path: Path, probes: list[Probe], limit: float = 1e-4) -> float:
    engine = onnxruntime_engine.OnnxRuntimeEngine(path, threads=1)
    return check_parity(engine, probes, limit, component="unet", name=path.stem).relative_error


def test_every_size_but_the_traced_one_gives_what_torch_gives(exported: Path, probes: list[Probe]) -> None:
    assert judge(exported, probes) < 1e-5


def test_signature_is_the_contract(exported: Path) -> None:
    model = load_model(exported, weights=False)
    inputs, outputs = read_signature(model)
    assert [(value.name, value.dtype, value.shape) for value in (*inputs, *outputs)] == [
        ("sample", "float32", ("batch", 4, "height", "width")),
        ("timestep", "int64", ("batch",)),
        ("encoder_hidden_states", "float32", ("batch", "sequence", 8)),
        ("prediction", "float32", ("batch", 4, "height", "width")),
    ]
    assert read_opset(model) >= 20
    onnx.checker.check_model(str(exported))


def test_nothing_of_this_machine_is_in_the_file(exported: Path) -> None:
    content = exported.read_bytes()
    assert b".py" not in content
    assert str(Path(torch.__file__).parents[1]).encode() not in content


def test_precision_is_read_back(exported: Path) -> None:
    assert set(precision_found(exported)) == {"fp32"}
    assert precision_found(exported)["fp32"] == 5  # two convolutions, one linear layer, two attention products


def planted(exported: Path, folder: Path, change: str) -> Path:
    """The exported file with one fault in its last convolution."""
    model = onnx.load(str(exported))
    node = [node for node in model.graph.node if node.op_type == "Conv"][-1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    weight = numpy_helper.to_array(tensor).copy()
    if change == "swapped channel":
        weight[[0, 1]] = weight[[1, 0]]
    elif change == "scaled weight":
        weight[2] *= 1.01
    else:
        weight[0, 0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    path = folder / "planted.onnx"
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("change", ["swapped channel", "scaled weight", "nan"])
def test_planted_weights_are_caught(exported: Path, probes: list[Probe], tmp_path: Path, change: str) -> None:
    with pytest.raises(ParityError, match=r"unet: engine planted differs from the reference: output 'prediction'"):
        judge(planted(exported, tmp_path, change), probes)


def test_an_axis_fixed_in_the_file_is_caught(exported: Path, probes: list[Probe], tmp_path: Path) -> None:
    model = onnx.load(str(exported))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    path = tmp_path / "fixed.onnx"
    onnx.save(model, str(path))
    with pytest.raises(ParityError, match=r"it does not run.*keep it symbolic"):
        judge(path, probes)


class Fixed(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent.reshape(2, -1).reshape(2, *latent.shape[1:]) * 2


class Square(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent + latent.transpose(2, 3)


class DataDependent(nn.Module):
    def forward(self, latent: Tensor) -> Tensor:
        return latent * 2 if latent.sum() > 0 else latent


def export_small(module: nn.Module, path: Path, shape: tuple[int, ...] = (2, 4, 6, 6)) -> None:
    axes = {0: "batch", 2: "H/4", 3: "W/4"}
    inputs = {"latent": np.ones(shape, np.float32)}
    export_module(module, inputs, {"latent": axes}, {"image": axes}, path, component="vae_decoder")


def test_a_batch_size_that_forward_fixes_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"axis 0 \(batch\) of (in|out)put '.*' was fixed to 2 by the export"):
        export_small(Fixed(), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_module_that_needs_squares_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"axis 3 \(W/4\) of input 'latent' was tied to 'H/4'"):
        export_small(Square(), tmp_path / "model.onnx")


def test_control_flow_on_values_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"vae_decoder: torch.onnx.export failed: .*rewrite the part") as caught:
        export_small(DataDependent(), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)


def test_an_example_of_length_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'latent' has length 1 on axis 0 \(batch\); give 2 or more"):
        export_small(Square(), tmp_path / "model.onnx", (1, 4, 6, 6))


def test_what_is_no_onnx_file_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no protobuf at all")
    with pytest.raises(EngineError, match="no readable ONNX file"):
        load_model(path)
