"""The judge of slowdowns: its statistics against scipy and simulations, itself on stand-ins far apart in speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval.latency import WorkerError, WorkerTimeoutError
from ldm_deploy.eval.slowdown import (
    LOOKS,
    PROCESS_SPREAD,
    Pairs,
    engine_call,
    image_call,
    judge_slowdown,
    ratio_interval,
    sign_test_rank,
    standing_out,
)

FACTORIES = Path(__file__).with_name("factories.py")
FEEDS = {"sample": np.ones((1, 2), np.float32)}
SHARE = 1 - 0.01 / (len(LOOKS) + 1)  # the confidence of each look


def spec(function: str) -> dict[str, Any]:
    return {"kind": "factory", "file": str(FACTORIES), "function": function}


@pytest.mark.parametrize("confidence", [0.9, 0.99, SHARE])
@pytest.mark.parametrize("count", [5, 16, 17, 48, 301])
def test_the_ranks_are_those_of_the_binomial_distribution(count: int, confidence: float) -> None:
    rank = sign_test_rank(count, confidence)
    tail = (1 - confidence) / 2
    if rank is None:
        assert stats.binom.cdf(0, count, 0.5) > tail
        return
    # P(fewer than rank + 1 values on one side of the median) fits into the tail, one more would not.
    assert stats.binom.cdf(rank, count, 0.5) <= tail < stats.binom.cdf(rank + 1, count, 0.5)


class Machine:
    """Calls whose latency is their own times that of a load which comes in bursts of 20 calls and has a trend."""

    def __init__(self, seed: int, speeds: dict[str, float]) -> None:
        self.rng = np.random.default_rng(seed)
        self.speeds, self.busy, self.calls = speeds, False, 0

    def call(self, name: str) -> Callable[[], float]:
        def timed() -> float:
            self.calls += 1
            if self.rng.random() < 1 / 20:
                self.busy = not self.busy
            load = math.exp(0.001 * self.calls) * (1.8 + self.rng.gamma(2, 0.1) if self.busy else 1.0)
            return self.speeds[name] * load * math.exp(0.03 * self.rng.standard_normal())

        return timed

    def pairs(self, looks: int, seed: int) -> Pairs:
        sides = [[self.call(name) for name in self.speeds if name.startswith(side)] for side in "ab"]
        pairs = Pairs(*sides, seed=seed)
        while len(pairs) < looks:
            pairs.round()
        return pairs


def like(b: float = 1.0, **processes: float) -> dict[str, float]:
    return {"a1": 1.0, "a2": 1.0, "a3": 1.0, "b1": b, "b2": b, "b3": b, **processes}


def test_bursts_and_a_trend_raise_no_alarm_and_hide_no_slowdown() -> None:
    """Every look is taken, as the judge would if none decided."""
    found = {1.0: 0, 1.05: 0}
    for true in found:
        for trial in range(40):
            machine = Machine(trial, like(true))
            pairs = machine.pairs(258, trial)
            intervals = [
                ratio_interval(pairs.log_ratios[:look], pairs.who[:look], SHARE, PROCESS_SPREAD[True])
                for look in (33, 66, 129, 258)
            ]
            found[true] += any(interval is not None and interval.low > 1.02 for interval in intervals)
    assert found[1.0] == 0
    assert found[1.05] >= 34  # the power itself is measured in benchmarks/gate_power.py


def test_the_order_within_a_pair_is_random_and_every_process_takes_part() -> None:
    order: list[str] = []
    sides = [[lambda name=f"{side}{n}": order.append(name) or 1.0 for n in range(3)] for side in "ab"]  # type: ignore[misc]
    pairs = Pairs(*sides, seed=1)
    for _ in range(40):
        pairs.round()
    assert len(pairs) == 120 == len(pairs.who)
    assert all(sorted(order[6 * n : 6 * n + 6]) == ["a0", "a1", "a2", "b0", "b1", "b2"] for n in range(40))
    firsts = [order[2 * n][0] for n in range(120)]
    assert 40 < firsts.count("a") < 80
    assert len(set(pairs.who)) == 9  # not always with the same partner
    assert pairs.log_ratios == [0.0] * 120


def test_a_process_that_stands_out_is_left_out_of_either_side() -> None:
    for odd in ("a2", "b3"):
        pairs = Machine(3, like(**{odd: 1.07})).pairs(192, 3)
        found = ratio_interval(pairs.log_ratios, pairs.who, SHARE, PROCESS_SPREAD[True])
        assert found is not None
        assert found.left_out == 1
        assert found.low < 1 < found.high
        assert abs(found.ratio - 1) < 0.012
    same = Machine(3, like()).pairs(192, 3)
    assert all(not standing_out(np.array(same.log_ratios), np.array(same.who)[:, side], 0.003) for side in (0, 1))


def test_two_processes_that_differ_widen_the_interval() -> None:
    """None of two can be said to stand out."""
    widths = []
    for odd in (1.0, 1.07):
        speeds = {"a1": 1.0, "a2": 1.0, "b1": 1.0, "b2": odd}
        pairs = Machine(4, speeds).pairs(256, 4)
        found = ratio_interval(pairs.log_ratios, pairs.who, SHARE, PROCESS_SPREAD[True])
        assert found is not None
        assert found.left_out == 0
        assert found.low < 1.02  # neither is an alarm
        widths.append(found.high / found.low - 1)
    assert widths[1] > 3 * widths[0]


def test_what_processes_are_known_to_differ_by_is_in_every_interval() -> None:
    ratios, who = [0.0] * 300, [(n % 3, n // 3 % 3) for n in range(300)]
    found = ratio_interval(ratios, who, 0.99, 0.012)
    assert found is not None
    half = stats.norm.ppf(0.995) * math.sqrt(2 * 0.012**2 / 3)
    assert math.log(found.high) == pytest.approx(half)
    assert math.log(found.low) == pytest.approx(-half)


def test_a_slower_engine_fails_and_a_faster_one_passes() -> None:
    slower = judge_slowdown(
        spec("fast_engine"), spec("slow_engine"), engine_call(FEEDS), threads=1, processes=1, time_limit_s=120
    )
    assert slower.result == "fail"
    assert slower.low is not None
    assert slower.low > slower.limit == 1.02
    assert "times as long (99% interval" in str(slower.reason)
    assert str(slower.reason).endswith("; the limit is 1.02")
    assert slower.pairs in LOOKS
    faster = judge_slowdown(spec("slow"), spec("fast"), image_call("sun", 1), threads=1, processes=1, time_limit_s=120)
    assert (faster.result, faster.reason) == ("pass", None)
    assert faster.high is not None
    assert faster.high < 0.5
    assert faster.to_dict()["conditions"]["before"].keys() == {"load_average", "frequency_mhz", "stolen_s"}


def test_what_cannot_be_told_apart_is_too_noisy() -> None:
    """An engine whose calls take 1 to 30 ms by chance, against itself."""
    found = judge_slowdown(
        spec("erratic_engine"), spec("erratic_engine"), engine_call(FEEDS), threads=1, processes=1, time_limit_s=2.5
    )
    assert found.result == "not measured"
    assert str(found.reason).startswith("too noisy: it takes ")
    assert "the limit 1.02 lies inside; give more time, or a quieter machine" in str(found.reason)


def test_without_the_time_for_an_interval_nothing_is_judged() -> None:
    found = judge_slowdown(spec("fast"), spec("hangs"), image_call("sun"), threads=1, processes=1, time_limit_s=3.0)
    assert (found.result, found.ratio, found.pairs) == ("not measured", None, 0)
    assert "0 pairs of calls" in str(found.reason)
    assert "too few for an interval" in str(found.reason)


def test_what_does_not_load_is_an_error_and_no_verdict() -> None:
    with pytest.raises(WorkerError, match=r"^candidate 1: FileNotFoundError: there is no model$") as raised:
        judge_slowdown(spec("fast_engine"), spec("does_not_load"), engine_call(FEEDS), threads=1, processes=1)
    assert not isinstance(raised.value, WorkerTimeoutError)


@pytest.mark.parametrize("wrong", [{"tolerance": -0.1}, {"level": 1.0}, {"time_limit_s": 0.0}, {"processes": 0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        EvaluationError, match=r"give a tolerance of 0 or more \(0.02 is 2 %\), a level between 0 and 1"
    ):
        judge_slowdown(spec("fast_engine"), spec("fast_engine"), engine_call(FEEDS), **wrong)
