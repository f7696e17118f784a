"""The pipeline on a toy bundle: batches, seeds, guidance, samplers, and requests that cannot be served."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

import ldm_deploy
from ldm_deploy.diffusion.samplers import ddim_step, noise_levels
from ldm_deploy.errors import EngineError, PromptError
from ldm_deploy.runtime.noise import gaussian_noise
from tests.tiny_bundle import MODEL, write_tiny_bundle


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def pipeline(directory):
    return ldm_deploy.load(directory, threads=1)


class Recorder:
    """An engine that keeps what it was fed."""

    def __init__(self, engine):
        self.engine = engine
        self.feeds: list[Mapping[str, np.ndarray]] = []

    def run(self, feeds):
        self.feeds.append(feeds)
        return self.engine.run(feeds)


def test_a_batch_equals_its_images_drawn_one_by_one(pipeline):
    prompts, seeds = ["red apple", "cat face", "sun"], [5, 0, 2**63]
    together = pipeline(prompts, seed=seeds)
    assert together.shape == (3, 32, 32, 3)
    assert together.dtype == np.uint8
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        np.testing.assert_array_equal(pipeline(prompt, seed=seed)[0], together[index])
    np.testing.assert_array_equal(pipeline(["sun", "sun"], seed=3), pipeline(["sun", "sun"], seed=[3, 4]))


def test_seed_prompt_and_size_matter(pipeline):
    base = pipeline("sun", seed=0)
    np.testing.assert_array_equal(pipeline("sun", seed=0), base)
    assert not np.array_equal(pipeline("sun", seed=1), base)
    assert not np.array_equal(pipeline("rocket", seed=0), base)
    assert pipeline("sun", size=(48, 16)).shape == (1, 48, 16, 3)


def test_guidance_is_extrapolation_from_the_negative_prompt(pipeline):
    """The whole loop written out once more, guidance formula included."""
    unet, text = pipeline.components["unet"], pipeline.components["text_encoder"]
    contexts = [
        text.run({"input_ids": pipeline.tokenizer.encode([words])})["encoder_hidden_states"] for words in ("a", "sun")
    ]
    latents = gaussian_noise([9], (4, 8, 8))
    for timestep, level, following in noise_levels(pipeline.schedule, 4):
        away, towards = (
            unet.run({"sample": latents, "timestep": np.array([timestep]), "encoder_hidden_states": context})[
                "prediction"
            ]
            for context in contexts
        )
        guided = away + np.float32(3.5) * (towards - away)
        latents = ddim_step(latents, guided, level, following, "v_prediction").astype(np.float32)
    ours = pipeline.sample_latents("sun", seed=9, steps=4, guidance_scale=3.5, negative_prompt="a")
    np.testing.assert_allclose(ours, latents, rtol=1e-5, atol=1e-5)


def test_guidance_scale_of_one_asks_the_unet_once_per_image(directory):
    pipeline = ldm_deploy.load(directory, threads=1)
    unet = Recorder(pipeline.components["unet"])
    pipeline.with_engines({"unet": unet})("sun", steps=3, guidance_scale=1.0)
    assert [len(feeds["sample"]) for feeds in unet.feeds] == [1, 1, 1]
    unet.feeds.clear()
    pipeline.with_engines({"unet": unet})("sun", steps=3, guidance_scale=2.0)
    assert [len(feeds["sample"]) for feeds in unet.feeds] == [2, 2, 2]
    assert [int(feeds["timestep"][0]) for feeds in unet.feeds] == pipeline.schedule.timesteps(3).tolist()


def test_ddpm_is_seeded_too(pipeline):
    images = pipeline("sun", seed=1, sampler="ddpm", steps=5)
    np.testing.assert_array_equal(pipeline(["cat face", "sun"], seed=[0, 1], sampler="ddpm", steps=5)[1:], images)
    assert not np.array_equal(pipeline("sun", seed=1, sampler="ddim", steps=5), images)


def test_on_step_sees_every_step(pipeline):
    seen = []
    pipeline("sun", steps=4, on_step=lambda index, timestep, latents: seen.append((index, timestep, latents.shape)))
    assert seen == [(i, int(t), (1, 4, 8, 8)) for i, t in enumerate(pipeline.schedule.timesteps(4))]


def test_encode_and_decode_use_the_scale_factor(directory):
    pipeline = ldm_deploy.load(directory, threads=1)
    decoder, encoder = (Recorder(pipeline.components[name]) for name in ("vae_decoder", "vae_encoder"))
    listening = pipeline.with_engines({"vae_decoder": decoder, "vae_encoder": encoder})
    latents = gaussian_noise([0], (4, 8, 8))
    image = listening.decode(latents)
    np.testing.assert_allclose(decoder.feeds[0]["latent"], latents / MODEL["scale_factor"], rtol=1e-6)
    encoded = listening.encode(image[0])
    assert encoded.shape == latents.shape
    fed = encoder.feeds[0]["image"]
    np.testing.assert_allclose(fed[0].transpose(1, 2, 0), image[0] / 127.5 - 1, atol=1e-6)
    mean = pipeline.components["vae_encoder"].run({"image": fed})["latent_mean"]
    np.testing.assert_allclose(encoded, mean * MODEL["scale_factor"], rtol=1e-6)


@pytest.mark.parametrize("value", [-3.0, -1.0, -0.99999, 0.0, 1 / 255, 0.5, 1.0, 7.0])
def test_pixels_are_rounded_half_up_and_clamped(pipeline, value):
    class Flat:
        def run(self, feeds):
            return {"image": np.full((1, 3, 2, 2), value, dtype=np.float32)}

    expected = int(np.floor(min(max((np.float32(value) + 1) * 127.5, 0), 255) + 0.5))
    pixels = pipeline.with_engines({"vae_decoder": Flat()}).decode(np.zeros((1, 4, 2, 2), np.float32))
    assert set(pixels.ravel()) == {expected}


def test_engines_are_opened_when_first_used(directory, monkeypatch):
    opened = []
    from ldm_deploy.runtime import pipeline as module

    original = module.open_engine
    monkeypatch.setattr(
        module, "open_engine", lambda record, *a, **k: opened.append(record.component) or original(record, *a, **k)
    )
    pipeline = ldm_deploy.load(directory)
    assert opened == []
    pipeline("sun")
    assert sorted(opened) == ["text_encoder", "unet", "vae_decoder"]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "sun", "size": (40, 32)}, "height is 40; it must be a multiple of 16, as 32 or 48"),
        ({"prompt": "sun", "size": (32, 8)}, "width is 8; it must be a multiple of 16, as 16 or 32"),
        ({"prompt": " ".join(["apple"] * 40)}, r"has \d+ tokens; the model takes 14 at most: shorten it"),
        ({"prompt": []}, "there is no prompt"),
        ({"prompt": [3]}, "prompt is 3, a int; give text"),
        ({"prompt": "sun", "seed": -1}, r"seed is -1; give an integer from 0 to 2\^64 - 1"),
        ({"prompt": "sun", "seed": [0.5]}, r"seed is 0\.5; give an integer"),
        ({"prompt": "sun", "seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prompt": "sun", "steps": 0}, "steps is 0; allowed: 1 to 1000"),
        ({"prompt": "sun", "steps": 2.5}, r"steps is 2\.5; give an integer"),
        ({"prompt": "sun", "guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompt": "sun", "sampler": "euler"}, "sampler is 'euler'; allowed: ddim, ddpm"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(pipeline, request_, message):
    from ldm_deploy.errors import ConfigError

    with pytest.raises(ConfigError, match=message) as caught:
        pipeline(**request_)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_wrong_images_are_refused(pipeline):
    with pytest.raises(PromptError, match=r"image is float32 of shape \(1, 32, 32, 3\); give uint8"):
        pipeline.encode(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(PromptError, match="height is 33"):
        pipeline.encode(np.zeros((33, 32, 3), np.uint8))


def test_an_engine_that_returns_nan_is_named(tmp_path):
    pipeline = ldm_deploy.load(write_tiny_bundle(tmp_path / "b", unet_bias=float("nan")))
    with pytest.raises(EngineError, match=r"not finite at step 1 of 3 \(timestep 999\)"):
        pipeline("sun")
