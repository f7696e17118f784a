"""Loss weights, timesteps and noise of training, against published formulas, diffusers and their distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_deploy.diffusion.objective import min_snr_weights, offset_noise, sample_timesteps, snr
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import ConfigError


def test_snr_equals_diffusers():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    ours = snr(Schedule(rescale_zero_terminal_snr=False).alphas_cumprod)
    np.testing.assert_allclose(ours, compute_snr(theirs, torch.arange(1000)).numpy(), rtol=1e-3)


def test_min_snr_weights_say_the_same_of_every_kind_of_prediction():
    """The errors are proportional: |x_0 error|^2 = |eps error|^2 / SNR = |v error|^2 / (SNR + 1)."""
    levels = Schedule(rescale_zero_terminal_snr=False).alphas_cumprod
    ratio = snr(levels)
    original = min_snr_weights(levels, 5.0, "sample")
    np.testing.assert_array_equal(original, np.minimum(ratio, 5.0))
    np.testing.assert_allclose(min_snr_weights(levels, 5.0, "epsilon") * ratio, original)
    np.testing.assert_allclose(min_snr_weights(levels, 5.0, "v_prediction") * (ratio + 1), original)


def test_min_snr_weights_without_any_signal():
    levels = Schedule().alphas_cumprod  # the last one is 0
    assert min_snr_weights(levels, 5.0, "v_prediction")[-1] == 0
    with pytest.raises(ConfigError, match="need signal at every timestep; predict v instead"):
        min_snr_weights(levels, 5.0, "epsilon")


def test_uniform_timesteps_cover_everything_evenly():
    drawn = sample_timesteps(np.random.default_rng(0), 100_000, 10, "uniform")
    assert drawn.dtype == np.int64
    np.testing.assert_allclose(np.bincount(drawn, minlength=10) / 1e5, 0.1, atol=0.01)


def test_logit_normal_timesteps_are_logit_normal():
    drawn = sample_timesteps(np.random.default_rng(0), 100_000, 1000, "logit_normal")
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    logit = np.log((drawn + 0.5) / (1000 - drawn - 0.5))
    assert logit.mean() == pytest.approx(0, abs=0.02)
    assert logit.std() == pytest.approx(1, abs=0.02)


def test_offset_noise_adds_one_number_per_channel():
    plain = offset_noise(np.random.default_rng(0), (4000, 2, 4, 4), 0.0)
    offset = offset_noise(np.random.default_rng(0), (4000, 2, 4, 4), 0.5)
    assert plain.dtype == offset.dtype == np.float32
    added = offset - plain
    np.testing.assert_allclose(added, np.broadcast_to(added[..., :1, :1], added.shape), atol=1e-6)
    assert added[..., 0, 0].std() == pytest.approx(0.5, abs=0.02)
    assert plain.std() == pytest.approx(1.0, abs=0.02)
