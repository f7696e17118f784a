"""The pipeline on a toy bundle: batches, seeds, guidance, samplers, and requests that cannot be served."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

import ldm_deploy
from ldm_deploy.diffusion.samplers import SAMPLERS, ddim_step, noise_levels
from ldm_deploy.errors import EngineError, PromptError
from ldm_deploy.runtime.noise import gaussian_noise
from ldm_deploy.runtime.pipeline import rescale_guidance
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


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_a_batch_as_it_draws_its_images(pipeline, sampler):
    both = pipeline.sample_latents(["sun", "rocket"], seed=[4, 9], steps=5, sampler=sampler)
    alone = pipeline.sample_latents("rocket", seed=9, steps=5, sampler=sampler)
    np.testing.assert_allclose(both[1:], alone, rtol=1e-4, atol=1e-5)
    again = pipeline.sample_latents("rocket", seed=9, steps=5, sampler=sampler)
    np.testing.assert_array_equal(alone, again)
    if sampler not in ("ddim", "euler"):  # which are one method
        assert np.abs(alone - pipeline.sample_latents("rocket", seed=9, steps=5)).max() > 1e-2


def test_rescaled_guidance_equals_diffusers():
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    guided, conditional = np.random.default_rng(0).standard_normal((2, 3, 4, 8, 8), dtype=np.float32)
    guided *= 3
    for amount in (0.0, 0.7, 1.0):
        theirs = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(conditional), amount).numpy()
        # torch divides by n - 1 in both standard deviations, numpy by n: the ratio is the same.
        np.testing.assert_allclose(rescale_guidance(guided, conditional, amount), theirs, rtol=1e-5, atol=1e-6)


def test_rescaled_guidance_reaches_the_sampler(pipeline):
    class Contrast:
        """Predicts the sample, twice as strong for the caption as for the empty text."""

        def run(self, feeds):
            strength = np.array([1, 2], dtype=np.float32)[:, None, None, None]
            return {"prediction": 0.1 * strength * feeds["sample"]}

    contrast = pipeline.with_engines({"unet": Contrast()})
    options = {"prompt": "sun", "seed": 1, "steps": 1}
    conditional = 0.2 * gaussian_noise([1], (4, 8, 8))  # what one step makes of it, for v: -prediction
    rescaled = contrast.sample_latents(**options, guidance_scale=7.0, guidance_rescale=1.0)
    np.testing.assert_allclose(rescaled, -conditional, rtol=1e-5)
    plain = contrast.sample_latents(**options, guidance_scale=7.0)
    np.testing.assert_allclose(plain, -conditional * 0.8 / 0.2, rtol=1e-5)  # 0.1 + 7 (0.2 - 0.1)


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
        ({"prompt": 3}, "prompt is 3; give a text or a list of texts"),
        ({"prompt": [3]}, "prompt is 3, of type int; give text"),
        ({"prompt": "\ud800"}, r"prompt '\\ud800' is no text that can be encoded"),
        ({"prompt": "sun", "negative_prompt": " ".join(["apple"] * 40)}, r"has \d+ tokens; the model takes 14 at most"),
        ({"prompt": "sun", "negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts; give one, or one per"),
        ({"prompt": "sun", "seed": -1}, r"seed is -1; give an integer from 0 to 2\^64 - 1"),
        ({"prompt": "sun", "seed": 2**64}, r"seed is 18446744073709551616; give an integer from 0 to 2\^64 - 1"),
        ({"prompt": ["sun"] * 3, "seed": 2**64 - 1}, r"give an integer from 0 to 2\^64 - 3, for 3 images"),
        ({"prompt": "sun", "seed": [0.5]}, r"seed is 0\.5; give an integer"),
        ({"prompt": "sun", "seed": 0.5}, r"seed is 0\.5; give an integer"),
        ({"prompt": "sun", "seed": True}, "seed is True; give an integer"),
        ({"prompt": "sun", "seed": "7"}, "seed is '7'; give an integer"),
        ({"prompt": "sun", "seed": [1, 2]}, "2 seeds for 1 prompts"),
        ({"prompt": "sun", "steps": 0}, "steps is 0; allowed: 1 to 1000"),
        ({"prompt": "sun", "steps": 1001}, "steps is 1001; allowed: 1 to 1000"),
        ({"prompt": "sun", "steps": 2.5}, r"steps is 2\.5; give an integer"),
        ({"prompt": "sun", "guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompt": "sun", "guidance_scale": -1}, "guidance_scale is -1; give a number of 0 or more"),
        ({"prompt": "sun", "guidance_scale": "5"}, "guidance_scale is '5'; give a number"),
        ({"prompt": "sun", "sampler": "eulr"}, "sampler is 'eulr'; allowed: ddim, ddpm, dpmsolver"),
        ({"prompt": "sun", "guidance_rescale": 1.5}, "guidance_rescale is 1.5; give a number from 0"),
        ({"prompt": "sun", "guidance_rescale": True}, "guidance_rescale is True; give a number from 0"),
        ({"prompt": "sun", "size": 32}, r"size is 32; give \(height, width\) in pixels"),
        ({"prompt": "sun", "size": (32.0, 32)}, r"height is 32\.0; give an integer, a multiple of 16"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(pipeline, request_, message):
    with pytest.raises(PromptError, match=message) as caught:
        pipeline(**request_)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_wrong_images_are_refused(pipeline):
    with pytest.raises(PromptError, match=r"image is float32 of shape \(1, 32, 32, 3\); give uint8"):
        pipeline.encode(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(PromptError, match="height is 33"):
        pipeline.encode(np.zeros((33, 32, 3), np.uint8))


class Spoiled:
    """An engine whose outputs hold one infinity."""

    def __init__(self, engine):
        self.engine = engine

    def run(self, feeds):
        outputs = {name: value.copy() for name, value in self.engine.run(feeds).items()}
        for value in outputs.values():
            value.flat[-1] = np.inf
        return outputs


def test_an_engine_that_returns_nan_is_named(tmp_path):
    pipeline = ldm_deploy.load(write_tiny_bundle(tmp_path / "b", unet_bias=float("nan")))
    with pytest.raises(EngineError, match=r"unet returned values that are not finite at step 1 of 3 \(timestep 999\)"):
        pipeline("sun")


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_every_engine_that_returns_an_infinity_is_named(pipeline, component):
    spoiled = pipeline.with_engines({component: Spoiled(pipeline.components[component])})
    with pytest.raises(EngineError, match=f"{component} returned values that are not finite.*choose another variant"):
        spoiled.encode(spoiled("sun"))


def test_a_component_that_a_variant_lacks_is_named(pipeline):
    del pipeline.components._records["vae_encoder"]
    with pytest.raises(EngineError, match="no engine for vae_encoder; it has: text_encoder, unet, vae_decoder"):
        pipeline.encode(np.zeros((32, 32, 3), np.uint8))


def test_latents_of_another_shape_are_refused(pipeline):
    with pytest.raises(PromptError, match=r"latents have shape \(4, 8, 8\); give \(batch, 4, height, width\)"):
        pipeline.decode(np.zeros((4, 8, 8), np.float32))


def test_one_negative_prompt_per_image(pipeline):
    both = pipeline(["sun", "rocket"], seed=[1, 2], negative_prompt=["a", "cat face"])
    np.testing.assert_array_equal(pipeline("rocket", seed=2, negative_prompt="cat face"), both[1:])
    assert not np.array_equal(pipeline("rocket", seed=2), both[1:])


def test_threads_share_a_pipeline(pipeline):
    from concurrent.futures import ThreadPoolExecutor

    alone = [pipeline("sun", seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda seed: pipeline("sun", seed=seed), range(6)))
    np.testing.assert_array_equal(together, alone)


def test_an_exception_in_on_step_ends_the_call(pipeline):
    def stop(index, _timestep, _latents):
        if index == 1:
            raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        pipeline("sun", on_step=stop)


def test_loading_and_replacing_open_no_engine_and_no_library(directory):
    """In a fresh interpreter: neither torch nor an engine library is loaded by `load`."""
    import subprocess
    import sys

    script = (
        "import sys, ldm_deploy\n"
        "pipeline = ldm_deploy.load(sys.argv[1])\n"
        "assert 'unet' in pipeline.with_engines({}).components\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'pydantic'} & set(sys.modules)))\n"
        "pipeline('sun')\n"
        "print(sorted({'torch', 'onnx', 'pydantic'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]
