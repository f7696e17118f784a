"""Both stages: they learn, they resume bit for bit, and they stop with the state kept."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from ldm_deploy.config import PRESETS, Config, StageConfig
from ldm_deploy.errors import DataError, TrainingError
from ldm_deploy.models.reference import load_reference
from ldm_deploy.training.diffusion import latent_scale
from ldm_deploy.training.ema import Ema
from ldm_deploy.training.loop import learning_rate, run_stage
from ldm_deploy.training.losses import kl_divergence
from ldm_deploy.training.train import train


def tiny(**stages: int) -> Config:
    """The preset "tiny" in fp32 with other numbers of steps."""
    config = PRESETS["tiny"]
    return dataclasses.replace(
        config,
        autocast_bf16=False,
        autoencoder_training=dataclasses.replace(
            config.autoencoder_training, steps=stages.get("autoencoder", 4), checkpoint_every=2
        ),
        diffusion_training=dataclasses.replace(
            config.diffusion_training, steps=stages.get("diffusion", 4), checkpoint_every=2
        ),
    )


def test_kl_divergence_equals_torch():
    torch.manual_seed(0)
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    ).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, logvar), theirs)


def test_latent_scale_is_one_over_the_standard_deviation_of_samples():
    torch.manual_seed(0)
    mean, std = 3 * torch.randn(400, 4, 8, 8), torch.full((400, 4, 8, 8), 2.0)
    samples = mean + std * torch.randn_like(mean)
    assert latent_scale(mean, std) == pytest.approx(1 / samples.std().item(), rel=0.01)


def test_learning_rate_warms_up_and_decays_to_zero():
    config = StageConfig(steps=1000, batch_size=1, learning_rate=2e-3, warmup_steps=100)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] < 3e-5
    assert max(rates) == pytest.approx(2e-3, rel=0.05)
    assert rates[-1] < 1e-7
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))


def test_learning_rate_restarts_where_asked():
    config = StageConfig(steps=1500, batch_size=1, learning_rate=1e-3, warmup_steps=10, restarts=(1000,))
    whole = StageConfig(steps=1000, batch_size=1, learning_rate=1e-3, warmup_steps=10)
    assert [learning_rate(config, step) for step in range(1000)] == [learning_rate(whole, step) for step in range(1000)]
    assert learning_rate(config, 999) < 1e-8
    assert learning_rate(config, 1010) > 0.99e-3
    assert learning_rate(config, 1250) == pytest.approx(0.5e-3)
    assert learning_rate(config, 1499) < 1e-7


def test_ema_start_is_unbiased_and_the_limit_is_the_decay():
    module = nn.Linear(1, 1, bias=False)
    ema = Ema(module, decay=0.9)
    module.weight.data.fill_(1.0)
    before = ema.averages["weight"].item()
    ema.update(module, step=0)
    assert ema.averages["weight"].item() == pytest.approx(before + 0.9 * (1 - before))  # decay 1/10 at the start
    before = ema.averages["weight"].item()
    ema.update(module, step=10**6)
    assert ema.averages["weight"].item() == pytest.approx(before + 0.1 * (1 - before))


def quadratic(directory, *, resume=False, stop_at=None, poison_at=None, poison="loss", fingerprint="f"):
    """A stage that fits a vector to 1; `stop_at` kills it there, `poison` is not finite at `poison_at`."""
    torch.manual_seed(0)
    module = nn.Linear(3, 1)
    config = StageConfig(steps=10, batch_size=1, learning_rate=0.1, warmup_steps=1, checkpoint_every=3)

    def loss(step, rows):
        if step == stop_at:
            raise KeyboardInterrupt
        noise = torch.from_numpy(np.random.default_rng(step).standard_normal((8, 3), dtype=np.float32))
        value = (module(noise) - 1).square().mean()
        if step == poison_at and poison == "loss":
            value = value * float("nan")
        if step == poison_at and poison == "gradient norm":
            value = value + (module.weight * 0).norm().sqrt()  # a root's slope at 0
        return value, {"extra": 1.0}

    return run_stage("stage", module, loss, config, directory, fingerprint, resume=resume)


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = quadratic(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quadratic(tmp_path / "cut", stop_at=8)
    resumed = quadratic(tmp_path / "cut", resume=True)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])


def test_the_log_of_a_run_killed_while_writing_it_continues(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quadratic(whole)
    with pytest.raises(KeyboardInterrupt):
        quadratic(cut, stop_at=8)
    with (cut / "stage.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    quadratic(cut, resume=True)
    losses = [
        [(line["step"], line["loss"]) for line in map(json.loads, (run / "stage.jsonl").read_text().splitlines())]
        for run in (whole, cut)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [0, 9]


def test_checkpoint_is_neither_overwritten_nor_taken_for_another_runs(tmp_path):
    quadratic(tmp_path)
    with pytest.raises(TrainingError, match="add --resume to continue it"):
        quadratic(tmp_path)
    with pytest.raises(TrainingError, match="another configuration or other data"):
        quadratic(tmp_path, resume=True, fingerprint="other")
    file = tmp_path / "stage.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TrainingError, match="is damaged"):
        quadratic(tmp_path, resume=True)


@pytest.mark.parametrize("poison", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_with_the_last_good_checkpoint_named(tmp_path, poison):
    with pytest.raises(TrainingError, match=rf"{poison} is nan at step 7; the last good state is .*stage\.safetensors"):
        quadratic(tmp_path, poison_at=7, poison=poison)
    resumed = quadratic(tmp_path, resume=True)
    assert all(torch.isfinite(value).all() for value in resumed.values())


def test_train_writes_a_reference_that_loads(tmp_path):
    out = tmp_path / "model"
    figures = {
        "held_out": {"psnr_db": None, "psnr_db_not_white": None, "ssim": None, "n": 0, "reason": "none held out"},
        "photographs": {"china.jpg": {"size": "192x320", "psnr_db": 24.65, "ssim": 0.79, "reason": None}},
        "retrieval": {
            "rate": 0.25, "hits": 12, "n": 48, "gallery": 512, "method": "pixels", "sampler": "ddim", "steps": 50,
            "guidance_scale": 5.0, "reason": None,
        },
        "retrieval_without_guidance": {"rate": None, "reason": "no time"},
        "prompts": ["cat", "retina"],
    }  # fmt: skip

    def score(directory, data, picture):
        picture.write_bytes(b"PNG")
        return {"asked": data, **figures}

    record = train(tiny(), "photos", out, threads=1, score=score, report_prompts=["cat", "retina"])
    reference = load_reference(out)
    assert 0 < reference.model["scale_factor"] < math.inf
    assert record["figures"] == {"asked": "photos", **figures}
    card = (out / "README.md").read_text()
    assert "| reconstruction, PSNR | not measured | none held out |" in card
    assert "| photograph china.jpg, PSNR | 24.65 dB | 192x320 pixels, never trained on |" in card
    assert "| retrieval | 25.0% | 12 of 48 samples are nearest, of 512 images by pixels, to one with" in card
    assert "ddim, 50 steps, guidance 5 |" in card
    assert "| retrieval without guidance | not measured | no time |" in card
    assert "![samples](samples.png)\n\nSeed 0, row by row: cat, retina." in card
    assert reference.model["prompts"]["report"] == ["cat", "retina"]
    assert {"cat", "retina"}.isdisjoint(reference.model["prompts"]["calibration"])
    assert record["stages"]["diffusion"]["steps"] == 4
    assert json.loads((out / "training.json").read_text())["command"].startswith("ldm-deploy train tiny --data photos")
    with pytest.raises(TrainingError, match="exists; remove it"):
        train(tiny(), "photos", out)


def test_training_lowers_both_losses(tmp_path):
    stage = StageConfig(steps=121, batch_size=8, learning_rate=3e-3, warmup_steps=5)
    config = dataclasses.replace(tiny(), autoencoder_training=stage, diffusion_training=stage)
    train(config, "photos", tmp_path / "model", threads=1)
    for name in ("autoencoder", "diffusion"):
        log = (tmp_path / "model.training" / f"{name}.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in log]
        assert np.mean(losses[-3:]) < 0.9 * losses[0]


def test_data_smaller_than_a_batch_is_refused(tmp_path):
    config = dataclasses.replace(
        tiny(), diffusion_training=StageConfig(steps=1, batch_size=100_000, learning_rate=1e-3)
    )
    with pytest.raises(DataError, match="fewer than one batch"):
        train(config, "photos", tmp_path / "model")
