"""Calibration sets: seeded, stratified, bounded, hashed, and refused where they do not fit."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ldm_deploy.errors import QuantizationError
from ldm_deploy.quantize.calibration import (
    PER_WALK,
    TIMESTEP_BINS,
    CalibrationSet,
    Collector,
    Reservoir,
    collect,
    general_prompts,
    read_calibration,
    write_calibration,
)
from ldm_deploy.quantize.calibration import PROMPTS as GENERAL
from ldm_deploy.runtime.pipeline import Pipeline, load
from tests.tiny_bundle import write_tiny_bundle

SOURCE = "sha256:" + "a" * 64
PROMPTS = ("red apple", "sun")
TRAJECTORIES = ((20, True), (10, False))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return load(write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle"), threads=1)


@pytest.fixture(scope="module")
def collected(pipeline: Pipeline) -> CalibrationSet:
    return collect(pipeline, SOURCE, prompts=PROMPTS, trajectories=TRAJECTORIES)


def test_same_seed_same_set(pipeline: Pipeline, collected: CalibrationSet) -> None:
    again = collect(pipeline, SOURCE, prompts=PROMPTS, trajectories=TRAJECTORIES)
    other = collect(pipeline, SOURCE, prompts=PROMPTS, trajectories=TRAJECTORIES, seed=1)
    assert again.digest == collected.digest
    assert other.digest != collected.digest


def test_all_timesteps_and_both_halves_of_guidance_are_in_it(pipeline: Pipeline, collected: CalibrationSet) -> None:
    unet = collected.arrays["unet"]
    bins = Counter((unet["timestep"] * TIMESTEP_BINS // 1000).tolist())
    assert sorted(bins) == list(range(TIMESTEP_BINS))
    assert set(bins.values()) == {6}  # two each: unconditional, conditional, without guidance
    assert unet["sample"].shape == (60, 4, 8, 8)
    # The empty caption's context is there as often as asked for, so is that of both prompts.
    ids = pipeline.tokenizer.encode(["", *PROMPTS])
    contexts = pipeline.components["text_encoder"].run({"input_ids": ids})["encoder_hidden_states"]
    found = [int(np.argmin(((contexts - context) ** 2).sum((1, 2)))) for context in unet["encoder_hidden_states"]]
    assert Counter(found)[0] == 20
    assert set(found) == {0, 1, 2}
    assert collected.arrays["vae_decoder"]["latent"].shape == (4, 4, 8, 8)


def test_the_encoder_gets_the_images_that_were_drawn(pipeline: Pipeline, collected: CalibrationSet) -> None:
    images = pipeline.decode(np.float32(pipeline.model["scale_factor"]) * collected.arrays["vae_decoder"]["latent"])
    found = collected.arrays["vae_encoder"]["image"]
    assert (found.dtype, found.shape) == (np.float32, (4, 3, 32, 32))
    wanted = sorted((image.transpose(2, 0, 1) / 127.5 - 1).ravel().tolist() for image in images)
    np.testing.assert_allclose(sorted(image.ravel().tolist() for image in found), wanted, atol=1e-6)


def test_every_trajectory_is_drawn_for_other_prompts(pipeline: Pipeline) -> None:
    """Samples of few prompts would let ranges fit these, and the choice between methods not see it."""
    prompts = [f"{number} apples" for number in range(2 * PER_WALK)]
    found = collect(pipeline, SOURCE, prompts=prompts, trajectories=((1, False), (1, False)), per_stratum=99)
    ids = pipeline.tokenizer.encode(prompts)
    contexts = pipeline.components["text_encoder"].run({"input_ids": ids})["encoder_hidden_states"]
    assert len(np.unique(contexts, axis=0)) == len(prompts)
    seen = found.arrays["unet"]["encoder_hidden_states"]
    assert {int(np.argmin(((contexts - one) ** 2).sum((1, 2)))) for one in seen} == set(range(len(prompts)))


def test_a_model_that_left_few_prompts_gets_general_ones_that_no_report_draws() -> None:
    own = {"prompts": {"report": ["hot dog", "sun"], "calibration": ["moon"]}}
    found = general_prompts(own)
    assert found[0] == "moon"
    assert "hot dog" in GENERAL
    assert not {"hot dog", "sun"} & set(found)
    assert len(found) == len(set(found)) == len(GENERAL)
    many = [str(number) for number in range(len(GENERAL))]
    assert general_prompts({"prompts": {"calibration": many}}) == many
    assert general_prompts({}) == list(GENERAL)


def test_the_pipeline_is_left_as_it_was(pipeline: Pipeline) -> None:
    before = dict(pipeline.components)
    collect(pipeline, SOURCE, prompts=("sun",), trajectories=((2, True),))
    assert dict(pipeline.components) == before


def test_memory_does_not_grow_with_the_number_of_rows() -> None:
    def peak(rows: int) -> int:
        collector = Collector(1000, 0)
        tracemalloc.start()
        for index in range(rows):
            row = {"sample": np.full((4, 16, 16), index, np.float32), "timestep": np.array(index % 1000)}
            collector.offer_unet(row, 0, 1)
            collector.offer_decoder({"latent": row["sample"]}, 0, 1)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(8000) < 1.1 * peak(1000)


def test_a_reservoir_gives_every_row_the_same_chance() -> None:
    counts: Counter[int] = Counter()
    for seed in range(400):
        reservoir = Reservoir(5, np.random.default_rng(seed))
        for index in range(50):
            reservoir.offer({"row": np.array(index)})
        counts.update(int(row["row"]) for row in reservoir.rows)
    assert sum(counts.values()) == 2000
    # 40 expected, standard deviation 6
    assert min(counts.values()) > 15
    assert max(counts.values()) < 70


def test_it_survives_the_disk(collected: CalibrationSet, tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    write_calibration(collected, path)
    found = read_calibration(path)
    assert found.digest == collected.digest
    assert found.source == SOURCE
    assert found.details == collected.details
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["samples"] == {"unet": 60, "vae_decoder": 4, "vae_encoder": 4}
    assert record["seed"] == 0
    assert record["trajectories"][0] == {"steps": 20, "guidance_scale": 2.0}


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed", "record", "pickle", "newer"])
def test_damage_is_found(collected: CalibrationSet, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "set.npz"
    write_calibration(collected, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "missing":
        path.unlink()
    elif damage == "changed":
        other = {
            key: {name: value.copy() for name, value in arrays.items()} for key, arrays in collected.arrays.items()
        }
        other["unet"]["sample"][3, 2, 1, 0] += 1
        record = path.with_suffix(".json").read_text()
        write_calibration(CalibrationSet(SOURCE, other, {}), path)
        path.with_suffix(".json").write_text(record)
    elif damage == "record":
        path.with_suffix(".json").write_text("{")
    elif damage == "pickle":
        np.savez(path, **{"unet.sample": np.array([{"a": 1}], dtype=object)})
    else:
        path.with_suffix(".json").write_text('{"format": 2}')
    expected = {"changed": "does not have the digest", "newer": "has format 2; this version reads 1"}
    with pytest.raises(QuantizationError, match=expected.get(damage, "cannot be read")) as caught:
        read_calibration(path)
    assert "\n" not in str(caught.value)


def test_a_set_of_another_model_is_refused(collected: CalibrationSet) -> None:
    collected.check_source(SOURCE)
    with pytest.raises(
        QuantizationError, match=r"another model \(sha256:aaaaaaaaaaaa…, this one is sha256:bbb.*--calibration"
    ):
        collected.check_source("sha256:" + "b" * 64)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no samples for unet; it has nothing"),
        ({"unet": {"sample": np.zeros((0, 4, 2, 2), np.float32)}}, "no samples for unet; it has unet"),
        ({"unet": {"sample": np.full((3, 4), 2, np.float32)}}, "'sample' is 2 everywhere; a constant says nothing"),
        ({"unet": {"sample": np.array([[1.0, 2.0], [3.0, np.nan]])}}, "'sample' is not finite in sample 1"),
        ({"unet": {"a": np.arange(3.0), "b": np.arange(4.0)}}, "'b' has 4 samples, others 3"),
    ],
)
def test_useless_sets_are_refused(arrays: dict[str, dict[str, np.ndarray]], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        CalibrationSet(SOURCE, arrays, {}).samples("unet")


def test_samples_can_be_read_twice(collected: CalibrationSet) -> None:
    samples = collected.samples("unet", [3, 1])
    assert len(samples) == 2
    for _ in range(2):
        assert [int(feeds["timestep"][0]) for feeds in samples] == collected.arrays["unet"]["timestep"][[3, 1]].tolist()
    assert next(iter(samples))["sample"].shape == (1, 4, 8, 8)
