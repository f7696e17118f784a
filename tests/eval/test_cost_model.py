"""Predicted costs against the profiler, formulas by hand and published figures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from ldm_deploy.config import PRESETS, AutoencoderConfig, Config, UNetConfig
from ldm_deploy.eval.analysis.cost_model import attention_bytes, measure, model_costs, parts, predict
from ldm_deploy.models.reference import describe

TEXT = {"context_length": 16, "width": 32}


def described(config: Config) -> dict:
    return describe(config, 1.0, TEXT, {})


CONFIGS = {
    "tiny": PRESETS["tiny"],
    "sd1": dataclasses.replace(
        PRESETS["tiny"],
        autoencoder=AutoencoderConfig(16, (1, 2, 3), 2, 6, 8, "sd1"),
        unet=UNetConfig((16, 32), 2, (0, 1), (2, 4), 8, "sd1"),
    ),
    "vq": dataclasses.replace(
        PRESETS["tiny"], autoencoder=AutoencoderConfig(8, (1, 2, 2, 2), 1, 4, 4, "sd1", kind="vq"), resolution=64
    ),
}


@pytest.mark.parametrize(("name", "size"), [("tiny", 64), ("tiny", 96), ("sd1", 64), ("vq", 64)])
def test_predictions_are_within_ten_percent_of_what_the_profiler_finds(name: str, size: int) -> None:
    model = {**described(CONFIGS[name]), "size_multiple": 16}
    costs = model_costs(model, size, size)
    for part, module, inputs in parts(model, size, size):
        found = measure(module, *inputs).to_dict()
        for key, value in costs[part].to_dict().items():
            assert value == pytest.approx(found[key], rel=0.1), (part, key)


def test_a_convolution_and_a_linear_layer_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.Linear(16, 5))
    cost = predict(module, torch.zeros(1, 3, 4, 4))
    assert cost.flops == 2 * 9 * 3 * 8 * 16 + 2 * 8 * 16 * 5
    assert cost.weight_bytes == 4 * (9 * 3 * 8 + 8 + 16 * 5 + 5)
    assert cost.saved_bytes == 4 * 8 * 16  # the linear layer's input; the image is an input and not counted
    assert cost.peak_bytes == 4 * (8 * 16 + 8 * 5)
    assert measure(module, torch.zeros(1, 3, 4, 4)).flops == cost.flops


def test_what_grows_with_the_image_and_what_does_not() -> None:
    model = described(PRESETS["tiny"])
    small, large = model_costs(model, 64, 64), model_costs(model, 128, 128)
    assert large["decoder"].weight_bytes == small["decoder"].weight_bytes
    assert large["decoder"].saved_bytes == pytest.approx(4 * small["decoder"].saved_bytes, rel=0.01)
    assert large["decoder"].flops > 4 * small["decoder"].flops  # attention grows with the square of the pixels
    assert small["unet_in_pixel_space"].flops > 16 * small["unet"].flops
    with pytest.raises(ValueError, match="size 60x64 is no multiple of 8"):
        model_costs(model, 60, 64)


def test_the_unet_of_stable_diffusion_costs_what_is_published() -> None:
    """0.8 TFLOP per step at 512x512, as the 402 GMAC of many profiles; nothing of its 3.4 GB is allocated."""
    config = dataclasses.replace(
        PRESETS["tiny"],
        resolution=512,
        autoencoder=AutoencoderConfig(128, (1, 2, 4, 4), 2, 4, 32, "sd1"),
        unet=UNetConfig((320, 640, 1280, 1280), 2, (0, 1, 2), (8, 8, 8, 8), 32, "sd1"),
    )
    model = describe(config, 1.0, {"context_length": 77, "width": 768}, {})
    unet = model_costs(model, 512, 512)["unet"]
    assert unet.weight_bytes == 4 * 859_520_964
    assert unet.flops == pytest.approx(2 * 402e9, rel=0.01)


def test_attention_at_1024_is_a_gigabyte_and_not_48() -> None:
    assert attention_bytes((1024 // 8) ** 2) == 2**30
    q = torch.zeros(1, 2, 64, 4)
    weights = torch.softmax(q @ q.transpose(-1, -2), dim=-1)
    assert attention_bytes(64, heads=2) == weights.numel() * weights.element_size()
