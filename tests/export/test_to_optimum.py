"""A checkpoint exported in optimum's layout is loaded by optimum as it is and draws what diffusers draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from ldm_deploy.artifact import verify_manifest
from ldm_deploy.cache import Cache
from ldm_deploy.errors import ConfigError, ParityError
from ldm_deploy.eval.parity import read_probes
from ldm_deploy.export import to_optimum
from ldm_deploy.export.export import export_source
from ldm_deploy.export.to_optimum import export_optimum, rename
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from tests.tiny_checkpoint import stable_diffusion, stable_diffusion_xl

pytestmark = [
    pytest.mark.timeout(900),
    # diffusers, transformers and optimum ask torch and each other in ways they are about to give up.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("optimum")
    pipeline = stable_diffusion(root / "checkpoint")
    export_optimum(root / "checkpoint", root / "out", threads=1, cache=Cache(root / "cache"))
    return root / "out", pipeline


def test_optimum_draws_what_diffusers_draws(exported: tuple[Path, Any]) -> None:
    from optimum.onnxruntime import ORTDiffusionPipeline

    folder, theirs = exported
    verify_manifest(folder)
    assert not (folder / "bundle").exists()
    ours = ORTDiffusionPipeline.from_pretrained(folder)
    ours.set_progress_bar_config(disable=True)
    # Another size and batch than any that was traced.
    noise = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 6.0, "output_type": "np", "latents": noise}
    prompts = ["red cat", "a b"]
    expected = theirs(prompts, height=24, width=16, **options).images
    drawn = ours(prompts, height=24, width=16, **options).images
    assert expected.std() > 0.05
    np.testing.assert_allclose(drawn, expected, atol=1e-4)


def test_the_encoder_is_theirs(exported: tuple[Path, Any]) -> None:
    from optimum.onnxruntime import ORTDiffusionPipeline

    folder, theirs = exported
    vae = ORTDiffusionPipeline.from_pretrained(folder).vae
    image = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected, found = theirs.vae.encode(image).latent_dist, vae.encode(image).latent_dist
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logvar, expected.logvar, rtol=1e-4, atol=1e-4)


def test_a_tiny_encoder_returns_latents_only(tmp_path: Path) -> None:
    stable_diffusion(tmp_path / "checkpoint", tiny=True)
    bundle = export_source(tmp_path / "checkpoint", tmp_path / "bundle", components=["vae_encoder"], threads=1)
    rename(bundle.root / "engines" / "vae_encoder-fp32.onnx", tmp_path / "model.onnx", "tiny vae_encoder")
    engine = OnnxRuntimeEngine(tmp_path / "model.onnx", threads=1)
    for probe in read_probes(bundle.root / "probes" / "vae_encoder.safetensors"):
        found = engine.run({"sample": probe.inputs["image"]})
        assert list(found) == ["latent_sample"]
        np.testing.assert_allclose(found["latent_sample"], probe.outputs["latent_mean"], atol=1e-5)


def test_the_timestep_is_one_for_the_batch(exported: tuple[Path, Any]) -> None:
    """optimum warns of another form, and would pay for it at every step."""
    model = onnx.load(str(exported[0] / "unet" / "model.onnx"))
    shapes = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.input}
    assert shapes == {"sample": 4, "timestep": 0, "encoder_hidden_states": 3}
    assert [value.name for value in model.graph.output] == ["out_sample"]


def test_a_wrong_graph_is_caught(exported: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming is a rewrite like others: it is compared with torch, too."""

    def swapped(model: Any, mean: Any, logvar: Any) -> None:
        original(model, logvar, mean)

    original = to_optimum._one_output
    monkeypatch.setattr(to_optimum, "_one_output", swapped)
    checkpoint, cache = exported[0].parent / "checkpoint", Cache(exported[0].parent / "cache")
    with pytest.raises(ParityError, match="vae_encoder: engine for optimum differs from the reference"):
        export_optimum(checkpoint, tmp_path / "out", threads=1, cache=cache)
    assert not (tmp_path / "out").exists()


def test_what_has_no_such_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--layout optimum writes a checkpoint of diffusers for ONNX Runtime"):
        export_optimum("reference", tmp_path / "out")
    stable_diffusion_xl(tmp_path / "xl")
    with pytest.raises(ConfigError, match="has two text encoders"):
        export_optimum(tmp_path / "xl", tmp_path / "out")
