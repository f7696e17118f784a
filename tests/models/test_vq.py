"""The codebook: nearest codes, gradients that pass, means that are followed, dead codes that come back."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from ldm_deploy.config import PRESETS, AutoencoderLossConfig
from ldm_deploy.models.autoencoder import LOGVAR_RANGE, Autoencoder
from ldm_deploy.models.vq import DECAY, VectorQuantizer
from ldm_deploy.training.train import train


def make_quantizer(codes=6, channels=3):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes, channels)
    with torch.no_grad():
        quantizer.codebook.normal_()
        quantizer.total.copy_(quantizer.codebook)
    return quantizer


def test_every_vector_becomes_its_nearest_code():
    quantizer = make_quantizer()
    latent = torch.randn(2, 3, 4, 5)
    distance = (latent.permute(0, 2, 3, 1)[..., None, :] - quantizer.codebook).square().sum(-1)
    indices = distance.argmin(-1)
    assert torch.equal(quantizer.nearest(latent), indices)
    assert torch.equal(quantizer(latent), quantizer.codebook[indices].permute(0, 3, 1, 2))
    assert torch.equal(quantizer(quantizer(latent)), quantizer(latent))


def test_gradients_are_those_of_the_paper():
    quantizer = make_quantizer()
    latent = torch.randn(2, 3, 4, 5, requires_grad=True)
    quantized, codebook, commitment, indices = quantizer.train_step(latent)
    torch.testing.assert_close(quantized, quantizer(latent))
    (straight,) = torch.autograd.grad(quantized.sum(), latent, retain_graph=True)
    assert torch.equal(straight, torch.ones_like(latent))
    (pull,) = torch.autograd.grad(commitment, latent, retain_graph=True)
    torch.testing.assert_close(pull, 2 * (latent - quantizer(latent)).detach() / latent.numel())
    (drag,) = torch.autograd.grad(codebook, quantizer.codebook, retain_graph=True)
    expected = torch.zeros_like(quantizer.codebook)
    for vector, index in zip(latent.permute(0, 2, 3, 1).reshape(-1, 3), indices.flatten(), strict=True):
        expected[index] += 2 * (quantizer.codebook[index] - vector).detach() / latent.numel()
    torch.testing.assert_close(drag, expected.detach())
    with pytest.raises(RuntimeError):  # neither reaches the other side
        torch.autograd.grad(commitment, quantizer.codebook)


def test_averaged_codes_follow_the_mean_of_their_vectors():
    quantizer = make_quantizer()
    quantizer.follow_mean()
    latent = torch.randn(4, 3, 8, 8)
    indices = quantizer.nearest(latent)
    before = quantizer.codebook.detach().clone()
    statistics = quantizer.statistics(latent, indices)
    quantizer.update(statistics, latent.new_zeros(0, 3), restart_after=0)
    vectors = latent.permute(0, 2, 3, 1).reshape(-1, 3)
    for code in range(6):
        mine = vectors[indices.flatten() == code]
        count = DECAY + (1 - DECAY) * len(mine)
        expected = (DECAY * before[code] + (1 - DECAY) * mine.sum(0)) / count
        torch.testing.assert_close(quantizer.codebook[code].detach(), expected)
    for _ in range(2000):
        quantizer.update(statistics, latent.new_zeros(0, 3), restart_after=0)
    torch.testing.assert_close(
        quantizer.codebook.detach(), statistics[:, 1:] / statistics[:, :1].clamp_min(1e-5), rtol=1e-3, atol=1e-3
    )


def test_dead_codes_come_back_as_latents_and_usage_is_reported():
    quantizer = make_quantizer(codes=8)
    with torch.no_grad():
        quantizer.codebook[5:] = 100.0  # three codes that nothing is near
    latent = torch.randn(2, 3, 8, 8)
    vectors = latent.permute(0, 2, 3, 1).reshape(-1, 3)
    for step in range(3):
        statistics = quantizer.statistics(latent, quantizer.nearest(latent))
        report = quantizer.update(statistics, vectors, restart_after=3)
        assert report["codes_used"] <= 5 / 8
        assert (quantizer.codebook[5:] == 100).all() == (step < 2)
    assert torch.equal(quantizer.codebook[5:].detach(), vectors[:3])
    assert quantizer.idle[5:].eq(0).all()


def test_perplexity_is_the_number_of_codes_that_are_used_evenly():
    quantizer = make_quantizer(codes=4, channels=1)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0], [1.0], [2.0], [9.0]]))
    latent = torch.tensor([0.0, 1.0, 2.0]).repeat(4).reshape(1, 1, 3, 4)
    report = quantizer.update(quantizer.statistics(latent, quantizer.nearest(latent)), latent.new_zeros(0, 1), 0)
    assert report == {"perplexity": pytest.approx(3.0), "codes_used": 0.75}


def test_the_decoder_quantizes_and_the_encoder_is_deterministic():
    torch.manual_seed(0)
    model = Autoencoder(8, (1, 2), 1, 4, 4, "sd1", kind="vq", codebook_size=32).eval()
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    mean, logvar = model.encode(image)
    assert mean.shape == (2, 4, 8, 12)
    assert (logvar == LOGVAR_RANGE[0]).all()
    assert torch.equal(model.decode(mean), model.decode(model.quantizer(mean)))
    assert set(model.state_dict()) >= {"quantizer.codebook"}
    assert not any(name.startswith(("quantizer.idle", "quantizer.count")) for name in model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
def test_a_vq_model_goes_down_the_whole_road(tmp_path, averaged):
    """Trained, killed after four of six steps, resumed, exported with parity, drawn with."""
    import ldm_deploy
    from ldm_deploy.export.export import export_source

    tiny = PRESETS["tiny"]
    stage = dataclasses.replace(
        tiny.autoencoder_training, steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2
    )
    config = dataclasses.replace(
        tiny,
        autocast_bf16=False,
        autoencoder=dataclasses.replace(tiny.autoencoder, kind="vq", codebook_size=64),
        autoencoder_training=stage,
        autoencoder_loss=AutoencoderLossConfig(codebook_averaged=averaged, restart_codes_after=2),
    )
    whole = train(config, "photos", tmp_path / "whole", threads=1)

    class Killed(Exception):
        pass

    def kill(backbone):
        raise AssertionError("no perceptual distance was asked for")

    from ldm_deploy.training import autoencoder as module

    original = VectorQuantizer.update
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Killed
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.VectorQuantizer, "update", counted)
        with pytest.raises(Killed):
            train(config, "photos", tmp_path / "cut", threads=1, perceptual=kill)
    train(config, "photos", tmp_path / "cut", threads=1, resume=True)
    for name in ("autoencoder", "unet"):
        expected = (tmp_path / "whole" / f"{name}.safetensors").read_bytes()
        assert (tmp_path / "cut" / f"{name}.safetensors").read_bytes() == expected
    log = (tmp_path / "whole.training" / "autoencoder.jsonl").read_text().splitlines()
    first = json.loads(log[0])
    assert 1 <= first["perplexity"] <= 64
    assert {"codebook", "commitment", "reconstruction", "codes_used"} <= set(first)
    assert whole["config"]["autoencoder"]["kind"] == "vq"

    export_source(tmp_path / "whole", tmp_path / "onnx", seed=0, threads=1)
    pipeline = ldm_deploy.load(tmp_path / "onnx", threads=1)
    image = pipeline("cat", seed=0, steps=2)
    assert image.shape == (1, 32, 32, 3)
    assert image.dtype == np.uint8
