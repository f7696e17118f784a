"""The small decoder: shapes, cost, what it is made of, and the same numbers from an engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from ldm_deploy.config import PRESETS
from ldm_deploy.errors import ArtifactError
from ldm_deploy.eval.analysis.cost_model import model_costs
from ldm_deploy.eval.parity import Probe, check_parity
from ldm_deploy.export.to_onnx import component_axes, export_module
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.models.components import SIGNATURES, VaeDecoder
from ldm_deploy.models.interchange import save_autoencoder
from ldm_deploy.models.reference import read_model
from ldm_deploy.models.small_decoder import SmallDecoder, SmallEncoder, bounded
from ldm_deploy.models.sources import resolve_source
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from ldm_deploy.training.decoder_config import PRESETS as STUDENTS

TINY = dataclasses.asdict(PRESETS["tiny"].autoencoder)


def randomized(module: nn.Module) -> nn.Module:
    """No weight is zero, as those of residual branches are at first."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module.eval()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 7), (16, 3)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_sizes_are_free(levels: int, height: int, width: int) -> None:
    widths, blocks = (8, 6, 4)[:levels], (1, 0, 2)[:levels]
    factor = 2**levels
    image = SmallDecoder(5, widths, blocks, 0.7)(torch.zeros(2, 5, height, width))
    assert image.shape == (2, 3, factor * height, factor * width)
    assert SmallEncoder(10, widths, blocks)(image).shape == (2, 10, height, width)


def test_there_is_neither_attention_nor_normalisation() -> None:
    allowed = (nn.Conv2d, nn.ReLU, nn.PixelShuffle, nn.PixelUnshuffle)
    for module in (SmallDecoder(4, (8, 8), (1, 1), 1.0), SmallEncoder(8, (8, 8), (1, 1))):
        leaves = [leaf for leaf in module.modules() if not list(leaf.children())]
        assert all(isinstance(leaf, allowed) for leaf in leaves)


def test_a_latent_is_bent_into_three_standard_deviations() -> None:
    latent = torch.tensor([0.0, 0.1, 1e6, -1e6])
    assert bounded(latent, 0.5).tolist() == pytest.approx([0.0, 0.05, 3.0, -3.0], abs=1e-4)


def test_an_untrained_block_changes_nothing_and_a_trained_one_does() -> None:
    latent = torch.randn(1, 4, 3, 3)
    torch.manual_seed(0)
    with_blocks = SmallDecoder(4, (8,), (2,), 1.0)
    without = SmallDecoder(4, (8,), (0,), 1.0)
    ends = [with_blocks.layers[0], with_blocks.layers[-2]]
    for own, theirs in zip([without.layers[0], without.layers[-2]], ends, strict=True):
        own.load_state_dict(theirs.state_dict())
    assert torch.equal(with_blocks(latent), without(latent))
    assert not torch.allclose(randomized(with_blocks)(latent), without(latent))


def test_the_shipped_models_student_costs_an_eighth_and_fits_the_wheel() -> None:
    model = read_model(resolve_source("reference"))
    config = STUDENTS["cpu"]
    small = {"widths": config.widths, "blocks": config.blocks, "scale": model["scale_factor"]}
    described = {**model, "autoencoder": {**model["autoencoder"], "small_decoder": small}}
    teacher, student = (model_costs(described, 64, 64)["decoder"] for described in (model, described))
    assert teacher.flops >= 8 * student.flops
    assert student.weight_bytes / 2 < 500_000  # as fp16


def test_the_engine_computes_what_torch_does(tmp_path) -> None:
    small = {"widths": (8, 6), "blocks": (1, 1), "scale": 0.7}
    module = VaeDecoder(randomized(Autoencoder(**TINY, small_decoder=small)).requires_grad_(False)).eval()
    path = tmp_path / "vae_decoder-fp32.onnx"
    example = {"latent": np.zeros((2, 4, 6, 5), np.float32)}
    axes = component_axes("vae_decoder", 4, SIGNATURES["vae_decoder"])
    export_module(module, example, *axes, path, component="vae_decoder")
    probes = []
    for shape in ((1, 4, 1, 1), (3, 4, 7, 2)):
        latent = torch.from_numpy(3 * np.random.default_rng(0).standard_normal(shape, np.float32))
        probes.append(Probe({"latent": latent.numpy()}, {"image": module(latent).numpy()}))
    found = check_parity(OnnxRuntimeEngine(path, threads=1), probes, 1e-4, component="vae_decoder", name=path.stem)
    assert found.relative_error < 1e-5


@pytest.mark.parametrize("part", ["small_encoder", "small_decoder"])
def test_diffusers_layout_has_no_place_for_it(tmp_path, part) -> None:
    small = {"widths": (8, 8), "blocks": (1, 1), **({"scale": 1.0} if part == "small_decoder" else {})}
    module = Autoencoder(**{**TINY, "layout": "sd1", "norm_groups": 4}, **{part: small})
    with pytest.raises(ArtifactError, match="save the autoencoder that it was distilled from"):
        save_autoencoder(module, tmp_path, 1.0, 32)
