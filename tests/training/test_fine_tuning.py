"""Going on from a reference: all of it, or adapters that are merged; and what does not fit."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from ldm_deploy.config import PRESETS, Config, UNetConfig
from ldm_deploy.errors import ConfigError, TrainingError
from ldm_deploy.models.reference import load_reference
from ldm_deploy.models.unet import UNet
from ldm_deploy.training.lora import ATTENTION, add_lora, merged_state
from ldm_deploy.training.train import train


def tiny(**stage) -> Config:
    training = dataclasses.replace(PRESETS["tiny"].diffusion_training, **{"warmup_steps": 1, **stage})
    return dataclasses.replace(PRESETS["tiny"], autocast_bf16=False, diffusion_training=training)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("start") / "model"
    train(tiny(), "photos", directory, threads=1)
    return directory


def test_fine_tuning_starts_from_the_weights_and_keeps_the_autoencoder(start, tmp_path):
    still = tiny(learning_rate=1e-9, steps=1)  # one step that moves nothing: what was loaded is what is written
    record = train(still, "photos", tmp_path / "model", threads=1, init_from=start)
    before, after = load_reference(start), load_reference(tmp_path / "model")
    for part in ("autoencoder", "text_encoder", "unet"):
        for name, value in getattr(before, part).state_dict().items():
            torch.testing.assert_close(getattr(after, part).state_dict()[name], value, rtol=1e-3, atol=1e-6)
    assert after.model["scale_factor"] == before.model["scale_factor"]
    assert after.tokenizer_text() == before.tokenizer_text()
    assert list(record["stages"]) == ["diffusion"]
    assert record["command"].endswith("--init-from model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"Fine-tuned from `tiny` (digest `{record['init_from']['digest']}`): text encoder and U-Net." in card


def test_adapters_change_only_the_attention_and_resume(start, tmp_path):
    config = dataclasses.replace(tiny(learning_rate=0.05, checkpoint_every=2), lora_rank=2)
    train(config, "photos", tmp_path / "model", threads=1, init_from=start)
    before, after = load_reference(start), load_reference(tmp_path / "model")
    weights = after.unet.state_dict()
    changed = {name for name, value in before.unet.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed
    assert all(name.rsplit(".", 2)[1] in ATTENTION and name.endswith(".weight") for name in changed)
    for name, value in before.text_encoder.state_dict().items():
        assert torch.equal(value, after.text_encoder.state_dict()[name])
    assert "adapters of rank 2" in (tmp_path / "model" / "README.md").read_text()
    (tmp_path / "model").rename(tmp_path / "before")
    train(config, "photos", tmp_path / "model", threads=1, init_from=start, resume=True)  # from the last checkpoint
    again = load_reference(tmp_path / "model").unet.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def unet():
    torch.manual_seed(0)
    model = UNet(4, (16, 32), 1, (1,), (1, 2), 8, "sd1", 8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_adapters_start_as_nothing_and_merge_into_the_same_model():
    plain, adapted = unet(), unet()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 8)
    add_lora(adapted, 2)
    torch.testing.assert_close(adapted(*inputs), plain(*inputs), rtol=0, atol=1e-6)
    learning = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(".lora_" in name and any(f".{layer}." in name for layer in ATTENTION) for name in learning)
    for parameter in learning.values():
        torch.nn.init.normal_(parameter, std=0.3)
    merged = unet()
    merged.load_state_dict(merged_state(adapted))
    with torch.no_grad():
        assert not torch.allclose(adapted(*inputs), plain(*inputs), atol=1e-2)
        torch.testing.assert_close(merged(*inputs), adapted(*inputs), rtol=1e-6, atol=1e-6)
    assert merged_state(plain).keys() == plain.state_dict().keys()


def test_what_does_not_fit_is_refused(start, tmp_path):
    out = tmp_path / "model"
    wide = dataclasses.replace(tiny(), unet=UNetConfig((32, 32), 1, (1,), (2, 2)))
    with pytest.raises(TrainingError, match=r"the weights in .* do not fit the configuration \(.*; give the"):
        train(wide, "photos", out, threads=1, init_from=start)
    other = dataclasses.replace(tiny(), autoencoder=dataclasses.replace(tiny().autoencoder, z_channels=8))
    with pytest.raises(
        TrainingError, match=r"has the autoencoder .*'z_channels': 4.* give the one that it was trained"
    ):
        train(other, "photos", out, threads=1, init_from=start)
    with pytest.raises(
        ConfigError, match="lora_rank is 2 and there are no weights to adapt; give a reference with --init"
    ):
        train(dataclasses.replace(tiny(), lora_rank=2), "photos", out, threads=1)
    assert not out.exists()


def test_adapters_need_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TrainingError, match=r"lora_rank is 2 and peft is not installed; install ldm_deploy\[train\]"):
        add_lora(unet(), 2)
