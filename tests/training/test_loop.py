"""The loop under load: killed, split over processes, with less memory, watched."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ldm_deploy.config import PRESETS, ObjectiveConfig, StageConfig
from ldm_deploy.diffusion.objective import min_snr_weights
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.models.reference import describe
from ldm_deploy.models.unet import UNet
from ldm_deploy.training import diffusion
from ldm_deploy.training.checkpointing import checkpoint_blocks
from ldm_deploy.training.diffusion import train_denoiser
from ldm_deploy.training.ema import Ema
from ldm_deploy.training.loop import rng, run_stage
from ldm_deploy.training.processes import Processes
from ldm_deploy.training.train import train

DRIVER = """
import dataclasses, sys
from pathlib import Path
from ldm_deploy.config import PRESETS, AutoencoderLossConfig, StageConfig
from ldm_deploy.progress import set_quiet
from ldm_deploy.training.train import train

set_quiet(True)
steps, batch = int(sys.argv[2]), int(sys.argv[3])
stage = StageConfig(steps, batch, 1e-3, checkpoint_every=2)
first = dataclasses.replace(stage, steps=4)
config = dataclasses.replace(
    PRESETS["tiny"], autocast_bf16=False, autoencoder_training=first, diffusion_training=stage,
    autoencoder=dataclasses.replace(PRESETS["tiny"].autoencoder, kind=sys.argv[4], codebook_size=32),
    autoencoder_loss=AutoencoderLossConfig(
        gan_weight=0.5, disc_channels=8, disc_layers=1, codebook_averaged=True, restart_codes_after=2
    ),
)
train(config, "photos", Path(sys.argv[1]), resume=True, threads=1)
"""


def start(out, steps, batch, kind="kl", **environment):
    command = [sys.executable, "-W", "error", "-c", DRIVER, str(out), str(steps), str(batch), kind]
    return subprocess.Popen(command, env={**os.environ, **environment})


def weights(out):
    return {
        f"{name}.{key}": value
        for name in ("autoencoder", "diffusion")
        for key, value in load_file(out.with_name(out.name + ".training") / f"{name}.safetensors").items()
    }


def losses(out):
    lines = (out.with_name(out.name + ".training") / "diffusion.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def test_a_run_killed_at_any_moment_equals_the_uninterrupted_one(tmp_path):
    steps = 120
    whole = start(tmp_path / "whole", steps, 2)
    cut = tmp_path / "cut"
    checkpoint = tmp_path / "cut.training" / "diffusion.safetensors"
    victim = start(cut, steps, 2)
    while not checkpoint.exists():
        assert victim.poll() is None
        time.sleep(0.01)
    time.sleep(0.001 * (time.time_ns() % 100))  # anywhere: between steps, or while it writes
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not cut.exists()
    assert start(cut, steps, 2).wait(200) == 0
    assert whole.wait(200) == 0
    assert losses(cut) == losses(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    for name, value in weights(cut).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_two_processes_equal_one(tmp_path, kind):
    """With an adversary, whose weight is that of the whole batch, and with the statistics of a codebook."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }  # as torchrun sets them
    pair = [start(tmp_path / "pair", 6, 5, kind, RANK=rank, LOCAL_RANK=rank, **place) for rank in ("0", "1")]
    single = start(tmp_path / "single", 6, 5, kind)
    assert [process.wait(200) for process in (*pair, single)] == [0, 0, 0]
    expected = weights(tmp_path / "single")
    for name, value in weights(tmp_path / "pair").items():
        if ".model." in name or ".buffer." in name:
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    (_, first), *_ = losses(tmp_path / "pair")
    assert first == pytest.approx(losses(tmp_path / "single")[0][1], rel=1e-5)


def test_the_parts_of_a_batch_cover_it_once():
    for batch, count, accumulation in ((8, 2, 2), (5, 2, 3), (7, 3, 4), (2, 3, 2)):
        parts = [part for rank in range(count) for part in Processes(rank, count).parts(batch, accumulation)]
        assert all(part.start < part.stop for part in parts)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(batch))


def regression(directory, accumulation, preview=None, preview_every=0, steps=30):
    torch.manual_seed(0)
    module = nn.Linear(3, 2)

    def loss(step, rows):
        noise = torch.from_numpy(np.random.default_rng(step).standard_normal((7, 3), dtype=np.float32))[rows]
        return (module(noise) - 1).square().mean(), {"largest": noise.sum(dim=1).mean().item()}

    config = StageConfig(
        steps, 7, 0.05, warmup_steps=1, accumulation=accumulation, preview_every=preview_every, ema_decay=0.5
    )
    return run_stage("stage", module, loss, config, directory, "f", resume=False, preview=preview)


def test_accumulation_changes_nothing_but_memory(tmp_path):
    whole, parts = regression(tmp_path / "1", 1), regression(tmp_path / "3", 3)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)
    lines = [[json.loads(line) for line in (tmp_path / run / "stage.jsonl").read_text().splitlines()] for run in "13"]
    for ours, theirs in zip(*lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["largest"] == pytest.approx(theirs["largest"], rel=1e-4, abs=1e-6)


def test_scalars_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    regression(tmp_path, 1)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "stage"))
    events.Reload()
    logged = {
        line["step"]: line["loss"] for line in map(json.loads, (tmp_path / "stage.jsonl").read_text().splitlines())
    }
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx(logged)
    assert list(shown) == [0, 20, 29]


