"""Noise levels and timesteps against diffusers' DDIM scheduler."""

from __future__ import annotations

import numpy as np
import pytest

from ldm_deploy.diffusion.objective import snr
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import ConfigError


def diffusers_ddim(schedule: Schedule):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=schedule.num_train_timesteps,
        beta_schedule=schedule.beta_schedule,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        prediction_type=schedule.prediction_type,
        rescale_betas_zero_snr=schedule.rescale_zero_terminal_snr,
        timestep_spacing=schedule.timestep_spacing,
        steps_offset=1 if schedule.timestep_spacing == "leading" else 0,
        clip_sample=False,
        set_alpha_to_one=True,
    )


SCHEDULES = [
    Schedule(),
    Schedule(timestep_spacing="leading"),
    Schedule(rescale_zero_terminal_snr=False),
    Schedule(rescale_zero_terminal_snr=False, prediction_type="epsilon"),
    Schedule(rescale_zero_terminal_snr=False, prediction_type="epsilon", timestep_spacing="leading"),
    Schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, rescale_zero_terminal_snr=False),
    Schedule(beta_schedule="squaredcos_cap_v2", rescale_zero_terminal_snr=False),
    Schedule(prediction_type="sample"),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alphas_cumprod_equal_diffusers(schedule):
    theirs = diffusers_ddim(schedule).alphas_cumprod.numpy()
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=1e-4, atol=1e-6)  # theirs are float32
    assert (np.diff(schedule.alphas_cumprod) < 0).all()


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_start():
    plain, rescaled = Schedule(rescale_zero_terminal_snr=False), Schedule()
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0])


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 7, 50, 333])
def test_timesteps_equal_diffusers(spacing, steps):
    schedule = Schedule(timestep_spacing=spacing)
    theirs = diffusers_ddim(schedule)
    theirs.set_timesteps(steps)
    np.testing.assert_array_equal(schedule.timesteps(steps), theirs.timesteps.numpy())


def test_impossible_schedules_are_refused():
    with pytest.raises(ConfigError, match="steps is 0; allowed: 1 to 1000"):
        Schedule().timesteps(0)
    with pytest.raises(ConfigError, match="steps is 1001; allowed: 1 to 1000"):
        Schedule().timesteps(1001)
    with pytest.raises(ConfigError, match="must satisfy 0 < beta_start"):
        Schedule(beta_start=0.5, beta_end=0.1)
    with pytest.raises(ConfigError, match="unknown key 'betas'"):
        Schedule.from_dict({"betas": 1})
    assert Schedule.from_dict(Schedule().to_dict()) == Schedule()


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_divides_the_signal_to_noise_ratio_by_its_square(shift, rescale):
    from diffusers import CogVideoXDDIMScheduler

    schedule = Schedule(shift=shift, rescale_zero_terminal_snr=rescale)
    theirs = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", snr_shift_scale=shift**2, rescale_betas_zero_snr=rescale
    )
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-6)
    if not rescale:
        plain = snr(Schedule(rescale_zero_terminal_snr=False).alphas_cumprod)
        np.testing.assert_allclose(snr(schedule.alphas_cumprod), plain / shift**2, rtol=1e-9)


def test_a_shift_that_means_nothing_is_refused():
    for shift in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=rf"shift is {shift}; give a number above 0"):
            Schedule(shift=shift)
