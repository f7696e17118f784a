"""The autoencoder's losses and its adversary, against closed forms and torch's own gradients."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm_deploy.config import PRESETS, AutoencoderLossConfig
from ldm_deploy.errors import TrainingError
from ldm_deploy.models.discriminator import NORMS, PatchDiscriminator
from ldm_deploy.training.losses import adaptive_weight, generator_loss, gradient_penalty, hinge_loss
from ldm_deploy.training.train import train


def test_hinge_loss_counts_what_is_inside_the_margin():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert generator_loss(fake).item() == 1.5


def test_adaptive_weight_balances_the_two_gradients():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, generator = (3 * weight).sum(), (0.5 * weight).sum()
    assert adaptive_weight(reconstruction, generator, weight).item() == pytest.approx(6.0, rel=1e-3)
    assert adaptive_weight(reconstruction, 0 * generator, weight).item() == 1e4  # never more
    assert not adaptive_weight(reconstruction, generator, weight).requires_grad


def test_gradient_penalty_of_a_linear_discriminator_is_its_weights():
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    penalty = gradient_penalty(discriminator, torch.randn(5, 3, 2, 2))
    assert penalty.item() == pytest.approx(0.5 * discriminator[1].weight.square().sum().item(), rel=1e-5)
    penalty.backward()
    torch.testing.assert_close(discriminator[1].weight.grad, discriminator[1].weight.detach())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("layers", "size"), [(1, 30), (2, 14), (3, 6)])
def test_patches_of_the_discriminator(norm, layers, size):
    discriminator = PatchDiscriminator(layers, 8, norm)
    assert discriminator(torch.randn(2, 3, 64, 64)).shape == (2, 1, size, size)


def test_a_patch_sees_70_pixels():
    """Isola et al. 2017, section 4.4: three strided layers make it a 70x70 PatchGAN."""
    discriminator = PatchDiscriminator(3, 4, "none").eval()
    image = torch.randn(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(image)
    logits[0, 0, 9, 9].backward()
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero()[:, 0]
    assert rows.max() - rows.min() + 1 == 70


def test_spectral_normalisation_bounds_every_layer():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(2, 8, "none", spectral=True)
    with torch.no_grad():
        for layer in discriminator.layers:
            if isinstance(layer, nn.Conv2d):
                layer.parametrizations.weight.original.mul_(50)
        for _ in range(30):  # power iterations
            discriminator(torch.randn(1, 3, 32, 32))
    for layer in discriminator.eval().layers:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.05)


def adversarial(**changes):
    tiny = PRESETS["tiny"]
    stage = dataclasses.replace(tiny.autoencoder_training, steps=42, batch_size=4, checkpoint_every=7)
    loss = AutoencoderLossConfig(
        **{
            "gan_weight": 0.5,
            "disc_start": 21,
            "disc_channels": 8,
            "disc_layers": 1,
            "gradient_penalty": 1.0,
            **changes,
        }
    )
    return dataclasses.replace(tiny, autocast_bf16=False, autoencoder_training=stage, autoencoder_loss=loss)


def lines(directory):
    return [json.loads(line) for line in (directory / "autoencoder.jsonl").read_text().splitlines()]


def test_the_adversary_starts_late_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    config = adversarial(disc_norm="batch", disc_spectral_norm=True)
    train(config, "photos", tmp_path / "whole", threads=1)
    log = {line["step"]: line for line in lines(tmp_path / "whole.training")}
    assert "generator" not in log[20]
    assert {"generator", "generator_weight", "discriminator", "gradient_penalty", "kl_nats"} <= set(log[40])
    assert log[40]["generator_weight"] > 0

    from ldm_deploy.training import autoencoder as module

    def killed(reconstruction, generator, last_layer, sum_):
        killed.calls += 1
        if killed.calls == 12:  # after step 32; the last checkpoint is of step 28
            raise KeyboardInterrupt
        return adaptive_weight(reconstruction, generator, last_layer, sum_)

    killed.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "adaptive_weight", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, "photos", tmp_path / "cut", threads=1)
    train(config, "photos", tmp_path / "cut", threads=1, resume=True)
    whole, cut = (load_file(tmp_path / f"{name}.training" / "autoencoder.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert any(name.startswith("adversary.buffer.") for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name


def test_the_perceptual_distance_is_asked_for_and_used(tmp_path):
    config = adversarial(gan_weight=0.0, perceptual_weight=2.0, perceptual_backbone="alex")
    with pytest.raises(
        TrainingError, match=r"perceptual_weight is 2\.0 and there is no perceptual .*perceptual_weight = 0"
    ):
        train(config, "photos", tmp_path / "none", threads=1)
    asked = []

    def distance(backbone):
        asked.append(backbone)
        return lambda image, other: (image - other).abs().amax(dim=(1, 2, 3))

    train(config, "photos", tmp_path / "model", threads=1, perceptual=distance)
    assert asked == ["alex"]
    line = lines(tmp_path / "model.training")[0]
    assert line["perceptual"] > line["reconstruction"] / 2
    kl = config.autoencoder_loss.kl_weight * line["kl_nats"]
    assert line["loss"] == pytest.approx(line["reconstruction"] + 2 * line["perceptual"] + kl, rel=1e-5)
