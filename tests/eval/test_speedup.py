"""Ratios, and the marks of runs that are too noisy to judge: planted drifts are found, quiet runs are not marked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ldm_deploy.eval.metrics import ratio_ci
from ldm_deploy.eval.speedup import median_variance, narrow, speedup


def run(rng: np.random.Generator, ratio: np.ndarray | float, count: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Samples of two that share a load which wanders."""
    load = np.exp(0.3 * np.cumsum(rng.standard_normal(count)) / math.sqrt(count))
    baseline = 100 * load * np.exp(0.03 * rng.standard_normal(count))
    return baseline, 100 * load * np.exp(0.03 * rng.standard_normal(count)) / ratio


def test_it_is_ratio_ci_with_what_it_is_against() -> None:
    baseline, candidate = run(np.random.default_rng(0), 2.0)
    found = speedup(baseline, candidate, "fp32", seed=3)
    assert found == {**ratio_ci(baseline, candidate, seed=3), "versus": "fp32", "noise": None}
    assert 1.95 < found["median"] < 2.05


def test_quiet_runs_are_not_marked() -> None:
    rng = np.random.default_rng(1)
    assert [speedup(*run(rng, 1.3), "x")["noise"] for _ in range(60)] == [None] * 60


def test_a_ratio_that_changed_during_the_run_is_marked() -> None:
    """Another tenant, a clock that fell or an engine that still warmed hurts one of the two in half of the run."""
    rng = np.random.default_rng(2)
    steps = np.where(np.arange(48) < 24, 1.3, 1.1)
    marks = [speedup(*run(rng, steps), "x")["noise"] for _ in range(20)]
    assert all(mark is not None for mark in marks)
    assert str(marks[0]).startswith("too noisy: the ratio was 1.")
    assert " in the first half of the run and 1." in str(marks[0])


def test_a_change_within_five_percent_is_left_to_the_interval() -> None:
    exact = np.full(200, 100.0)
    steps = np.where(np.arange(200) < 100, 1.30, 1.27)
    assert speedup(exact, exact / steps, "x")["noise"] is None


def test_an_interval_that_says_nothing_is_marked() -> None:
    rng = np.random.default_rng(3)
    baseline = 100 * np.exp(1.5 * rng.standard_normal(12))
    mark = speedup(baseline, np.full(12, 100.0), "x")["noise"]
    assert str(mark).startswith("too noisy: the 95 % interval ")
    assert str(mark).endswith("is wider than 50%")


def test_one_pair_has_no_interval_and_no_mark() -> None:
    assert speedup([4.0], [2.0], "x") == {
        "median": 2.0, "ci95_low": None, "ci95_high": None, "versus": "x", "noise": None
    }  # fmt: skip


def test_a_run_is_narrow_enough_when_every_ratio_is() -> None:
    rng = np.random.default_rng(4)
    baseline, steady = run(rng, 1.5, 100)
    assert narrow({"fp32": list(baseline), "int8": list(steady)})
    erratic = baseline * np.exp(rng.standard_normal(100))
    assert not narrow({"fp32": list(baseline), "int8": list(steady), "other": list(erratic)})
    assert not narrow({"fp32": [1.0], "int8": [1.0]})
    assert narrow({"alone": [1.0, 2.0]})


def test_the_variance_of_a_median_is_that_of_simulated_ones() -> None:
    rng = np.random.default_rng(5)
    samples = rng.normal(0, 2, (4000, 41))
    assert np.mean([median_variance(row) for row in samples]) == pytest.approx(np.median(samples, 1).var(), rel=0.12)
