"""The reference inside the package: it loads, it is as small as promised, and its card is about these very weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from ldm_deploy.artifact import verify_manifest
from ldm_deploy.eval.grid import retrieval_grid
from ldm_deploy.models.reference import WEIGHTS, load_reference
from ldm_deploy.models.sources import resolve_source, source_digest
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.training import decoder_config, distill_config, prune_config


@pytest.fixture(scope="module")
def directory():
    return resolve_source("reference")


def test_everything_shipped_stays_within_24_mb(directory):
    assets = directory.parent
    assert sum(file.stat().st_size for file in assets.rglob("*") if file.is_file()) <= 24e6


def test_weights_are_stored_as_fp16(directory):
    for name in WEIGHTS:
        with safe_open(directory / f"{name}.safetensors", "np") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_files_are_those_of_the_manifest_and_the_card_tells_how_they_were_made(directory):
    verify_manifest(directory)
    record = json.loads((directory / "training.json").read_text())
    card = (directory / "README.md").read_text()
    assert record["command"] in card
    assert record["data"]["digest"] in card
    for stage, summary in record["stages"].items():
        assert summary["steps"] == record["config"][f"{stage}_training"]["steps"]


@pytest.mark.parametrize(("name", "stage", "own"), [
    ("pruned", "prune", ["unet"]), ("few-steps", "distillation", ["autoencoder", "unet"]),
])  # fmt: skip
def test_a_student_has_what_it_learned_and_tells_how(name, stage, own):
    student = resolve_source(name)
    verify_manifest(student)
    record = json.loads((student / "training.json").read_text())
    assert record["command"] in (student / "README.md").read_text()
    assert record["stages"][stage]["steps"] == record["config"]["training"]["steps"]
    assert sorted(file.stem for file in student.glob("*.safetensors")) == own
    teacher = source_digest(resolve_source({"pruned": "reference", "few-steps": "pruned"}[name]))
    assert record["teacher"]["digest"] == teacher
    assert f"(digest `{teacher}`)" in (student / "README.md").read_text()


def test_the_presets_are_what_made_the_students():
    """So that the commands on their cards make them again."""
    pruned, few_steps = (
        json.loads((resolve_source(name) / "training.json").read_text()) for name in ("pruned", "few-steps")
    )
    for record, presets in (
        (pruned, prune_config.PRESETS),
        (few_steps, distill_config.PRESETS),
        (few_steps["decoder"], decoder_config.PRESETS),
    ):
        assert "--config gpu" in record["command"]
        assert json.loads(json.dumps(presets["gpu"].to_dict())) == record["config"]


@pytest.mark.parametrize(("steps", "share"), [(1, 0.85), (4, 0.95)])
def test_the_student_draws_in_few_steps_what_its_teacher_draws_in_many(steps, share):
    """Nearer to its teacher's images than the teacher itself comes in so few steps, told nothing of guidance."""
    teacher, student, untaught = load_reference("pruned"), load_reference("few-steps"), load_reference("few-steps")
    weights = teacher.unet.state_dict()
    untaught.unet.load_state_dict(
        {name: weights.get(name, torch.zeros_like(value)) for name, value in untaught.unet.state_dict().items()}
    )
    prompts = retrieval_grid().prompts[:8]
    seeds = [0] * len(prompts)
    wanted = torch_pipeline(teacher)(prompts, seed=seeds, steps=10).astype(float)
    drawn = [torch_pipeline(model)(prompts, seed=seeds, steps=steps).astype(float) for model in (student, untaught)]
    own, others = (np.abs(images - wanted).mean() for images in drawn)
    assert own < share * others
    own_prompt = np.abs(drawn[0][:, None] - wanted[None]).mean(axis=(2, 3, 4)).argmin(axis=1)
    assert (own_prompt == np.arange(len(prompts))).mean() >= 0.75


def test_it_draws_what_it_is_asked_for_and_not_one_thing(directory):
    pipeline = torch_pipeline(load_reference(directory))
    images = pipeline(["red heart", "red heart", "blue square"], seed=[0, 1, 0], steps=8)
    assert images.shape == (3, 64, 64, 3)
    assert images.dtype == np.uint8
    assert images.std() > 20  # a picture
    assert np.abs(images[0].astype(float) - images[2]).mean() > 10  # the caption matters
    again = pipeline("red heart", seed=0, steps=8)
    assert np.abs(again[0].astype(int) - images[0]).max() <= 1
