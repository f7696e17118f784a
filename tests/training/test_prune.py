"""Pruning: what is chosen where the answer is known, what is asked of what is left, and how a run ends."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from ldm_deploy.errors import ConfigError, DataError, TrainingError
from ldm_deploy.models.reference import load_reference
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.training import imitation
from ldm_deploy.training import prune as module
from ldm_deploy.training.imitation import Heard, feature_loss, last_of_levels
from ldm_deploy.training.points import prediction_error, trajectory_points
from ldm_deploy.training.prune import prune
from ldm_deploy.training.prune_choice import (
    choose,
    costs,
    measure_ms,
    without,
)
from ldm_deploy.training.prune_config import PRESETS, load_prune_config

TINY = PRESETS["tiny"]


def changed(steps=4, **values):
    return dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, steps=steps), **values)


def run(teacher, out, config=TINY, **options):
    return prune(teacher, "photos", out, config=config, threads=1, **options)


@pytest.fixture
def teacher(make_teacher):
    return load_reference(make_teacher())


@pytest.fixture
def points(teacher):
    return trajectory_points(teacher, 8, 0)


def test_points_are_what_the_sampler_asks(teacher, points):
    sample, timestep, context = points
    assert sample.shape == (8, 4, 8, 8)
    assert context.shape == (8, teacher.model["context_length"], 32)
    asked = {round(999 - 100 * step) for step in range(10)}
    assert set(timestep.tolist()) <= asked
    assert len(set(timestep.tolist())) > 1
    assert all(torch.equal(one, other) for one, other in zip(points, trajectory_points(teacher, 8, 0), strict=True))


def test_the_error_of_a_prediction_by_hand():
    wanted = torch.tensor([[1.0, -1.0]])
    assert prediction_error(torch.nn.Identity(), (wanted,), wanted) == 0
    assert prediction_error(torch.nn.Identity(), (0 * wanted,), wanted) == 1
    assert prediction_error(torch.nn.Identity(), (1.5 * wanted,), wanted) == 0.25


def planted(teacher):
    """One transformer that does nothing, one block without which nothing is right."""
    unet = teacher.unet
    for parameter in unet.down[2].transformer.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    for parameter in unet.up[4].block.conv2.parameters():
        torch.nn.init.normal_(parameter, std=30.0)
    return unet


def test_the_useless_slow_block_goes_and_the_essential_one_stays(teacher, points):
    unet = planted(teacher)

    def measure(modules, inputs, cost):
        """Every part costs 1 and the useless one 20, of 100."""
        gone = {name: {*unet.removable()} - {*part.removable()} for name, part in modules.items()}
        return {name: 100.0 - sum(20.0 if one == "down.2.transformer" else 1.0 for one in gone[name]) for name in gone}

    choice = choose(unet, points, 1.2, "milliseconds", measure)
    assert [removal.name for removal in choice.removals] == ["down.2.transformer"]
    assert choice.removals[0].error == 0
    assert choice.removals[0].speedup == 1.25
    further = choose(unet, points, 1.3, "milliseconds", measure)
    assert further.removals[0].name == "down.2.transformer"
    assert "up.4.block" not in [removal.name for removal in further.removals]
    assert all(later.speedup > earlier.speedup for earlier, later in itertools.pairwise(further.removals))


def test_the_first_to_go_has_the_least_error_per_flop(teacher, points):
    """By FLOPs, as counted."""
    unet = teacher.unet
    choice = choose(unet, points, 1.05, "flops")
    with torch.no_grad():
        wanted = unet(*points)
    parts = {name: without(unet, name) for name in unet.removable()}
    found = costs({"": unet, **parts}, points, "flops")
    ratios = {name: prediction_error(part, points, wanted) / (found[""] - found[name]) for name, part in parts.items()}
    assert choice.removals[0].name == min(ratios, key=ratios.__getitem__)
    assert choice.baseline == found[""]
    assert (
        choice.removals[-1].speedup
        == found[""] / costs({"": without(unet, *(removal.name for removal in choice.removals))}, points, "flops")[""]
    )


def test_a_speed_that_cannot_be_had_is_refused_with_what_can(teacher, points):
    with pytest.raises(TrainingError, match=r"with everything removed .* is \d+\.\d\d times as fast, .*lower speedup"):
        choose(teacher.unet, points, 1e6, "flops")


def test_what_is_to_be_kept_stays_and_must_be_there(teacher, points):
    first = choose(teacher.unet, points, 1.05, "flops").removals[0].name
    kept = choose(teacher.unet, points, 1.05, "flops", keep=[first])
    assert first not in [removal.name for removal in kept.removals]
    everything = teacher.unet.removable()
    with pytest.raises(TrainingError, match=r"is 1\.00 times as fast, .*speedup, or keep less than down\.0\.block, "):
        choose(teacher.unet, points, 1.05, "flops", keep=everything)
    with pytest.raises(TrainingError, match=r"keep has 'up\.9\.block', which no part is called; parts: down\.0"):
        choose(teacher.unet, points, 1.05, "flops", keep=["up.9.block"])
    assert TINY.keep == ("innermost",)


def test_every_module_has_its_turn_in_every_round():
    turns = []

    class Turn(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            turns.append(self.name)
            return x

    found = measure_ms({"a": Turn("a"), "b": Turn("b")}, (torch.zeros(1),), rounds=3)
    assert turns == ["a", "b"] * 5  # two rounds to warm up
    assert [len(times) for times in found.values()] == [3, 3]
    assert all(value > 0 for times in found.values() for value in times)


def test_features_are_compared_where_levels_end(teacher):
    assert last_of_levels(teacher.unet) == ["down.0", "down.2", "middle.1", "up.1", "up.4"]
    assert last_of_levels(without(teacher.unet, "innermost")) == ["down.0", "up.4"]


def test_the_feature_loss_by_hand(teacher, points):
    wanted = [torch.full((2, 3), 2.0), torch.full((4,), 0.5)]
    assert feature_loss(wanted, wanted).item() == 0
    assert feature_loss([wanted[0] + 1, 0 * wanted[1]], wanted).item() == pytest.approx((0.25 + 1) / 2)
    with torch.no_grad():
        prediction, *features = Heard(teacher.unet, last_of_levels(teacher.unet))(*points)
        assert torch.equal(prediction, teacher.unet(*points))
        assert torch.equal(prediction, teacher.unet.out(features[-1]))  # the last of the uppermost level
    assert not any(module._forward_hooks for module in teacher.unet.modules())  # nobody listens any more


def test_only_the_unet_is_new_and_it_draws(make_teacher, tmp_path):
    path = make_teacher()
    record = run(path, tmp_path / "out")
    teacher, student = load_reference(path), load_reference(tmp_path / "out")
    for part in ("text_encoder", "autoencoder"):
        ours, theirs = getattr(student, part).state_dict(), getattr(teacher, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    removals = record["figures"]["choice"]["removals"]
    removed = student.model["unet"].pop("removed")
    assert removals[-1]["speedup"] >= 1.5
    assert set(removed) <= {removal["name"] for removal in removals}
    assert student.unet.removed == tuple(removed)
    assert student.model.pop("name") == teacher.model.pop("name") + "-pruned"
    assert student.model == teacher.model
    assert record["figures"]["student"]["flops"] * 1.5 <= record["figures"]["teacher"]["flops"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ldm-deploy distill teacher --recipe prune --config custom --data photos --out out" in card
    assert f"removed: {removals[0]['name']}" in card
    assert torch_pipeline(load_reference(tmp_path / "out"), 1)("one", seed=0, steps=2).shape == (1, 32, 32, 3)


@pytest.mark.parametrize("term", ["task", "output", "feature"])
def test_each_term_alone_is_learned(make_teacher, tmp_path, term):
    weights = {f"{name}_weight": float(name == term) for name in ("task", "output", "feature")}
    training = dataclasses.replace(
        TINY.training, steps=60, batch_size=8, warmup_steps=5, learning_rate=3e-3, ema_decay=0.9
    )
    run(make_teacher(), tmp_path / "out", dataclasses.replace(TINY, training=training, **weights))
    lines = [json.loads(line) for line in (tmp_path / "out.training" / "prune.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(lines[0][term], rel=1e-5)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_with_nothing_removed_there_is_nothing_to_learn_from_the_teacher(make_teacher, tmp_path, monkeypatch):
    """A student that is the teacher: output and feature terms are zero, the task's is what the teacher still gets
    wrong."""
    monkeypatch.setattr(module, "decide", lambda *rest, **options: module.Choice("flops", 1.0, ()))
    run(make_teacher(), tmp_path / "out", changed(1))
    line = json.loads((tmp_path / "out.training" / "prune.jsonl").read_text().splitlines()[0])
    assert line["output"] == line["feature"] == 0
    assert line["loss"] == line["task"] > 0


def test_a_student_of_few_steps_has_no_task_and_is_asked_at_its_own_timesteps(make_teacher, tmp_path):
    path = make_teacher()
    model = json.loads((path / "model.json").read_text())
    model["distilled"] = {
        "method": "consistency", "teacher": "sha256:0", "sampler": "lcm", "steps": [1, 2], "guidance_range": [2.0, 8.0]
    }  # fmt: skip
    model["sampling"] = {"sampler": "lcm", "steps": 2, "guidance_scale": 5.0}
    model["unet"]["guidance_embedding"] = True
    reference = load_reference(path)
    from ldm_deploy.models.reference import build_modules, save_reference

    modules = build_modules(model)
    modules["unet"].load_state_dict(reference.unet.state_dict(), strict=False)
    weights = {name: getattr(reference, name).state_dict() for name in ("autoencoder", "text_encoder")}
    save_reference(path, model, {**weights, "unet": modules["unet"].state_dict()})
    points = trajectory_points(load_reference(path), 8, 0)
    assert len(points) == 4
    assert set(points[1].tolist()) <= {999, 499}
    record = run(path, tmp_path / "out")
    line = json.loads((tmp_path / "out.training" / "prune.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(line["output"] + line["feature"], rel=1e-5)
    assert load_reference(tmp_path / "out").model["distilled"] == model["distilled"]
    assert record["figures"]["prediction_error"] < 10
    with pytest.raises(TrainingError, match="has no task but to do as its teacher; give output_weight"):
        run(path, tmp_path / "other", changed(output_weight=0.0, feature_weight=0.0))


def test_a_resumed_run_equals_the_uninterrupted_one_and_keeps_its_choice(make_teacher, tmp_path, monkeypatch):
    path = make_teacher()
    config = changed(6)
    run(path, tmp_path / "whole", config)
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return feature_loss(*arguments)

    monkeypatch.setattr(imitation, "feature_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "cut", config)
    with pytest.raises(TrainingError, match=r"choice\.json holds the choice of an earlier run; add --resume"):
        run(path, tmp_path / "cut", config)
    monkeypatch.setattr(module, "choose", lambda *rest: pytest.fail("chosen again"))
    with pytest.raises(TrainingError, match=r"choice\.json was written with another configuration"):
        run(path, tmp_path / "cut", changed(7), resume=True)
    run(path, tmp_path / "cut", config, resume=True)
    whole, cut = (load_reference(tmp_path / name).unet.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    (tmp_path / "cut.training" / "choice.json").write_text("{")
    (tmp_path / "cut").rename(tmp_path / "done")
    with pytest.raises(TrainingError, match=r"choice\.json does not parse"):
        run(path, tmp_path / "cut", config, resume=True)


def test_a_loss_that_diverges_stops_with_the_last_good_state_and_a_knob(make_teacher, tmp_path, monkeypatch):
    calls = []

    def poisoned(*arguments):
        calls.append(1)
        return feature_loss(*arguments) + (1e6 if len(calls) == 4 else 0)

    monkeypatch.setattr(imitation, "feature_loss", poisoned)
    with pytest.raises(TrainingError, match=r"training diverges; the last good state is .*prune\.safetensors\. Lower"):
        run(make_teacher(), tmp_path / "out")


def test_bad_data_and_an_existing_directory_are_named(make_teacher, tmp_path):
    path = make_teacher()
    many = dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, batch_size=513))
    with pytest.raises(DataError, match=r"fewer than one batch \(513\)"):
        run(path, tmp_path / "out", many)
    (tmp_path / "out").mkdir()
    with pytest.raises(TrainingError, match="out exists; remove it"):
        run(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speedup = 1.0", "speedup is 1.0; give more than 1"),
        ("cost = 'joules'", "cost is 'joules'; allowed: milliseconds, flops"),
        ("points = 0", "points is 0; give 1 or more"),
        ("task_weight = -1.0", "task_weight is -1.0; give 0 or more"),
        ("task_weight = 0.0\noutput_weight = 0.0\nfeature_weight = 0.0", "are all 0; there is nothing to learn"),
        ("caption_dropout = 2.0", "caption_dropout is 2.0; allowed: 0 to 1"),
        ("[training]\nbatch_size = 0", "training.batch_size is 0; give 1 or more"),
        ("[training]\nresolutions = [32]\ngrow_at = [2]", "not for pruning"),
        ("keep = [1]", r"keep is \[1\]; give a list of texts"),
        ("speedups = 2.0", "unknown key 'speedups'; did you mean 'speedup'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path, text, message):
    file = tmp_path / "own.toml"
    file.write_text(f"preset = 'gpu'\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_prune_config(file)


def test_what_to_keep_can_be_written_in_a_file(tmp_path):
    (tmp_path / "own.toml").write_text('keep = ["innermost", "up.3.block"]\n')
    assert load_prune_config(tmp_path / "own.toml").keep == ("innermost", "up.3.block")
