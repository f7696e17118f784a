"""A student of few steps: what it starts as, that it resumes, what is refused, and that it draws."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from ldm_deploy.artifact import verify_manifest
from ldm_deploy.config import PRESETS as MODELS
from ldm_deploy.errors import ArtifactError, ConfigError, PromptError, TrainingError
from ldm_deploy.models.reference import load_reference
from ldm_deploy.models.shared_files import share_files
from ldm_deploy.models.sources import source_digest, weight_files
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.training import distill_consistency
from ldm_deploy.training.distill_config import PRESETS, StepsConfig, load_steps_config
from ldm_deploy.training.distill_steps import distill_steps
from ldm_deploy.training.student import Student, check_moved, student_unet
from ldm_deploy.training.train import train


def tiny(**changes) -> StepsConfig:
    """The preset with another training stage."""
    own = {key: changes.pop(key) for key in list(changes) if key in ("steps_", "lora_rank", "method", "seed")}
    own = {key.rstrip("_"): value for key, value in own.items()}
    return dataclasses.replace(
        PRESETS["tiny"], training=dataclasses.replace(PRESETS["tiny"].training, **changes), **own
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher") / "model"
    stage = dataclasses.replace(MODELS["tiny"].diffusion_training, steps=6, warmup_steps=1, learning_rate=0.02)
    train(dataclasses.replace(MODELS["tiny"], autocast_bf16=False, diffusion_training=stage), "photos", directory,
          threads=1)  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    directory = tmp_path_factory.mktemp("student") / "student"
    distill_steps(teacher, "photos", directory, config=tiny(learning_rate=0.01, warmup_steps=1), threads=1)
    return directory


def weights(directory):
    return load_reference(directory).unet.state_dict()


def test_the_guidance_embedding_starts_as_nothing(teacher):
    reference = load_reference(teacher)
    unet = student_unet({**reference.model["unet"], "guidance_embedding": True}, reference.unet)
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([999, 24]), torch.randn(2, 16, 32)
    with torch.no_grad():
        told = unet(*inputs, torch.tensor([2.0, 8.0]))
        assert torch.equal(told, reference.unet(*inputs))
        unet.guidance_embedding.weight.normal_()
        assert not torch.equal(unet(*inputs, torch.tensor([2.0, 8.0])), told)
        assert not torch.equal(unet(*inputs, torch.tensor([2.0, 8.0])), unet(*inputs, torch.tensor([2.0, 7.0])))
    with pytest.raises(ValueError, match="needs guidance_scale"):
        unet(*inputs)


def test_a_student_directory_is_a_reference_with_its_own_way_to_draw(teacher, student):
    before, after = load_reference(teacher), load_reference(student)
    assert after.model["distilled"]["steps"] == [1, 2, 4]
    assert after.model["distilled"]["guidance_range"] == [2.0, 8.0]
    assert after.model["sampling"] == {"sampler": "lcm", "steps": 4, "guidance_scale": 5.0}
    assert after.signatures["unet"][0] == ("sample", "timestep", "encoder_hidden_states", "guidance_scale")
    assert before.signatures["unet"][0] == ("sample", "timestep", "encoder_hidden_states")
    for part in ("autoencoder", "text_encoder"):
        for name, value in getattr(before, part).state_dict().items():
            assert torch.equal(value, getattr(after, part).state_dict()[name])
    assert any(not torch.equal(value, weights(student)[name]) for name, value in before.unet.state_dict().items())
    assert weights(student)["guidance_embedding.weight"].any()
    card = (student / "README.md").read_text()
    assert "a student that draws in 1, 2 or 4 steps" in card
    assert "--recipe steps" in card
    record = json.loads((student / "training.json").read_text())
    assert record["stages"]["distillation"]["steps"] == 4


def test_the_student_draws_with_one_evaluation_per_step(student):
    pipeline = torch_pipeline(load_reference(student), threads=1)
    calls = []
    unet = pipeline.components["unet"]
    run = unet.run
    unet.run = lambda feeds: calls.append(feeds) or run(feeds)
    for steps in (1, 2, 4):
        pipeline(["cat", "galaxies"], seed=3, steps=steps)
    assert [len(feeds["sample"]) for feeds in calls] == [2] * 7
    assert [int(feeds["timestep"][0]) for feeds in calls] == [999, 999, 499, 999, 749, 499, 249]
    assert calls[0]["guidance_scale"].tolist() == [5.0, 5.0]
    both = pipeline(["cat", "galaxies"], seed=[3, 9])
    for index, (prompt, seed) in enumerate((("cat", 3), ("galaxies", 9))):
        assert np.abs(both[index].astype(int) - pipeline(prompt, seed=seed)[0].astype(int)).max() <= 1
    assert not np.array_equal(pipeline("cat", guidance_scale=2.0), pipeline("cat", guidance_scale=8.0))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"steps": 3}, "steps is 3; this model was distilled for 1, 2, 4"),
        ({"sampler": "ddim"}, "sampler is 'ddim'; this model was distilled for lcm"),
        ({"guidance_scale": 1.0}, "guidance_scale is 1; this model was distilled for guidance from 2 to 8"),
        ({"negative_prompt": "dog"}, "negative_prompt is not to be had from a model whose guidance is folded in"),
        ({"guidance_rescale": 0.5}, "guidance_rescale is not to be had"),
    ],
)
def test_what_the_student_never_learned_is_refused(student, asked, message):
    with pytest.raises(PromptError, match=message):
        torch_pipeline(load_reference(student), threads=1)("cat", **asked)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(teacher, tmp_path, monkeypatch, rank):
    config = tiny(steps=5, learning_rate=0.01, warmup_steps=1, lora_rank=rank)
    distill_steps(teacher, "photos", tmp_path / "whole", config=config, threads=1)
    follow, seen = Student.follow, []

    def killed(self, decay):
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        follow(self, decay)

    monkeypatch.setattr(Student, "follow", killed)
    with pytest.raises(KeyboardInterrupt):
        distill_steps(teacher, "photos", tmp_path / "cut", config=config, threads=1)
    monkeypatch.setattr(Student, "follow", follow)
    with pytest.raises(TrainingError, match="--resume"):
        distill_steps(teacher, "photos", tmp_path / "cut", config=config, threads=1)
    distill_steps(teacher, "photos", tmp_path / "cut", config=config, resume=True, threads=1)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    before = load_reference(teacher).unet.state_dict()
    moved = {name for name in before if not torch.equal(before[name], whole[name])}
    adapted = {
        name for name in before if any(f".{layer}.weight" in name for layer in ("to_q", "to_k", "to_v", "to_out"))
    }
    assert moved
    if rank:
        assert moved <= adapted


def test_the_batch_does_not_depend_on_how_it_is_cut(teacher, tmp_path):
    for parts in (1, 2):
        config = tiny(steps=2, batch_size=4, accumulation=parts, learning_rate=0.01, warmup_steps=1)
        distill_steps(teacher, "photos", tmp_path / str(parts), config=config, threads=1)
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=2e-3)


def test_two_processes_make_the_student_that_one_makes(teacher, tmp_path, root):
    """Started as torchrun does; the gradients are those of the same batch."""
    config = tmp_path / "own.toml"
    config.write_text('preset = "tiny"\n[training]\nbatch_size = 4\nlearning_rate = 0.001\nwarmup_steps = 1\n')
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    def start(out, **place):
        words = ("-m", "ldm_deploy", "distill", teacher, "--recipe", "steps", "--config", config, "--data", "photos")
        command = [sys.executable, *map(str, words), "--out", str(tmp_path / out), "--threads", "1", "--quiet"]
        return subprocess.Popen(command, env={**os.environ, **place}, cwd=root)

    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    pair = [start("pair", RANK=rank, LOCAL_RANK=rank, **place) for rank in ("0", "1")]
    single = start("single")
    assert [process.wait(200) for process in (*pair, single)] == [0, 0, 0]
    one, two = weights(tmp_path / "single"), weights(tmp_path / "pair")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=2e-3)  # stored as fp16


def test_the_target_is_an_average_that_nothing_trains(teacher):
    reference = load_reference(teacher)
    student = Student(student_unet(reference.model["unet"], reference.unet))
    assert all(name.startswith("unet.") for name, _ in student.named_parameters())
    torch.nn.init.ones_(student.unet.conv_in.bias)
    before = student.target.conv_in.bias.clone()
    student.follow(0.75)
    torch.testing.assert_close(student.target.conv_in.bias, 0.75 * before + 0.25)


def test_an_average_that_never_started_is_refused(teacher, tmp_path):
    start = {"a": torch.ones(2)}
    check_moved(start, {"a": torch.tensor([1.0, 1.5]), "b": torch.ones(1)})
    with pytest.raises(TrainingError, match=r"never left its start.*raise training.learning_rate"):
        check_moved(start, {"a": torch.ones(2), "b": torch.ones(1)})
    with pytest.raises(TrainingError, match="never left its start"):
        distill_steps(teacher, "photos", tmp_path / "s", config=tiny(learning_rate=0.0), threads=1)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigError, match=r"training.ema_decay is 1.0; give 0 to below 1"):
        tiny(ema_decay=1.0)
    with pytest.raises(ConfigError, match="target_decay is 1"):
        dataclasses.replace(PRESETS["tiny"], target_decay=1.0)


def test_a_diverging_loss_stops_with_the_last_good_state(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(distill_consistency, "FARTHEST", 1e-9)
    with pytest.raises(TrainingError, match=r"training diverges; there is no checkpoint yet\. Lower learning_rate"):
        distill_steps(teacher, "photos", tmp_path / "s", config=tiny(), threads=1)
    monkeypatch.undo()
    wild = tiny(steps=40, learning_rate=1e6, warmup_steps=1, checkpoint_every=1, clip_norm=1e9)
    with pytest.raises(TrainingError, match=r"at step 1.*the last good state is .*consistency.safetensors"):
        distill_steps(teacher, "photos", tmp_path / "t", config=wild, threads=1)
    state = tmp_path / "t.training" / "consistency.safetensors"
    from safetensors.torch import load_file

    assert all(torch.isfinite(value).all() for value in load_file(state).values())


def refused(teacher, tmp_path, message, *, change=None, config=None, error=TrainingError, **options):
    copy = tmp_path / "copy"
    shutil.copytree(teacher, copy)
    if change is not None:
        change(copy)
    with pytest.raises(error, match=message):
        distill_steps(copy, "photos", tmp_path / "out", config=config or tiny(), threads=1, **options)


def edit(file, *path, value):
    def change(directory):
        content = json.loads((directory / file).read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        (directory / file).write_text(json.dumps(content))

    return change


def test_a_teacher_without_guidance_is_refused(teacher, tmp_path):
    change = edit("training.json", "config", "caption_dropout", value=0.0)
    refused(teacher, tmp_path, r"caption_dropout = 0.0, without guidance; train it with caption_dropout", change=change)


def test_a_teacher_without_a_record_is_refused_unless_there_is_no_guidance(teacher, tmp_path):
    refused(teacher, tmp_path, "does not say whether", change=lambda directory: (directory / "training.json").unlink())
    alone = dataclasses.replace(tiny(learning_rate=0.01, warmup_steps=1), guidance_min=1.0, guidance_max=1.0)
    distill_steps(tmp_path / "copy", "photos", tmp_path / "out", config=alone, threads=1)
    plain = load_reference(tmp_path / "out")
    assert plain.model["distilled"]["guidance_range"] is None
    assert plain.model["sampling"]["guidance_scale"] == 1
    assert "guidance_embedding.weight" not in plain.unet.state_dict()
    torch_pipeline(plain, threads=1)("cat")
    with pytest.raises(PromptError, match=r"distilled for no guidance \(1\)"):
        torch_pipeline(plain, threads=1)("cat", guidance_scale=3.0)


def test_a_teacher_without_captions_is_refused(teacher, tmp_path):
    refused(teacher, tmp_path, "nothing to guide it with", change=edit("model.json", "conditioning", value="none"))


def test_a_student_teaches_nobody(student, tmp_path):
    with pytest.raises(TrainingError, match="is a student itself; give the reference"):
        distill_steps(student, "photos", tmp_path / "out", config=tiny(), threads=1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("scale_factor",), 2.0, "different latents: scale_factor"),
        (("schedule", "prediction_type"), "sample", "different schedules: prediction_type is 'v_prediction'"),
        (("schedule", "beta_end"), 0.02, "different schedules: beta_end"),
    ],
)
def test_a_student_of_another_world_is_refused(teacher, tmp_path, path, value, message):
    start = tmp_path / "start"
    shutil.copytree(teacher, start)
    edit("model.json", *path, value=value)(start)
    with pytest.raises(TrainingError, match=message):
        distill_steps(teacher, "photos", tmp_path / "out", config=tiny(), init_from=start, threads=1)


def test_a_student_with_another_autoencoder_is_refused(teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    start = tmp_path / "start"
    shutil.copytree(teacher, start)
    stored = load_file(start / "autoencoder.safetensors")
    save_file({name: value + 1 for name, value in stored.items()}, start / "autoencoder.safetensors")
    with pytest.raises(TrainingError, match="different weights of the autoencoder"):
        distill_steps(teacher, "photos", tmp_path / "out", config=tiny(), init_from=start, threads=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "method is 'magic'; allowed: consistency, progressive"),
        ({"steps": (1, 3)}, r"solver_steps is 8; give a multiple of each of \[1, 3\]"),
        ({"steps": (4, 2)}, "give rising numbers"),
        ({"guidance_min": 8.0}, "guidance_min is 8.0 and guidance_max 8.0; give two numbers"),
        ({"lora_rank": -1}, "lora_rank is -1"),
        ({"method": "progressive", "solver_steps": 12, "steps": (4,)}, "halving must lead to 4, as from 32"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(PRESETS["tiny"], **changes)


def test_presets_and_files(tmp_path):
    assert load_steps_config("gpu").training.batch_size == 256
    path = tmp_path / "mine.toml"
    path.write_text('preset = "gpu"\ntarget_decay = 0.9\n[training]\nsteps = 7\n')
    mine = load_steps_config(path)
    assert (mine.training.steps, mine.training.batch_size, mine.target_decay) == (7, 256, 0.9)
    path.write_text("target_deca = 0.9\n")
    with pytest.raises(ConfigError, match="did you mean 'target_decay'"):
        load_steps_config(path)


def test_a_student_beside_its_teacher_shares_its_files(teacher, student, tmp_path):
    shutil.copytree(teacher, tmp_path / "teacher")
    shutil.copytree(student, tmp_path / "student")
    names = ("autoencoder.safetensors", "text_encoder.safetensors", "tokenizer.json", "unet.safetensors")
    assert share_files(tmp_path / "student", tmp_path / "teacher", names) == list(names[:3])
    assert [name for name in names if (tmp_path / "student" / name).exists()] == ["unet.safetensors"]
    verify_manifest(tmp_path / "student")
    whole, lean = load_reference(student), load_reference(tmp_path / "student")
    for part in ("autoencoder", "text_encoder", "unet"):
        for name, value in getattr(whole, part).state_dict().items():
            assert torch.equal(value, getattr(lean, part).state_dict()[name])
    assert np.array_equal(torch_pipeline(whole, threads=1)("cat"), torch_pipeline(lean, threads=1)("cat"))
    assert [path.parent.name for path in weight_files(tmp_path / "student")] == ["student", "teacher", "teacher"]
    assert source_digest(tmp_path / "student") != source_digest(student)
    other = tmp_path / "teacher" / "tokenizer.json"
    other.write_text(other.read_text() + " ")
    with pytest.raises(ArtifactError, match="is another file by now; restore the one it was made with"):
        lean.tokenizer_text()
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ArtifactError, match="which has none; put the two side by side"):
        load_reference(tmp_path / "student")
    edit("model.json", "shared", "autoencoder.safetensors", "folder", value="../..")(tmp_path / "student")
    with pytest.raises(ArtifactError, match="a folder beside it is allowed"):
        load_reference(tmp_path / "student")
    with pytest.raises(ArtifactError, match="do not lie side by side"):
        share_files(tmp_path / "student", student, names)
