"""Every sampler against diffusers, step by step, on the same predictions; and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_deploy.diffusion.samplers import ddim_step, ddpm_step, noise_levels, predicted_noise, predicted_original
from ldm_deploy.diffusion.schedule import Schedule
from tests.diffusion.test_schedule import SCHEDULES, diffusers_ddim


def close(ours, reference):
    """1e-5, relative where values are above 1; diffusers computes in float32."""
    return np.abs(ours - reference).max() <= 1e-5 * max(1.0, np.abs(reference).max())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_ddim_equals_diffusers_step_by_step(schedule, steps):
    theirs = diffusers_ddim(schedule)
    theirs.set_timesteps(steps)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
    levels = noise_levels(schedule, steps)
    for (timestep, level, following), expected in zip(levels, theirs.timesteps, strict=True):
        assert timestep == expected
        prediction = rng.standard_normal(sample.shape, dtype=np.float32)
        reference = theirs.step(torch.from_numpy(prediction), expected, torch.from_numpy(sample)).prev_sample.numpy()
        ours = ddim_step(sample, prediction, level, following, schedule.prediction_type)
        assert close(ours, reference)
        sample = ours.astype(np.float32)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [7, 30, 400])
def test_where_steps_do_not_divide_only_the_next_level_differs(schedule, steps):
    """diffusers takes it at t - 1000 // steps, a timestep it need not visit; handed that, our step is theirs."""
    theirs = diffusers_ddim(schedule)
    theirs.set_timesteps(steps)
    rng = np.random.default_rng(2)
    for (timestep, level, _), expected in zip(noise_levels(schedule, steps), theirs.timesteps, strict=True):
        assert timestep == expected
        following = timestep - 1000 // steps
        next_level = schedule.alphas_cumprod[following] if following >= 0 else 1.0
        sample, prediction = rng.standard_normal((2, 1, 4, 4, 4), dtype=np.float32)
        reference = theirs.step(torch.from_numpy(prediction), expected, torch.from_numpy(sample)).prev_sample.numpy()
        assert close(ddim_step(sample, prediction, level, next_level, schedule.prediction_type), reference)


@pytest.mark.parametrize("steps", [7, 10, 400, 999])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_with_the_true_prediction_recovers_the_image(prediction_type, steps):
    schedule = Schedule(prediction_type=prediction_type, rescale_zero_terminal_snr=prediction_type != "epsilon")
    rng = np.random.default_rng(1)
    image, noise = rng.standard_normal((2, 1, 4, 4, 4))
    levels = noise_levels(schedule, steps)
    level = levels[0][1]
    sample = np.sqrt(level) * image + np.sqrt(1 - level) * noise
    for _, level, following in levels:
        truth = noise if prediction_type == "epsilon" else np.sqrt(level) * noise - np.sqrt(1 - level) * image
        np.testing.assert_allclose(predicted_noise(sample, truth, level, prediction_type), noise, atol=1e-9)
        if level > 0:
            np.testing.assert_allclose(predicted_original(sample, truth, level, prediction_type), image, atol=1e-6)
        sample = ddim_step(sample, truth, level, following, prediction_type)
    np.testing.assert_allclose(sample, image, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddpm_equals_diffusers_mean_and_variance(prediction_type):
    from diffusers import DDPMScheduler

    schedule = Schedule(prediction_type=prediction_type, rescale_zero_terminal_snr=False, timestep_spacing="trailing")
    theirs = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule=schedule.beta_schedule, beta_start=schedule.beta_start,
        beta_end=schedule.beta_end, prediction_type=prediction_type, timestep_spacing="trailing",
        clip_sample=False, variance_type="fixed_small",
    )  # fmt: skip
    theirs.set_timesteps(10)
    rng = np.random.default_rng(2)
    for index, (_, level, following) in enumerate(noise_levels(schedule, 10)):
        sample, prediction = (rng.standard_normal((1, 4, 8, 8), dtype=np.float32) for _ in range(2))
        generator = torch.Generator().manual_seed(index)
        reference = theirs.step(
            torch.from_numpy(prediction), theirs.timesteps[index], torch.from_numpy(sample), generator=generator
        ).prev_sample.numpy()
        noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(index)).numpy()
        ours = ddpm_step(sample, prediction, level, following, prediction_type, noise)
        np.testing.assert_allclose(ours, reference, rtol=1e-3, atol=1e-4)


def test_ddpm_adds_no_noise_in_its_last_step():
    sample, prediction, noise = np.random.default_rng(3).standard_normal((3, 1, 4, 4, 4))
    args = (sample, prediction, 0.9, 1.0, "v_prediction")
    np.testing.assert_array_equal(ddpm_step(*args, noise), ddpm_step(*args, 0 * noise))
