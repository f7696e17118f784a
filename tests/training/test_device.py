"""A training step on a GPU, on tensors without content: whatever is left on the CPU fails, on any machine."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm_deploy.config import PRESETS, AutoencoderConfig, AutoencoderLossConfig, ObjectiveConfig
from ldm_deploy.models.reference import Reference, build_modules, describe
from ldm_deploy.models.unet import UNet
from ldm_deploy.training import (
    autoencoder,
    diffusion,
    distill_consistency,
    distill_decoder,
    distill_progressive,
    graphs,
    imitation,
    student,
)
from ldm_deploy.training.data import ImageSet
from ldm_deploy.training.decoder_config import PRESETS as DECODERS
from ldm_deploy.training.distill_config import PRESETS as STUDENTS
from ldm_deploy.training.processes import Processes
from ldm_deploy.training.prune_config import PRESETS as PRUNED
from tests.tiny_bundle import CONTEXT_LENGTH, VOCABULARY, write_tokenizer

CUDA = Processes(device=torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch):
    """Tensors that only know shape and device; a GPU need not be there."""

    def apply(self, function, recurse=True):  # torch swaps tensors here, which those without content do not bear
        for module in self.modules():
            for name, value in module._parameters.items():
                module._parameters[name] = None if value is None else nn.Parameter(function(value), value.requires_grad)
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else function(value)
        return self

    monkeypatch.setattr(nn.Module, "_apply", apply)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.5)
    for module in (autoencoder, diffusion, distill_consistency, distill_decoder, distill_progressive, imitation):
        monkeypatch.setattr(module, "processes", lambda: CUDA)
    for module in (student, distill_decoder, imitation):
        monkeypatch.setattr(module, "device_rng", lambda *rest: None)  # no generator of a GPU that is not there
    monkeypatch.setattr(graphs, "capture", lambda module, inputs: module)
    with FakeTensorMode():
        yield


def step(module, name, monkeypatch, train):
    """Each loss of a stage and what follows a step. No backward pass: torch's engine wants a GPU that is there."""

    def once(name, model, loss, config, *rest, adversary=None, after_step=lambda step: {}, **options):
        rows = slice(0, config.batch_size)
        assert loss(0, rows)[0].device == CUDA.device
        after_step(0)
        if adversary is not None:
            assert adversary.loss_function(0, rows)[0].device == CUDA.device
        assert {value.device for value in model.parameters()} == {CUDA.device}
        return model.state_dict()

    monkeypatch.setattr(module, "run_stage", once)
    for place in (autoencoder, distill_decoder):
        monkeypatch.setattr(place, "adaptive_weight", lambda rebuilt, fooled, *rest: rebuilt / fooled)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda self, state, **options: None)
    model = train()
    assert {value.device.type for value in model.parameters()} == {"cpu"}  # what is written to disk


def black_images():
    none = np.zeros(4, bool)
    return ImageSet(np.zeros((4, 32, 32, 3), np.uint8), [""] * 4, [""] * 4, none, none, "", [""] * 4)


AUTOENCODERS = {
    "kl": (
        AutoencoderConfig(8, (1, 2), 1, 4, 4, "sd1", dropout=0.1),
        AutoencoderLossConfig(gan_weight=0.5, disc_layers=1, disc_channels=8),
    ),
    "vq": (
        AutoencoderConfig(8, (1, 2), 1, 4, 4, "sd1", kind="vq", codebook_size=16),
        AutoencoderLossConfig(codebook_averaged=True),
    ),
}


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_a_step_of_the_autoencoder_is_on_the_gpu(gpu, monkeypatch, tmp_path, kind):
    model, loss = AUTOENCODERS[kind]
    unet = dataclasses.replace(PRESETS["tiny"].unet, channels=(16,), attention_levels=(), num_heads=(1,))
    config = dataclasses.replace(
        PRESETS["tiny"], autoencoder=model, autoencoder_loss=loss, photo_fraction=0.0, unet=unet, autocast_bf16=False
    )
    data = black_images()
    step(
        autoencoder, "autoencoder", monkeypatch,
        lambda: autoencoder.train_autoencoder(config, data, tmp_path, "", resume=False),
    )  # fmt: skip


