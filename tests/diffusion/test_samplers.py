"""Every sampler against diffusers, step by step, on the same predictions; and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_deploy.diffusion.samplers import (
    SAMPLERS,
    SamplerRun,
    ddim_step,
    ddpm_step,
    dpmsolver_step,
    noise_levels,
    predicted_noise,
    predicted_original,
)
from ldm_deploy.diffusion.schedule import Schedule
from tests.diffusion.test_schedule import SCHEDULES, diffusers_ddim


def close(ours, reference, tolerance=1e-5):
    """Relative where values are above 1."""
    return np.abs(ours - reference).max() <= tolerance * max(1.0, np.abs(reference).max())


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
        # Noise from a predicted x_0 is divided by sqrt(1 - a), and diffusers computes 1 - a in float32.
        assert close(ours, reference, 1e-4 if schedule.prediction_type == "sample" else 1e-5)
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
        ours = ddim_step(sample, prediction, level, next_level, schedule.prediction_type)
        assert close(ours, reference, 1e-4 if schedule.prediction_type == "sample" else 1e-5)


def true_prediction(image, noise, level, prediction_type):
    if prediction_type == "sample":
        return image
    return noise if prediction_type == "epsilon" else np.sqrt(level) * noise - np.sqrt(1 - level) * image


@pytest.mark.parametrize("steps", [7, 10, 400, 999])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_with_the_true_prediction_recovers_the_image(prediction_type, steps):
    schedule = Schedule(prediction_type=prediction_type, rescale_zero_terminal_snr=prediction_type != "epsilon")
    rng = np.random.default_rng(1)
    image, noise = rng.standard_normal((2, 1, 4, 4, 4))
    levels = noise_levels(schedule, steps)
    level = levels[0][1]
    sample = np.sqrt(level) * image + np.sqrt(1 - level) * noise
    for _, level, following in levels:
        truth = true_prediction(image, noise, level, prediction_type)
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


def same_schedule(name, schedule, **options):
    """diffusers' scheduler `name` with the settings of ours."""
    import diffusers

    return getattr(diffusers, name)(
        num_train_timesteps=schedule.num_train_timesteps,
        beta_schedule=schedule.beta_schedule,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        prediction_type=schedule.prediction_type,
        rescale_betas_zero_snr=schedule.rescale_zero_terminal_snr,
        timestep_spacing=schedule.timestep_spacing,
        **options,
    )


# diffusers turns a tensor into an array in a way that numpy 2 warns about.
OLD_NUMPY_CALL = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PLAIN = [
    Schedule(prediction_type=prediction_type, rescale_zero_terminal_snr=False, beta_schedule=beta_schedule)
    for prediction_type in ("epsilon", "v_prediction", "sample")
    for beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
]


@pytest.mark.parametrize("schedule", PLAIN)
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@OLD_NUMPY_CALL
def test_dpmsolver_equals_diffusers_step_by_step(schedule, steps):
    theirs = same_schedule("DPMSolverMultistepScheduler", schedule)  # 2M, midpoint, last sigma zero by default
    theirs.set_timesteps(steps)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
    run = SamplerRun("dpmsolver++", schedule, steps, noise=None)
    for index, expected in enumerate(theirs.timesteps):
        assert run.levels[index][0] == expected
        prediction = rng.standard_normal(sample.shape, dtype=np.float32)
        reference = theirs.step(torch.from_numpy(prediction), expected, torch.from_numpy(sample)).prev_sample.numpy()
        ours = run.step(index, sample, prediction)
        # At the cosine schedule's first level x_0 is 2000 times the prediction, and diffusers works in float32.
        np.testing.assert_allclose(ours, reference, rtol=1e-3, atol=2e-5 * max(1, np.abs(reference).max()))
        sample = ours.astype(np.float32)


def test_dpmsolver_is_second_order_and_ddim_first():
    """On the exact x_0 of a Gaussian with standard deviation s, where the ODE's solution is known."""
    schedule, spread = Schedule(rescale_zero_terminal_snr=False, timestep_spacing="leading"), 0.5

    def error(sampler, steps):
        run = SamplerRun(sampler, schedule, steps, noise=None)
        first = run.levels[0][1]
        start = np.float64(np.sqrt(first * spread**2 + 1 - first))
        sample = start
        for index, (_, level, _) in enumerate(run.levels[:-1]):
            variance = level * spread**2 + 1 - level
            original = np.sqrt(level) * spread**2 / variance * sample  # E[x_0 | x_t]
            noise = (sample - np.sqrt(level) * original) / np.sqrt(1 - level)
            prediction = np.sqrt(level) * noise - np.sqrt(1 - level) * original
            sample = run.step(index, sample, prediction)
        last = run.levels[-1][1]
        return abs(sample / np.sqrt(last * spread**2 + 1 - last) - 1)  # the ODE keeps x_t / std(x_t)

    assert error("dpmsolver++", 200) < error("dpmsolver++", 100) / 3
    assert error("ddim", 100) / 2.5 < error("ddim", 200) < error("ddim", 100) / 1.7


