"""Progressive distillation against a teacher that is known exactly, and through the command's function."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from ldm_deploy.config import PRESETS as MODELS
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import PromptError, TrainingError
from ldm_deploy.models.reference import load_reference
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.training.consistency import Levels, solver_grid
from ldm_deploy.training.distill_config import PRESETS
from ldm_deploy.training.distill_progressive import stage_names
from ldm_deploy.training.distill_steps import distill_steps
from ldm_deploy.training.progressive import original_loss, snr_weights, two_step_original
from ldm_deploy.training.train import train
from tests.training.gaussian import teacher

SCHEDULE = Schedule()


def levels() -> Levels:
    tables = Levels.of(SCHEDULE)
    return Levels(*(getattr(tables, name).double() for name in ("signal", "spread", "c_skip", "c_out")), tables.kind)


def links(steps):
    """Every step of a student of `steps`: where it starts, its middle and its end, and noisy samples at the start."""
    grid = torch.from_numpy(solver_grid(SCHEDULE, 2 * steps))
    torch.manual_seed(0)
    latent = 0.7 + 0.6 * torch.randn(steps, 1, 4, 4, dtype=torch.float64)
    noise = torch.randn_like(latent)
    return grid[0:-1:2], grid[1::2], grid[2::2], levels().noised(latent, noise, grid[0:-1:2])


def test_one_step_to_the_target_ends_where_two_of_the_teachers_do():
    at = levels()
    now, middle, then, sample = links(8)
    halfway = at.ddim_step(sample, teacher(at)(sample, now), now, middle)
    end = at.ddim_step(halfway, teacher(at)(halfway, middle), middle, then)
    wanted = two_step_original(teacher(at), sample, now, middle, then, at)
    signal, spread = at.at(now)
    as_v = (signal * sample - wanted) / spread
    torch.testing.assert_close(at.ddim_step(sample, as_v, now, then), end, rtol=0, atol=1e-6)  # tables are float32


def test_the_loss_is_zero_for_the_target_and_not_for_the_teacher():
    at = levels()
    now, middle, then, sample = links(8)
    wanted = two_step_original(teacher(at), sample, now, middle, then, at)
    signal, spread = at.at(now)

    def exact(sample, timestep):
        return (signal * sample - wanted) / spread

    assert original_loss(exact, wanted, sample, now, at, "truncated").max() < 1e-15
    assert original_loss(teacher(at), wanted, sample, now, at, "truncated").max() > 1e-4
    assert original_loss(lambda *given: exact(*given) + 0.3, wanted, sample, now, at, "snr+1") == pytest.approx(
        torch.full((8,), 0.09).double(),
        rel=1e-6,  # SNR + 1 makes it the squared error of v
    )


def test_the_weights_are_those_of_the_paper():
    at, timesteps = levels(), torch.tensor([999, 500, 24])
    a = SCHEDULE.alphas_cumprod[timesteps.numpy()]
    np.testing.assert_allclose(snr_weights(at, timesteps, "truncated").numpy(), np.maximum(a / (1 - a), 1), rtol=1e-4)
    np.testing.assert_allclose(snr_weights(at, timesteps, "snr+1").numpy(), 1 / (1 - a), rtol=1e-4)
    assert snr_weights(at, timesteps, "truncated")[0] == 1  # pure noise still counts


def test_the_stages_halve_down_to_what_was_asked():
    config = dataclasses.replace(PRESETS["cpu-progressive"], solver_steps=32, steps=(4,))
    assert list(stage_names(config)) == [
        ("progressive-guidance", 32), ("progressive-16", 16), ("progressive-8", 8), ("progressive-4", 4),
    ]  # fmt: skip
    alone = dataclasses.replace(config, guidance_min=1.0, guidance_max=1.0)
    assert [steps for _, steps in stage_names(alone)] == [16, 8, 4]
    grids = [solver_grid(SCHEDULE, steps) for steps in (32, 16, 8, 4)]
    for fine, coarse in itertools.pairwise(grids):
        assert (fine[::2] == coarse).all()
    assert (grids[-1][:-1] == SCHEDULE.timesteps(4)).all()


def test_a_student_by_halving_resumes_and_draws(tmp_path, monkeypatch):
    stage = dataclasses.replace(MODELS["tiny"].diffusion_training, steps=4, warmup_steps=1, learning_rate=0.02)
    model = dataclasses.replace(MODELS["tiny"], autocast_bf16=False, diffusion_training=stage)
    train(model, "photos", tmp_path / "teacher", threads=1)
    own = dataclasses.replace(PRESETS["tiny"].training, steps=3, learning_rate=0.01, warmup_steps=1)
    config = dataclasses.replace(PRESETS["tiny"], training=own, steps=(2,), method="progressive")
    record = distill_steps(tmp_path / "teacher", "photos", tmp_path / "whole", config=config, threads=1)
    assert list(record["stages"]) == ["guidance", "4", "2"]
    from ldm_deploy.training import distill_progressive as recipe

    run, seen = recipe.original_loss, []

    def killed(*given):
        seen.append(1)
        if len(seen) == 6:  # in the last step of the second stage
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(recipe, "original_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        distill_steps(tmp_path / "teacher", "photos", tmp_path / "cut", config=config, threads=1)
    monkeypatch.setattr(recipe, "original_loss", run)
    with pytest.raises(TrainingError, match="--resume"):
        distill_steps(tmp_path / "teacher", "photos", tmp_path / "cut", config=config, threads=1)
    distill_steps(tmp_path / "teacher", "photos", tmp_path / "cut", config=config, threads=1, resume=True)
    whole, cut = (load_reference(tmp_path / name) for name in ("whole", "cut"))
    for name, value in whole.unet.state_dict().items():
        assert torch.equal(value, cut.unet.state_dict()[name])
    assert whole.model["distilled"]["steps"] == [2]
    assert whole.model["sampling"] == {"sampler": "ddim", "steps": 2, "guidance_scale": 5.0}
    pipeline = torch_pipeline(whole, threads=1)
    pipeline("cat")
    with pytest.raises(PromptError, match="distilled for 2"):
        pipeline("cat", steps=4)
    assert "| to 4 steps | 3 |" in (tmp_path / "whole" / "README.md").read_text()
    assert json.loads((tmp_path / "whole" / "training.json").read_text())["config"]["method"] == "progressive"
