"""A student of few steps through the whole road: engines proven, its own sampler, calibration with its own steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ldm_deploy
from ldm_deploy.errors import BundleError, PromptError, StageMissingError
from ldm_deploy.eval.parity import read_probes
from ldm_deploy.export.export import export_source
from ldm_deploy.export.whole import export_pipeline
from ldm_deploy.models.reference import build_modules, load_reference, read_model, save_reference
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.runtime.bundle import Bundle, read_bundle
from ldm_deploy.training.distill_config import PRESETS
from ldm_deploy.training.distill_steps import describe_student

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def student(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random reference with a random guidance embedding, described as a consistency student."""
    directory = tmp_path_factory.mktemp("student")
    teacher = load_reference(reference)
    model = describe_student(teacher.model, teacher.model["unet"], PRESETS["tiny"], "sha256:0")
    weights: dict[str, dict[str, torch.Tensor]] = {
        name: getattr(teacher, name).state_dict() for name in ("autoencoder", "text_encoder", "unet")
    }
    torch.manual_seed(1)
    own = build_modules(model)["unet"].state_dict()["guidance_embedding.weight"]
    weights["unet"] = {**weights["unet"], "guidance_embedding.weight": torch.randn_like(own)}
    save_reference(directory, model, weights)
    (directory / "tokenizer.json").write_text(teacher.tokenizer_text(), encoding="utf-8")
    assert read_model(directory)["unet"]["guidance_embedding"]
    return directory


@pytest.fixture(scope="module")
def exported(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_source(student, tmp_path_factory.mktemp("exported") / "bundle", threads=1)


def test_the_engine_takes_the_guidance(exported: Bundle) -> None:
    unet = next(engine for engine in exported.data["engines"] if engine["component"] == "unet")
    given = {value["name"]: value for value in unet["inputs"]}
    assert given["guidance_scale"] == {
        "name": "guidance_scale", "dtype": "float32", "shape": ["batch"], "range": [2.0, 8.0],
    }  # fmt: skip
    assert unet["parity"]["passed"]
    assert unet["parity"]["relative_error"] < 1e-4
    assert exported.data["model"]["distilled"]["steps"] == [1, 2, 4]
    variant = exported.variant()
    assert (variant.sampler, variant.steps, variant.guidance_scale) == ("lcm", 4, 5.0)
    probes = read_probes(exported.root / "probes" / "unet.safetensors")
    assert len({float(scale) for probe in probes for scale in probe.inputs["guidance_scale"]}) == 3
    assert {len(probe.inputs["sample"]) for probe in probes} >= {1, 2, 3}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_bundle_draws_what_torch_draws(exported: Bundle, student: Path, steps: int) -> None:
    options: dict[str, Any] = {"seed": [5, 6], "steps": steps, "guidance_scale": 6.5}
    ours = ldm_deploy.load(exported.root, threads=1)(["red apple", "sun"], **options)
    theirs = torch_pipeline(load_reference(student), threads=1)(["red apple", "sun"], **options)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert not np.array_equal(
        ours, ldm_deploy.load(exported.root, threads=1)(["red apple", "sun"], **{**options, "seed": 0})
    )


def test_the_bundle_refuses_what_was_not_learned(exported: Bundle) -> None:
    with pytest.raises(PromptError, match="this model was distilled for 1, 2, 4"):
        ldm_deploy.load(exported.root, threads=1)("sun", steps=50)


def test_calibration_draws_with_the_students_own_sampler(exported: Bundle) -> None:
    from ldm_deploy.quantize.calibration import collect

    pipeline = ldm_deploy.load(exported.root, threads=1)
    found = collect(pipeline, "sha256:0", prompts=["red apple", "sun"])
    steps = [walk["steps"] for walk in found.details["trajectories"]]
    assert sorted(set(steps)) == [1, 2, 4]
    assert {walk["guidance_scale"] for walk in found.details["trajectories"]} == {2.0, 5.0, 8.0}
    feeds = found.arrays["unet"]
    assert set(feeds["timestep"].tolist()) == {999, 749, 499, 249}
    assert len(set(feeds["guidance_scale"].tolist())) > 1
    assert next(iter(found.samples("unet")))["guidance_scale"].shape == (1,)


def test_a_single_graph_of_a_student_is_refused(student: Path, tmp_path: Path) -> None:
    with pytest.raises(StageMissingError, match="a student of few steps; export its components"):
        export_pipeline(student, tmp_path / "whole", threads=1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"sampler": "lcm", "steps": []}, "distilled.steps is .*not a list of integers of 1 or more"),
        ({"sampler": "lcm", "steps": [1], "guidance_range": [2]}, "distilled.guidance_range is .*lowest, highest"),
        (3, "model.distilled is 3, not an object"),
    ],
)
def test_a_damaged_description_is_refused(exported: Bundle, tmp_path: Path, value: Any, message: str) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(exported.root, copy)
    data = json.loads((copy / "bundle.json").read_text())
    data["model"]["distilled"] = value
    (copy / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        read_bundle(copy)