def test_dpmsolver_after_pure_noise_is_first_order():
    """diffusers puts a = 2^-24 there instead of 0; its second step then is first order too, to seven digits."""
    rng = np.random.default_rng(1)
    sample, original, before = rng.standard_normal((3, 1, 4, 4, 4))
    exact = dpmsolver_step(sample, original, 0.01, 0.2, (before, 0.0))
    np.testing.assert_allclose(exact, dpmsolver_step(sample, original, 0.01, 0.2))
    np.testing.assert_allclose(
        dpmsolver_step(sample, original, 0.0, 0.2), np.sqrt(0.8) * sample + np.sqrt(0.2) * original
    )


@pytest.mark.parametrize("schedule", [schedule for schedule in PLAIN if schedule.prediction_type != "sample"])
@pytest.mark.parametrize("steps", [1, 5, 20])
@OLD_NUMPY_CALL
def test_euler_equals_diffusers_step_by_step(schedule, steps):
    theirs = same_schedule("EulerDiscreteScheduler", schedule)
    theirs.set_timesteps(steps)
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
    run = SamplerRun("euler", schedule, steps, noise=None)
    for index, expected in enumerate(theirs.timesteps):
        _, level, following = run.levels[index]
        prediction = rng.standard_normal(sample.shape, dtype=np.float32)
        scaled = torch.from_numpy(sample / np.float32(np.sqrt(level)))  # theirs is x / sqrt(a)
        torch.testing.assert_close(
            theirs.scale_model_input(scaled, expected), torch.from_numpy(sample), rtol=1e-4, atol=1e-5
        )
        reference = theirs.step(torch.from_numpy(prediction), expected, scaled).prev_sample.numpy() * np.sqrt(following)
        ours = run.step(index, sample, prediction)
        # Theirs computes in float32 with x / sqrt(a), which is 14000 at the cosine schedule's first level.
        np.testing.assert_allclose(ours, reference, rtol=1e-3, atol=5e-5 + 6e-7 / np.sqrt(level))
        sample = ours.astype(np.float32)


@pytest.mark.parametrize("schedule", [Schedule(), *PLAIN])
def test_euler_is_ddim_in_other_coordinates(schedule):
    rng = np.random.default_rng(4)
    for _, level, following in noise_levels(schedule, 8):
        sample, prediction = rng.standard_normal((2, 1, 4, 4, 4))
        args = (sample, prediction, level, following, schedule.prediction_type)
        run = SamplerRun("euler", schedule, 8, noise=None)
        index = [entry[1] for entry in run.levels].index(level)
        np.testing.assert_allclose(run.step(index, sample, prediction), ddim_step(*args), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("schedule", [Schedule(), *PLAIN[:7:3]])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_equals_diffusers_step_by_step(schedule, steps, monkeypatch):
    from diffusers.schedulers import scheduling_lcm

    theirs = same_schedule("LCMScheduler", schedule, clip_sample=False)
    run = SamplerRun("lcm", schedule, steps, noise=lambda index: noises[index])
    theirs.set_timesteps(timesteps=[level[0] for level in run.levels])
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((2, 4, 8, 8), dtype=np.float32)
    noises = rng.standard_normal((steps, *sample.shape), dtype=np.float32)
    for index, expected in enumerate(theirs.timesteps):
        monkeypatch.setattr(
            scheduling_lcm, "randn_tensor", lambda *args, index=index, **kwargs: torch.from_numpy(noises[index])
        )
        prediction = rng.standard_normal(sample.shape, dtype=np.float32)
        reference = theirs.step(torch.from_numpy(prediction), expected, torch.from_numpy(sample)).prev_sample.numpy()
        ours = run.step(index, sample, prediction)
        assert close(ours, reference)
        sample = ours.astype(np.float32)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [Schedule(), Schedule(prediction_type="sample", shift=2.0)])
def test_every_sampler_ends_in_the_image_if_the_prediction_is_true(sampler, schedule):
    rng = np.random.default_rng(5)
    image, noise = rng.standard_normal((2, 1, 4, 4, 4))
    run = SamplerRun(
        sampler, schedule, 6, noise=lambda index: np.random.default_rng(index).standard_normal(image.shape)
    )
    sample = noise
    for index, (_, level, _) in enumerate(run.levels):
        left = (sample - np.sqrt(level) * image) / np.sqrt(1 - level)
        sample = run.step(index, sample, true_prediction(image, left, level, schedule.prediction_type))
        assert np.isfinite(sample).all()
    # LCM's c_out is not quite 1, nor its c_skip 0, at the last timestep it visits.
    np.testing.assert_allclose(sample, image, atol=1e-5 if sampler == "lcm" else 1e-9)
