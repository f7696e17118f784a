"""Worker processes and interleaved rounds. Stand-ins differ in speed by ten times; no time is asserted by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_deploy.eval.latency import (
    ROUNDS_PER_LOOK,
    Worker,
    WorkerError,
    compare_engines,
    interleaved,
    start_all,
    summary,
    warm_up,
)

FACTORIES = Path(__file__).with_name("factories.py")
FEEDS = {"sample": np.ones((1, 2), np.float32)}


def spec(function: str) -> dict[str, Any]:
    return {"kind": "factory", "file": str(FACTORIES), "function": function}


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def make(function: str, **options: Any) -> Worker:
        worker = Worker(function, spec(function), **{"threads": 1, "timeout_s": 120.0, **options})
        started.append(worker)
        worker.start()
        return worker

    yield make
    for worker in started:
        worker.stop()


def test_a_worker_draws_runs_and_tells_its_memory(start: Callable[..., Worker]) -> None:
    worker = start("fast")
    milliseconds, image = worker.image("red apple", 0)
    assert milliseconds > 0
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(worker.image("red apple", 0, steps=3)[1], image)
    assert not np.array_equal(worker.image("red apple", 1)[1], image)
    key = worker.put(FEEDS)
    assert len(worker.run(key, component="unet", repeats=3)) == 3
    assert worker.memory()["peak_bytes"] > 2**20


def test_a_cold_start_is_told_apart_and_adds_up(start: Callable[..., Worker]) -> None:
    before = time.monotonic()
    worker = start("fast")
    passed = 1000 * (time.monotonic() - before)
    times = worker.cold_start_ms
    assert list(times) == ["process", "import", "load"]
    assert min(times.values()) >= 0
    assert times["process"] > 0
    assert sum(times.values()) <= passed + 50  # two clocks
    assert worker.load_ms == pytest.approx(times["import"] + times["load"])


def test_what_loading_and_what_a_call_holds_are_told_apart(start: Callable[..., Worker]) -> None:
    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("this system does not tell")
    found = {}
    for mebibytes in (16, 64):
        worker = Worker("heavy", {**spec("heavy_engine"), "arguments": {"mebibytes": mebibytes}}, threads=1)
        with worker:
            worker.run(worker.put(FEEDS))
            found[mebibytes] = worker.memory()
    more = {key: found[64][key] - found[16][key] for key in ("weights_bytes", "activations_bytes", "peak_bytes")}
    assert more["weights_bytes"] == pytest.approx(48 * 2**20, rel=0.05)
    assert more["activations_bytes"] == pytest.approx(96 * 2**20, rel=0.05)
    assert more["peak_bytes"] == pytest.approx(144 * 2**20, rel=0.05)
    assert found[64]["peak_working_bytes"] == found[64]["after_load_bytes"] + found[64]["activations_bytes"]
    assert (found[64]["gpu_peak_bytes"], found[64]["gpu_reason"]) == (None, "it runs on the processor")


def test_a_worker_keeps_to_the_processors_it_was_given(start: Callable[..., Worker]) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system cannot pin processes")
    worker = start("fast")
    assert worker._process is not None
    assert len(os.sched_getaffinity(worker._process.pid)) == 1


def test_a_failed_request_is_one_line_and_the_worker_lives_on(start: Callable[..., Worker]) -> None:
    worker = start("raises")
    with pytest.raises(WorkerError, match=r"^raises: RuntimeError: first line$"):
        worker.image("red apple", 0)
    assert worker.alive


def test_a_worker_that_dies_is_reported_with_its_last_words(start: Callable[..., Worker]) -> None:
    worker = start("dies")
    worker.image("red apple", 0)
    with pytest.raises(WorkerError, match=r"its worker died by SIGKILL \(out of memory\?\): Fatal: no more memory"):
        worker.image("red apple", 1)
    assert not worker.alive
    with pytest.raises(WorkerError, match="is not running"):
        worker.image("red apple", 0)


def test_a_worker_that_hangs_is_ended_after_the_time_limit(start: Callable[..., Worker]) -> None:
    worker = start("hangs")
    worker.timeout_s = 0.5
    with pytest.raises(WorkerError, match=r"no answer to 'image' within 0.5 s; its worker was ended"):
        worker.image("red apple", 0)
    assert not worker.alive


def test_what_cannot_be_loaded_is_a_reason_for_the_others_to_go_on() -> None:
    workers = [Worker(name, spec(name), threads=1) for name in ("does_not_load", "fast", "exits")]
    try:
        failed = start_all(workers)
    finally:
        for worker in workers:
            worker.stop()
    assert set(failed) == {"does_not_load", "exits"}
    assert failed["does_not_load"] == "does_not_load: FileNotFoundError: there is no model"
    assert "its worker died with exit code 7: cannot allocate" in failed["exits"]


def test_stopping_leaves_no_process_and_no_folder(start: Callable[..., Worker]) -> None:
    worker = start("fast")
    process, folder = worker._process, worker._folder
    assert process is not None
    assert folder is not None
    worker.stop()
    worker.stop()
    assert process.poll() is not None
    assert not folder.exists()


class Turn:
    def __init__(self, name: str, breaks_in: int | None = None) -> None:
        self.name, self.breaks_in, self.stopped = name, breaks_in, False

    def stop(self) -> None:
        self.stopped = True


def test_rounds_are_interleaved_in_seeded_random_order() -> None:
    def order(seed: int) -> list[tuple[str, int]]:
        calls: list[tuple[str, int]] = []
        interleaved(
            [Turn("a"), Turn("b"), Turn("c")], lambda turn, index: calls.append((turn.name, index)), 8, seed=seed
        )
        return calls

    calls = order(0)
    rounds = [[name for name, _ in calls[3 * index : 3 * index + 3]] for index in range(8)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2
    assert [index for _, index in calls] == sorted(index for _, index in calls)
    assert order(0) == calls != order(1)


def test_one_that_fails_is_stopped_and_the_others_stay_paired() -> None:
    turns = [Turn("a"), Turn("b", breaks_in=2), Turn("c")]

    def call(turn: Turn, index: int) -> int:
        if turn.breaks_in == index:
            raise WorkerError(f"{turn.name} broke")
        return index

    advanced: list[int] = []
    results, failed = interleaved(turns, call, 4, after=lambda: advanced.append(1))
    assert results == {"a": [0, 1, 2, 3], "c": [0, 1, 2, 3]}
    assert failed == {"b": "b broke"}
    assert [turn.stopped for turn in turns] == [False, True, False]
    assert len(advanced) == 11


def test_the_time_limit_ends_whole_rounds() -> None:
    results, _ = interleaved([Turn("a"), Turn("b")], lambda *_: 1, 1000, time_limit_s=0)
    assert results == {"a": [1], "b": [1]}


@pytest.mark.parametrize(
    ("latencies", "calls"),
    [
        ([9, 5, 5, 5], 3),
        ([100, 50, 20, 10, 10, 10], 6 - 1),
        ([5, 9, 5, 9, 5, 9, 5, 9, 5, 9, 5, 9, 5], 12),
        ([9e3, 5e3, 3e3, 2e3, 1e3], 3),
    ],
)
def test_warm_up_goes_on_until_stable(latencies: list[float], calls: int) -> None:
    assert warm_up(iter([float(value) for value in latencies]).__next__) == calls


def test_a_run_ends_once_enough_is_known() -> None:
    asked: list[int] = []

    def enough(results: Mapping[str, list[int]]) -> bool:
        asked.append(len(results["a"]))
        return len(results["a"]) >= 2 * ROUNDS_PER_LOOK

    results, _ = interleaved([Turn("a"), Turn("b")], lambda _, index: index, 1000, enough=enough)
    assert asked == [ROUNDS_PER_LOOK, 2 * ROUNDS_PER_LOOK]
    assert results["a"] == results["b"] == list(range(2 * ROUNDS_PER_LOOK))


def test_the_99th_percentile_is_told_where_there_are_samples_for_it() -> None:
    assert "p99" not in summary([1.0] * 99)
    assert summary([float(value) for value in range(1, 202)])["p99"] == 199.0


def test_summary_has_median_and_tails() -> None:
    assert summary([float(value) for value in range(101)]) == {
        "median": 50.0,
        "p5": 5.0,
        "p95": 95.0,
        "p99": 99.0,
        "samples": 101,
    }


def test_a_slower_engine_is_found_slower_and_a_broken_one_is_named() -> None:
    specs = {"fp32": spec("fast_engine"), "int8": spec("slow_engine"), "wrong": spec("nan_engine")}
    found = compare_engines(specs, FEEDS, rounds=12, threads=1)
    ratio = found["speedup"]["int8"]
    assert ratio["versus"] == "fp32"
    assert ratio["ci95_high"] < 1
    assert len(found["samples_ms"]["fp32"]) == len(found["samples_ms"]["int8"]) == 12
    assert found["latency_ms"]["int8"]["median"] > found["latency_ms"]["fp32"]["median"]
    assert found["failed"] == {"wrong": "wrong: output 'prediction' holds NaN or infinity"}
    assert set(found["speedup"]) == {"int8"}


def test_without_the_first_there_is_nothing_to_compare_with() -> None:
    found = compare_engines({"fp32": spec("does_not_load"), "int8": spec("fast_engine")}, FEEDS, rounds=2, threads=1)
    assert found["speedup"] == {}
    assert found["latency_ms"]["int8"]["samples"] == 2
    assert "there is no model" in found["failed"]["fp32"]