def test_a_step_of_the_denoiser_is_on_the_gpu(gpu, monkeypatch, tmp_path):
    config = dataclasses.replace(
        PRESETS["tiny"], objective=ObjectiveConfig("logit_normal", 5.0, 0.1), autocast_bf16=False
    )
    text_encoder = {"vocab_size": 20, "context_length": 4, "width": 32, "layers": 1, "head_channels": 16}
    described = describe(config, 0.7, text_encoder, {})
    images = np.zeros((4, 32, 32, 3), np.uint8)
    encoder = autoencoder.build_autoencoder(config)

    def train():
        latents = diffusion.encode_images(encoder, images)
        assert latents[0].device == CUDA.device
        ids = np.ones((4, 4), np.int64)
        return diffusion.train_denoiser(
            config, described, lambda size: latents, ids, [0, 1, 2, 3], tmp_path, "", resume=False
        )

    step(diffusion, "diffusion", monkeypatch, train)


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_a_step_of_the_small_decoder_is_on_the_gpu(gpu, monkeypatch, tmp_path, kind):
    full, _ = AUTOENCODERS[kind]
    small = {"widths": (8,), "blocks": (1,)}
    described = {
        **dataclasses.asdict(full), "small_encoder": small, "small_decoder": {**small, "scale": 0.7}
    }  # fmt: skip
    model = {"autoencoder": described, "scale_factor": 0.7, "latent_channels": 4, "downsampling": 2}
    config = dataclasses.replace(
        DECODERS["tiny"], **small, encoder=True, perceptual_weight=0.1, gan_weight=0.1, disc_layers=1, disc_channels=8,
        photo_fraction=0.0,
    )  # fmt: skip
    teacher = autoencoder.Autoencoder(**dataclasses.asdict(full)).requires_grad_(False)

    def perceptual(one, other):
        return (one - other).square().mean((1, 2, 3))

    step(
        distill_decoder, "decoder", monkeypatch,
        lambda: distill_decoder.train_decoder(
            config, teacher, model, black_images(), tmp_path, "", resume=False, perceptual=perceptual
        ),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["consistency", "progressive"])
def test_a_step_of_distillation_is_on_the_gpu(gpu, monkeypatch, tmp_path, method):
    text_encoder = {"vocab_size": 20, "context_length": 4, "width": 32, "layers": 1, "head_channels": 16}
    described = describe(PRESETS["tiny"], 0.7, text_encoder, {})
    modules = build_modules(described)
    teacher = Reference(tmp_path, described, **modules)
    none = np.zeros(4, bool)
    data = ImageSet(np.zeros((4, 32, 32, 3), np.uint8), [""] * 4, [""] * 4, none, none, "", [""] * 4)
    config = dataclasses.replace(STUDENTS["tiny"], method=method)
    train = {
        "consistency": distill_consistency.train_consistency,
        "progressive": distill_progressive.train_progressive,
    }[method]

    def distill():
        material = student.make_material(teacher, data, np.ones((4, 4), np.int64), [0, 1, 2, 3])
        assert {value.device for value in vars(material).values()} == {CUDA.device}
        unet = UNet(**described["unet"], guidance_embedding=True)
        weights = train(teacher, unet, material, config, tmp_path, "", resume=False)
        assert {value.device.type for value in weights.values()} == {"cpu"}

    def twin(unet):  # tensors without content do not bear to be copied
        return UNet(**described["unet"], guidance_embedding=True).to(next(unet.parameters()).device)

    monkeypatch.setattr(copy, "deepcopy", twin)

    def once(name, model, loss, config, *rest, after_step=lambda step: {}, **options):
        value, _ = loss(0, slice(0, config.batch_size))
        assert value.device == CUDA.device
        after_step(0)
        devices = {value.device for value in (*model.parameters(), *model.buffers())}
        assert devices == {CUDA.device}
        return {name: value + 1 for name, value in model.named_parameters()}

    for module in (distill_consistency, distill_progressive):
        monkeypatch.setattr(module, "run_stage", once)
        monkeypatch.setattr(module, "check_moved", lambda start, averages: None)
    distill()


def test_a_step_of_a_pruned_unet_is_on_the_gpu(gpu, monkeypatch, tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json")
    text_encoder = {"vocab_size": VOCABULARY, "context_length": CONTEXT_LENGTH, "width": 32, "layers": 1}
    described = describe(PRESETS["tiny"], 0.7, {**text_encoder, "head_channels": 16}, {})
    teacher = Reference(tmp_path, described, **build_modules(described))

    left = UNet(**described["unet"], removed=["innermost", "down.0.block"])
    step(
        imitation, "prune", monkeypatch,
        lambda: imitation.imitate(
            "prune", PRUNED["tiny"], teacher, left, np.zeros((4, 32, 32, 3), np.uint8), ["one"] * 4, (), tmp_path, "",
            resume=False,
        ),
    )  # fmt: skip
