"""A checkpoint of diffusers draws what diffusers draws, in torch and as engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_deploy.errors import ArtifactError
from ldm_deploy.export.export import export_source
from ldm_deploy.models.from_diffusers import describe_checkpoint
from ldm_deploy.models.sources import load_source, source_digest
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.runtime.noise import gaussian_noise
from ldm_deploy.runtime.pipeline import load
from tests.tiny_checkpoint import stable_diffusion, stable_diffusion_xl

pytestmark = [
    pytest.mark.timeout(900),
    # diffusers asks torch and huggingface_hub in ways they are about to give up.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROMPT, SEED, STEPS = "red cat", 3, 4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "sd": (root / "sd", stable_diffusion(root / "sd")),
        "sd2": (root / "sd2", stable_diffusion(root / "sd2", tiny=True, prediction_type="v_prediction")),
        "sdxl": (root / "sdxl", stable_diffusion_xl(root / "sdxl")),
    }


def theirs(pipeline: Any, guidance_scale: float, size: int) -> np.ndarray:
    """diffusers' image from our noise."""
    noise = gaussian_noise([SEED], (4, size // 2, size // 2))
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "num_inference_steps": STEPS}
    drawn = pipeline(PROMPT, latents=torch.from_numpy(noise), height=size, width=size, output_type="np", **options)
    return np.asarray(drawn.images)[0]


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_it_draws_what_diffusers_draws(
    checkpoints: dict[str, tuple[Path, Any]], kind: str, guidance_scale: float
) -> None:
    path, pipeline = checkpoints[kind]
    options: dict[str, Any] = {"seed": SEED, "steps": STEPS, "guidance_scale": guidance_scale, "size": (16, 16)}
    ours = torch_pipeline(load_source(path), threads=1)(PROMPT, **options)[0]
    expected = np.round(theirs(pipeline, guidance_scale, 16) * 255)
    assert len(np.unique(ours)) > 20
    assert np.abs(ours.astype(float) - expected).max() <= 1


def test_embeddings_of_both_text_encoders_are_theirs(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    path, pipeline = checkpoints["sdxl"]
    source = load_source(path)
    expected, _, pooled, _ = pipeline.encode_prompt([PROMPT, "a b c"], do_classifier_free_guidance=False, device="cpu")
    ids = pipeline.tokenizer([PROMPT, "a b c"], padding="max_length", max_length=12, return_tensors="pt").input_ids
    states, embeds = source.components()["text_encoder"](ids)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embeds, pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_engines_of_a_checkpoint_draw_the_same(
    checkpoints: dict[str, tuple[Path, Any]], kind: str, tmp_path: Path
) -> None:
    path, _ = checkpoints[kind]
    variants = [("fp32", "onnxruntime-cpu"), ("fp32", "openvino-cpu")]
    bundle = export_source(path, tmp_path / "bundle", variants=variants, threads=1)
    assert bundle.data["refused"] == []
    assert all(engine["parity"]["passed"] for engine in bundle.data["engines"])
    options: dict[str, Any] = {"seed": [1, 2], "steps": STEPS, "size": (24, 16)}
    expected = torch_pipeline(load_source(path), threads=1)(["red", ""], **options).astype(int)
    for variant in bundle.variants:
        drawn = load(bundle.root, variant=variant, threads=1)(["red", ""], **options).astype(int)
        assert np.abs(drawn - expected).max() <= 1


def test_the_digest_covers_every_file_that_counts(checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    path = tmp_path / "sd"
    shutil.copytree(checkpoints["sd"][0], path)
    before = source_digest(path)
    (path / "README.md").write_text("words")
    assert source_digest(path) == before
    scheduler = path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + " ")
    assert source_digest(path) != before


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "absent"}))


def test_what_the_runtime_cannot_do_is_refused_by_name(
    checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    def refused(message: str, prepare: Any) -> None:
        path = tmp_path / "sd"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(checkpoints["sd"][0], path)
        prepare(path)
        with pytest.raises(ArtifactError, match=message):
            load_source(path)

    scheduler, weights = "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"
    refused("has no text_encoder; complete the checkpoint", lambda path: shutil.rmtree(path / "text_encoder"))
    refused("clip_sample is on", lambda path: edit(path / scheduler, clip_sample=True))
    refused("HeunScheduler has no sampler", lambda path: edit(path / scheduler, _class_name="HeunScheduler"))
    refused("takes the guidance as an input", lambda path: edit(path / "unet/config.json", time_cond_proj_dim=8))
    refused("are not read by this version", lambda path: edit(path / "unet/config.json", in_channels=9))
    refused("shifts its latents", lambda path: edit(path / "vae/config.json", shift_factor=0.1))
    refused("is a FluxPipeline", lambda path: edit(path / "model_index.json", _class_name="FluxPipeline"))
    refused("are a pickle, never opened; convert it", lambda path: (path / weights).rename(path / "unet/model.bin"))
    refused(r"has no weights \(\*.safetensors\)", lambda path: (path / weights).unlink())
    refused("unet cannot be read", lambda path: (path / weights).write_bytes(b"\0" * 40))
    refused("unet/config.json cannot be read", lambda path: (path / "unet/config.json").write_text("{"))


def test_a_description_needs_no_weights(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    model = describe_checkpoint(checkpoints["sd"][0])
    assert (model["downsampling"], model["scale_factor"], model["default_size"]) == (2, 0.7, [16, 16])
    assert model["sampling"] == {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5}
    assert describe_checkpoint(checkpoints["sdxl"][0])["sampling"]["sampler"] == "euler"
