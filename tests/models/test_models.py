"""The three networks: free shapes, their parts connected, and round trips through a reference directory."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from ldm_deploy.config import PRESETS
from ldm_deploy.errors import ArtifactError
from ldm_deploy.models.autoencoder import LOGVAR_RANGE, Autoencoder
from ldm_deploy.models.reference import (
    describe,
    load_reference,
    read_model,
    save_reference,
)
from ldm_deploy.models.sources import resolve_source, source_digest
from ldm_deploy.models.text_encoder import TextEncoder
from ldm_deploy.models.torch_engine import torch_engines
from ldm_deploy.models.unet import UNet
from ldm_deploy.training.diffusion import Denoiser


def make_unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(
        in_channels=4, channels=(16, 32), num_res_blocks=1, attention_levels=(1,),
        num_heads=(1, 2), norm_groups=8, layout="sd1", context_channels=24,
    )  # fmt: skip
    for parameter in unet.parameters():
        if not parameter.any():  # zero-initialized branches would hide what they do
            torch.nn.init.normal_(parameter, std=0.1)
    return unet.eval()


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (3, 8, 24), (2, 32, 4)])
def test_autoencoder_takes_any_multiple_of_its_factor(batch, height, width):
    torch.manual_seed(0)
    model = Autoencoder(8, (1, 1, 2), num_res_blocks=1, z_channels=4, norm_groups=4, layout="sd1").eval()
    image = torch.rand(batch, 3, height, width) * 2 - 1
    mean, logvar = model.encode(image)
    assert mean.shape == logvar.shape == (batch, 4, height // 4, width // 4)
    assert LOGVAR_RANGE[0] <= logvar.min()
    assert logvar.max() <= LOGVAR_RANGE[1]
    decoded = model.decode(mean * 100)
    assert decoded.shape == image.shape
    assert decoded.abs().max() <= 1


def test_autoencoder_reconstructs_from_the_mean_without_noise():
    torch.manual_seed(0)
    model = Autoencoder(8, (1, 2), num_res_blocks=1, z_channels=4, norm_groups=4, layout="sd1").eval()
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    plain, mean, logvar = model(image)
    torch.testing.assert_close(plain, model(image, torch.zeros_like(mean))[0])
    noise = torch.randn_like(mean)
    latent = model.post_quant_conv(mean + (0.5 * logvar).exp() * noise)
    torch.testing.assert_close(model(image, noise)[0], model.decoder(latent))


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 4, 10)])
def test_unet_depends_on_all_inputs_at_any_shape(batch, height, width):
    unet = make_unet()
    sample, context = torch.randn(batch, 4, height, width), torch.randn(batch, 5, 24)
    timestep = torch.full((batch,), 500)
    prediction = unet(sample, timestep, context)
    assert prediction.shape == sample.shape
    for changed in (
        unet(sample + 1, timestep, context),
        unet(sample, timestep - 400, context),
        unet(sample, timestep, context * 2),
    ):
        assert not torch.allclose(changed, prediction, atol=1e-4)


def test_every_unet_parameter_receives_a_gradient():
    unet = make_unet()
    unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24)).square().sum().backward()
    unused = [name for name, parameter in unet.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not unused


def test_images_of_a_batch_do_not_touch_each_other():
    unet = make_unet()
    sample, context, timestep = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 24), torch.tensor([1, 500, 999])
    together = unet(sample, timestep, context)
    alone = torch.cat([unet(sample[i : i + 1], timestep[i : i + 1], context[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_text_encoder_knows_word_order_and_shorter_sequences():
    torch.manual_seed(0)
    encoder = TextEncoder(vocab_size=50, context_length=8, width=32, layers=2, head_channels=8).eval()
    torch.nn.init.normal_(encoder.position_embedding)
    ids = torch.tensor([[1, 7, 9, 2, 0, 0, 0, 0]])
    out = encoder(ids)
    assert out.shape == (1, 8, 32)
    assert encoder(ids[:, :4]).shape == (1, 4, 32)
    swapped = encoder(torch.tensor([[1, 9, 7, 2, 0, 0, 0, 0]]))
    assert not torch.allclose(swapped[:, 3], out[:, 3], atol=1e-4)


@pytest.fixture
def saved(tmp_path):
    """A reference directory with random weights, and the state it was written from."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    text_encoder = {"vocab_size": 300, "context_length": 16, "width": 32, "layers": 1, "head_channels": 16}
    model = describe(config, 0.7, text_encoder, {})
    denoiser = Denoiser(model)
    autoencoder = Autoencoder(**asdict(config.autoencoder))
    weights = {
        "autoencoder": autoencoder.state_dict(),
        "text_encoder": denoiser.text_encoder.state_dict(),
        "unet": denoiser.unet.state_dict(),
    }
    save_reference(tmp_path, model, weights)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path, weights


def test_reference_is_the_fp16_rounded_model_in_fp32(saved):
    directory, weights = saved
    reference = load_reference(directory)
    assert reference.model["scale_factor"] == 0.7
    assert reference.model["size_multiple"] == 8  # autoencoder 4 x U-Net 2
    for name, module in (("autoencoder", reference.autoencoder), ("unet", reference.unet)):
        for key, value in module.state_dict().items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, weights[name][key].half().float(), rtol=0, atol=0)
    assert not reference.unet.training


def test_torch_engines_follow_the_component_signatures(saved):
    reference = load_reference(saved[0])
    engines = torch_engines(reference)
    ids = np.zeros((2, 16), dtype=np.int64)
    hidden = engines["text_encoder"].run({"input_ids": ids})["encoder_hidden_states"]
    sample = np.random.default_rng(0).standard_normal((2, 4, 8, 8), dtype=np.float32)
    out = engines["unet"].run({"sample": sample, "timestep": np.array([5, 900]), "encoder_hidden_states": hidden})
    assert out["prediction"].shape == sample.shape
    assert out["prediction"].dtype == np.float32
    image = engines["vae_decoder"].run({"latent": sample})["image"]
    assert image.shape == (2, 3, 32, 32)
    assert set(engines["vae_encoder"].run({"image": image})) == {"latent_mean", "latent_logvar"}


def test_source_digest_covers_weights_and_not_the_model_card(saved):
    directory, _ = saved
    before = source_digest(directory)
    (directory / "README.md").write_text("new words")
    assert source_digest(directory) == before
    file = directory / "unet.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert source_digest(directory) != before


def test_damaged_references_are_named(saved, tmp_path):
    directory, _ = saved
    with pytest.raises(ArtifactError, match="is no model: there is no"):
        resolve_source(tmp_path / "nowhere")
    (directory / "unet.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ArtifactError, match=r"unet\.safetensors cannot be read"):
        load_reference(directory)
    (directory / "unet.safetensors").write_bytes((directory / "text_encoder.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=r"unet\.safetensors do not fit model\.json"):
        load_reference(directory)
    model = read_model(directory)
    (directory / "model.json").write_text(json.dumps({**model, "format": 2}))
    with pytest.raises(ArtifactError, match="format 2; this version reads format 1"):
        read_model(directory)
    (directory / "model.json").write_text("{")
    with pytest.raises(ArtifactError, match="does not parse"):
        read_model(directory)


def test_what_needs_a_reference_says_so_of_a_checkpoint(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is a checkpoint of diffusers"):
        load_reference(tmp_path)