def test_a_preview_sees_the_averages_and_leaves_the_training_alone(tmp_path):
    seen = []

    def preview(module, step):
        seen.append((step, module.weight.detach().clone()))
        assert not module.training
        return {"held_out_psnr_db": float(step)}

    watched = regression(tmp_path / "watched", 1, preview, preview_every=10)
    alone = regression(tmp_path / "alone", 1)
    assert [step for step, _ in seen] == [10, 20, 30]
    torch.testing.assert_close(seen[-1][1], watched["weight"])
    for name, value in alone.items():
        assert torch.equal(watched[name], value)
    lines = [json.loads(line) for line in (tmp_path / "watched" / "stage.jsonl").read_text().splitlines()]
    assert [line["held_out_psnr_db"] for line in lines if "held_out_psnr_db" in line] == [10.0, 20.0, 30.0]


def test_averages_are_taken_out_again_after_an_error():
    module = nn.Linear(2, 2)
    ema = Ema(module, 0.9)
    module.weight.data += 1
    own = module.weight.detach().clone()
    with pytest.raises(KeyError), ema.applied(module):
        assert not torch.equal(module.weight, own)
        raise KeyError
    assert torch.equal(module.weight, own)
    assert module.training


def unet_gradients(checkpointed):
    torch.manual_seed(0)
    unet = UNet(4, **{**UNET, "context_channels": 8})
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    if checkpointed:
        checkpoint_blocks(unet)
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = unet(torch.randn(2, 4, 16, 16), torch.tensor([1, 900]), torch.randn(2, 3, 8)).square().sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters()}, kept


UNET = dataclasses.asdict(PRESETS["tiny"].unet)


def test_gradient_checkpointing_keeps_less_and_changes_nothing():
    (plain, much), (checkpointed, little) = unet_gradients(False), unet_gradients(True)
    assert little < 0.3 * much
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "objective", [ObjectiveConfig(), ObjectiveConfig(min_snr_gamma=5.0), ObjectiveConfig("logit_normal", 5.0, 0.1)]
)
def test_the_loss_is_that_of_the_objective(tmp_path, monkeypatch, prediction_type, objective):
    """A fresh U-Net predicts zero, so the loss is the weighted mean square of what it should have predicted."""
    schedule = Schedule(prediction_type=prediction_type, rescale_zero_terminal_snr=False)
    config = dataclasses.replace(PRESETS["tiny"], schedule=schedule, objective=objective, autocast_bf16=False)
    stage = dataclasses.replace(config.diffusion_training, batch_size=16)
    config = dataclasses.replace(config, diffusion_training=stage)
    found = []

    def once(name, module, loss, *rest, **options):
        found.append(loss(7, slice(0, 16))[0].item())
        found.append(sum(loss(7, slice(row, row + 1))[0].item() for row in range(16)) / 16)
        return module.state_dict()

    monkeypatch.setattr(diffusion, "run_stage", once)
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(5, 4, 8, 8, generator=generator), torch.rand(5, 4, 8, 8, generator=generator)
    ids = np.ones((5, 4), dtype=np.int64)
    text_encoder = {"vocab_size": 20, "context_length": 4, "width": 32, "layers": 1, "head_channels": 16}
    described = describe(config, 0.7, text_encoder, {})
    train_denoiser(config, described, lambda size: (mean, std), ids, [0, 1, 2, 3], tmp_path, "f", resume=False)

    draw = rng(config.seed, "diffusion", 7)
    rows = draw.integers(5, size=16)
    if objective.timestep_sampling == "uniform":
        timestep = draw.integers(1000, size=16)
    else:
        timestep = (1000 / (1 + np.exp(-draw.standard_normal(16)))).astype(int)
    draw.random(16)
    posterior = draw.standard_normal((16, 4, 8, 8), dtype=np.float32)
    noise = draw.standard_normal((16, 4, 8, 8), dtype=np.float32)
    if objective.offset_noise:
        noise = noise + np.float32(objective.offset_noise) * draw.standard_normal((16, 4, 1, 1), dtype=np.float32)
    latent = 0.7 * (mean.numpy()[rows] + std.numpy()[rows] * posterior)
    level = schedule.alphas_cumprod[timestep][:, None, None, None]
    target = {
        "epsilon": noise, "sample": latent, "v_prediction": np.sqrt(level) * noise - np.sqrt(1 - level) * latent
    }[prediction_type]  # fmt: skip
    gamma = objective.min_snr_gamma
    weight = min_snr_weights(schedule.alphas_cumprod, gamma, prediction_type)[timestep] if gamma else np.ones(16)
    expected = (weight * (target**2).mean(axis=(1, 2, 3))).mean()
    assert found == pytest.approx([expected, expected], rel=1e-4)


def test_previews_of_a_whole_run(tmp_path):
    rng_ = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    rows = ["file_name,text"]
    for index in range(90, 130):  # 96, 105 and 127 are held out
        Image.fromarray(rng_.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        rows.append(f"{index}.png,thing {index}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    stage = dataclasses.replace(PRESETS["tiny"].diffusion_training, preview_every=2)
    config = dataclasses.replace(
        PRESETS["tiny"], autocast_bf16=False, photo_fraction=0.0, autoencoder_training=stage, diffusion_training=stage
    )
    train(
        config, folder, tmp_path / "model", threads=1, measure=lambda a, b: {"difference": float(np.abs(a - b).mean())}
    )
    previews = tmp_path / "model.training" / "previews"
    names = [f"{name}-{step:06d}.png" for name in ("autoencoder", "diffusion") for step in (2, 4)]
    assert sorted(file.name for file in previews.iterdir()) == names
    with Image.open(previews / "diffusion-000004.png") as sheet:
        assert sheet.size == (4 * 32, 4 * 32)
    log = (tmp_path / "model.training" / "autoencoder.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if "difference" in json.loads(line)] == [1, 3]
