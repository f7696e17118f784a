"""Teacher and students side by side: what is measured, and the faults that it must show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_deploy.errors import ConfigError
from ldm_deploy.eval import scoreboard
from ldm_deploy.eval.grid import Grid
from ldm_deploy.eval.scoreboard import (
    Model,
    compare_students,
    describe_scoreboard,
    distances_to_data,
    diversity,
    read_model_of,
    row_name,
)
from ldm_deploy.training.data import ImageSet

GRID = Grid(("red heart", "sun", "ghost"), (0, 1))


class Squared:
    """A distance with LPIPS' interface that can be computed by hand, and features that are the mean colours."""

    available, reason, backbone, weights_sha256, set_features = True, None, "none", None, "mean colour"

    def __call__(self, reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
        return self.compare(reference, candidate)[0]

    def compare(self, reference: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        one, other = reference / 255.0, candidate / 255.0
        return ((one - other) ** 2).mean((1, 2, 3)), one.mean((1, 2)), other.mean((1, 2))


def flat(levels: list[int]) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), level, np.uint8) for level in levels])


class Absent:
    available, reason = False, "no weights of the LPIPS backbone"


def test_diversity_is_the_mean_over_prompts_of_the_distance_between_seeds():
    found = diversity(flat([0, 255, 0, 0, 255, 255]), GRID, Squared())  # type: ignore[arg-type]
    assert found["mean"] == pytest.approx(1 / 3)
    assert found["n"] == 3
    low, high = found["ci95"]
    assert low <= found["mean"] <= high


def test_a_student_with_one_answer_per_prompt_has_no_diversity():
    assert diversity(flat([0, 0, 90, 90, 200, 200]), GRID, Squared())["mean"] == 0  # type: ignore[arg-type]


def test_one_seed_tells_nothing_of_diversity():
    found = diversity(flat([0, 1, 2]), Grid(GRID.prompts, (0,)), Squared())  # type: ignore[arg-type]
    assert found["mean"] is None
    assert "two seeds" in found["reason"]


def test_a_set_of_another_colour_is_further_from_the_data():
    rng = np.random.default_rng(0)

    def draw(base: int) -> np.ndarray:
        return rng.integers(base, base + 40, (24, 4, 4, 3)).astype(np.uint8)

    nobody = np.zeros(24, bool)
    images = ImageSet(draw(100), ["sun"] * 24, ["a"] * 24, nobody, nobody, "sha256:0", [""] * 24)
    near, far = (distances_to_data(draw(base), images, Squared()) for base in (100, 160))  # type: ignore[arg-type]
    assert near["frechet_distance"]["value"] < 0.1 * far["frechet_distance"]["value"]
    assert near["kernel_distance"]["value"] < 0.1 * far["kernel_distance"]["value"]


def test_the_shipped_student_is_asked_once_per_step_and_its_teacher_twice():
    teacher = read_model_of("reference", None)
    student = read_model_of("few-steps", teacher)
    assert (teacher.steps, teacher.evaluations) == ((50,), 2)
    assert (student.steps, student.evaluations) == ((8, 4, 2, 1), 1)
    assert {file.name for file in student.files} >= {"unet.safetensors", "autoencoder.safetensors"}


def test_students_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    sizes = iter([(64, 64), (32, 32)])
    monkeypatch.setattr(
        scoreboard, "read_model_of", lambda source, teacher: Model(str(source), {}, {}, (1,), 1, (), next(sizes))
    )
    with pytest.raises(ConfigError, match=r"small draws 32x32 and reference 64x64; give students of this teacher"):
        compare_students("reference", ["small"], tmp_path)


def test_rows_are_named_after_directories_and_none_twice(tmp_path: Path):
    assert read_model_of("few-steps", None).name == "few-steps fp32-torch-cpu"
    with pytest.raises(ConfigError, match=r"two of the models are called 'few-steps fp32-torch-cpu'"):
        compare_students("reference", ["few-steps", "few-steps"], tmp_path)


def test_rows_of_a_planted_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Teacher and a student twice as fast in one step, which fails in two."""
    teacher = Model("teacher", {}, {}, (50,), 2, (), (4, 4))
    student = Model("student", {}, {}, (2, 1), 1, (), (4, 4))
    monkeypatch.setattr(scoreboard, "read_model_of", lambda source, _: {"teacher": teacher, "student": student}[source])
    monkeypatch.setattr(scoreboard, "Lpips", Squared)
    levels = flat([10, 20, 100, 120, 200, 240])
    nobody = np.zeros(3, bool)
    data = ImageSet(flat([15, 110, 220]), list(GRID.prompts), ["a"] * 3, nobody, nobody, "sha256:0", [""] * 3)
    monkeypatch.setattr("ldm_deploy.training.data.load_images", lambda *arguments: data)
    monkeypatch.setattr(
        scoreboard,
        "retrieve",
        lambda drawn, images, grid: {"rate": 0.5, "hits": 3, "n": 6, "method": "x", "reason": None},
    )

    def drawn(models: Any, grid: Grid, threads: Any, seed: int) -> Any:
        rows = {
            row_name(teacher, 50): [(100.0 + index, image) for index, image in enumerate(levels)],
            row_name(student, 1): [(50.0 + index / 2, image) for index, image in enumerate(levels)],
        }
        return rows, {row_name(student, 2): "student: it holds NaN"}, {"teacher": 7, "student": 5}

    monkeypatch.setattr(scoreboard, "_draw", drawn)
    report = compare_students("teacher", ["student"], "data", grid=GRID, picture=tmp_path / "images.png")
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["teacher, 50 steps", "student, 2 steps", "student, 1 step"]
    assert rows["teacher, 50 steps"]["unet_evaluations"] == 100
    assert rows["student, 2 steps"]["status"] == "failed"
    fast = rows["student, 1 step"]
    assert fast["speedup"]["median"] == pytest.approx(2)
    assert fast["against_teacher"]["psnr_db"]["mean"] == 100  # the same images
    assert fast["diversity"] == rows["teacher, 50 steps"]["diversity"]
    assert fast["peak_memory_bytes"] == 5
    lines = describe_scoreboard(report)
    assert "failed: student: it holds NaN" in lines[2]
    assert "2.0 (2.0–2.0)" in lines[3]
    assert lines[4:] == ["retrieval: nearest image by x"]
    assert (tmp_path / "images.png").stat().st_size > 0


def test_what_lpips_would_tell_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        scoreboard, "retrieve", lambda *given: {"rate": 0.5, "method": "pixels", "reason": Absent.reason}
    )
    row = scoreboard._figures(flat([0] * 6), None, GRID, Absent(), 0)  # type: ignore[arg-type]
    assert row["diversity"]["mean"] is None
    row |= {"name": "a", "status": "ok", "unet_evaluations": 1, "latency_ms": {"median": 1.0}, "speedup": None}
    lines = describe_scoreboard({"rows": [{**row, "size_bytes": 0}]})
    assert lines[2:] == ["retrieval: nearest image by pixels", "no weights of the LPIPS backbone"]
