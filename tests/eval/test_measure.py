"""Drawing is repeated, once, where a ratio changed while it was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ldm_deploy.eval.latency import WorkerError
from ldm_deploy.eval.measure import BASELINE, draw_all

QUIET = [10.0 + 0.01 * (index % 3) for index in range(24)]
DRIFTING = [10.0 if index < 12 else 14.0 for index in range(24)]
IMAGE = np.zeros((1, 1, 3), np.uint8)


class Planned:
    """A worker whose calls take the times of one run after the other; None fails."""

    def __init__(self, name: str, *runs: list[float] | None) -> None:
        self.name, self.runs, self.calls, self.stopped = name, runs, 0, False

    def take(self) -> float:
        run, place = divmod(self.calls, 24)
        self.calls += 1
        times = self.runs[run]
        if times is None:
            raise WorkerError(f"{self.name} died")
        return times[place]

    def stop(self) -> None:
        self.stopped = True


def draw(worker: Any, index: int) -> tuple[float, np.ndarray]:
    return worker.take(), IMAGE


def drawn_by(*workers: Any, count: int = 24) -> tuple[dict[str, list[float]], dict[str, str]]:
    drawn, failed = draw_all(workers, draw, count, seed=0)
    return {name: [took for took, _ in results] for name, results in drawn.items()}, failed


def test_a_quiet_run_counts_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    times, failed = drawn_by(Planned(BASELINE, QUIET), Planned("int8", QUIET))
    assert times == {BASELINE: QUIET, "int8": QUIET}
    assert failed == {}
    assert "once more" not in capsys.readouterr().err


def test_after_a_drift_the_second_run_counts(capsys: pytest.CaptureFixture[str]) -> None:
    times, _ = drawn_by(Planned(BASELINE, DRIFTING, QUIET), Planned("int8", QUIET, QUIET))
    assert times == {BASELINE: QUIET, "int8": QUIET}
    said = capsys.readouterr().err
    assert (
        "too noisy: the ratio was 1.00 in the first half of the run and 1.40 in the second: drawing once more" in said
    )


def test_it_is_repeated_once_and_then_stays_what_it_is() -> None:
    times, _ = drawn_by(Planned(BASELINE, DRIFTING, DRIFTING), Planned("int8", QUIET, QUIET))
    assert times == {BASELINE: DRIFTING, "int8": QUIET}


def test_who_failed_is_not_asked_again() -> None:
    dead, late = Planned("dead", None), Planned("late", QUIET, None)
    times, failed = drawn_by(Planned(BASELINE, DRIFTING, QUIET), Planned("int8", QUIET, QUIET), dead, late)
    assert set(times) == {BASELINE, "int8"}
    assert failed == {"dead": "dead died", "late": "late died"}
    assert dead.calls == 1


def test_of_few_images_nothing_can_be_said() -> None:
    few = [10.0, 10.0, 14.0, 14.0]
    assert drawn_by(Planned(BASELINE, few), Planned("int8", QUIET), count=4)[0][BASELINE] == few
