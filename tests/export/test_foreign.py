"""A component of somebody else's: names and axes go through unchanged, what it cannot do is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_deploy.errors import ConfigError, ExportError
from ldm_deploy.export.foreign import export_function
from ldm_deploy.export.module_digest import module_digest
from ldm_deploy.runtime.bundle import verify_bundle
from ldm_deploy.runtime.engines import open_engine

Offer = Callable[[Any], str]


class PixelDenoiser(nn.Module):
    """Names of its own, a second output, pixels instead of latents."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 2, stride=2)

    def forward(self, pixels: Tensor, noise_level: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.enter(pixels)) * noise_level[:, None, None, None]
        return {"cleaned": self.leave(hidden), "strength": hidden.mean(dim=(1, 2, 3))}


def example() -> tuple[nn.Module, dict[str, Tensor], dict[str, dict[int, str]]]:
    torch.manual_seed(0)
    axes = {"pixels": {0: "n", 2: "rows", 3: "columns"}, "noise_level": {0: "n"}}
    return PixelDenoiser(), {"pixels": torch.rand(2, 3, 8, 12), "noise_level": torch.rand(2)}, axes


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Offer:
    """A module that can be imported, with the function given."""

    def make(function: Any) -> str:
        module = ModuleType("their_module")
        module.make = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "their_module", module)
        return "their_module:make"

    return make


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino-cpu"])
def test_names_axes_and_values_are_the_module_s(offer: Offer, tmp_path: Path, target: str) -> None:
    bundle = export_function(offer(example), "unet", tmp_path / "out", target=target, threads=1)
    verify_bundle(bundle.root)
    (engine,) = bundle.data["engines"]
    assert {value["name"]: value["shape"] for value in engine["inputs"]} == {
        "pixels": ["n", 3, "rows", "columns"],
        "noise_level": ["n"],
    }
    shapes = {value["name"]: value["shape"] for value in engine["outputs"]}
    assert shapes == {"cleaned": ["n", 3, "2*rows", "2*columns"], "strength": ["n"]}
    assert engine["parity"]["passed"]
    assert engine["precision_found"] == {"fp32": 2}
    feeds = {
        "pixels": np.random.default_rng(0).random((5, 3, 6, 20), np.float32),
        "noise_level": np.linspace(0, 1, 5, dtype=np.float32),
    }
    found = open_engine(bundle.engines[engine["id"]], bundle.root, threads=1).run(feeds)
    with torch.no_grad():
        expected = example()[0](*(torch.from_numpy(value) for value in feeds.values()))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-5)


class TinyDecoder(nn.Sequential):
    """A forward whose parameter is called `input`."""


def test_names_that_are_not_those_of_forward_go_by_order(offer: Offer, tmp_path: Path) -> None:
    module = TinyDecoder(nn.Conv2d(4, 3, 1), nn.Tanh())
    source = offer(lambda: (module, {"latent": torch.randn(2, 4, 4, 4)}, {"latent": {0: "batch"}}))
    bundle = export_function(source, "vae_decoder", tmp_path / "out", threads=1)
    (engine,) = bundle.data["engines"]
    assert [value["name"] for value in (*engine["inputs"], *engine["outputs"])] == ["latent", "output"]
    assert engine["outputs"][0]["shape"] == ["batch", 3, 4, 4]


class Fixed(nn.Module):
    """Takes an axis at one size only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4) * 2


class Branching(nn.Module):
    """Control flow that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Unsupported(nn.Module):
    """An operator without ONNX form."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x @ x.transpose(0, 1)).real


class Frozen(nn.Module):
    """An axis that the trace turns into a number, though the module takes any."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.ones(int(x.shape[0]), 1)


ROWS = {"x": {0: "rows"}}


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: (Fixed(), {"x": torch.rand(2, 4)}, ROWS), ExportError, "takes 'rows' neither at half nor at twice"),
        (lambda: (Branching(), {"x": torch.rand(2, 4)}, ROWS), ExportError, "rewrite the part of forward"),
        (lambda: (Unsupported(), {"x": torch.rand(4, 4)}, {}), ExportError, "an operator without ONNX form"),
        (
            lambda: (Fixed(), {"x": torch.rand(2, 4)}, {"y": {0: "rows"}}),
            ConfigError,
            "for 'y', which is no input; there",
        ),
        (lambda: (Fixed(), {"x": torch.rand(2, 4)}, {"x": {2: "rows"}}), ConfigError, "of 'x' is not there; it has 2"),
        (lambda: Fixed(), ConfigError, r"returned Fixed; return \(torch.nn.Module, inputs, axes\)"),
        (lambda: (Fixed(), {"x": 1}, {}), ConfigError, "return a dict of input name to example tensor"),
    ],
)
def test_what_cannot_be_exported_is_said(
    offer: Offer, tmp_path: Path, made: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export_function(offer(made), "unet", tmp_path / "out", threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_module_or_function_that_is_not_there_is_named(offer: Offer, tmp_path: Path) -> None:
    offer(example)
    with pytest.raises(ConfigError, match="no module 'nowhere_at_all'"):
        export_function("nowhere_at_all:make", "unet", tmp_path / "out")
    with pytest.raises(ConfigError, match="their_module has no function 'made'"):
        export_function("their_module:made", "unet", tmp_path / "out")


def test_the_digest_covers_weights_settings_and_code() -> None:
    before = module_digest(example()[0])
    assert module_digest(example()[0]) == before
    changed = example()[0]
    with torch.no_grad():
        changed.get_parameter("enter.bias")[3] += 1e-6
    assert module_digest(changed) != before
    assert module_digest(nn.MaxPool2d(2)) != module_digest(nn.MaxPool2d(3))
    labelled, relabelled = example()[0], example()[0]
    labelled.scale, relabelled.scale = (lambda by: lambda x: x * by)(2.0), (lambda by: lambda x: x * by)(3.0)
    assert module_digest(labelled) != module_digest(relabelled)
    unsaved = example()[0]
    unsaved.register_buffer("table", torch.ones(2), persistent=False)
    before = module_digest(unsaved)
    unsaved.get_buffer("table").zero_()
    assert module_digest(unsaved) != before
