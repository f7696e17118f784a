"""Progress: plain lines off a terminal, a bar on one, nothing when quiet."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest

from ldm_deploy import progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    yield fake
    progress.set_quiet(False)


def run(clock: Clock, total: int, step_s: float) -> None:
    with progress.task("drawing", total) as advance:
        for _ in range(total):
            clock.now += step_s
            advance()


def test_a_line_early_and_every_tenth_with_what_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 40, 3.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[:2] == ["drawing: 1/40, about 1 min 57 s left", "drawing: 4/40, about 1 min 48 s left"]
    assert lines[-1] == "drawing: 40/40 in 2 min 00 s"


def test_what_an_earlier_run_did_does_not_count_as_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("training", 1000, done=900) as advance:
        clock.now += 3.0
        advance()
    assert capsys.readouterr().err.splitlines()[0] == "training: 901/1000, about 4 min 57 s left"


def test_a_short_task_is_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 40, 0.01)
    assert capsys.readouterr().err == ""


def test_quiet_is_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress.set_quiet(True)
    run(clock, 40, 3.0)
    progress.note("hello")
    assert capsys.readouterr() == ("", "")


def test_an_error_passes_through(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError):
        fail(after=1)
    assert capsys.readouterr().err == ""


def fail(after: int) -> None:
    with progress.task("inner", 3) as advance:
        advance(after)
        raise KeyError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_bar_even_when_tasks_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.task("outer", 2) as outer:
        outer()
        with pytest.raises(KeyError):
            fail(after=2)
        progress.note("a line [with brackets]")
        outer()
    assert progress._bars is None
    shown = terminal.getvalue()
    for text in ("outer", "inner", "2/2", "2/3", "a line [with brackets]"):
        assert text in shown


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (-1, "0 s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
