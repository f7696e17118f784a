"""Progress on stderr for what takes a while: a bar on a terminal, now and then a plain line elsewhere.

>>> with task("drawing images", total=48) as advance:
...     for _ in range(48):
...         advance()
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_quiet = False
_bars: Any = None  # the one rich.progress.Progress on screen; nested tasks are further rows of it
_open_tasks = 0

PLAIN_INTERVAL_S = 2.0  # between two plain lines of a task, so that short tasks do not fill a log


def set_quiet(quiet: bool) -> None:
    """With `True`, `task` and `note` print nothing."""
    global _quiet
    _quiet = quiet


def note(text: str) -> None:
    """Print one line above any open bar."""
    if _quiet:
        return
    if _bars is not None:
        _bars.console.print(text, markup=False, highlight=False)
    else:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def task(description: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show how far `total` steps have come, with the time that is left; `done` were taken in an earlier run.

    Yields `advance(steps=1)`. Tasks may be nested. After an exception the bar stays where it stopped.
    """
    if _quiet:
        yield lambda steps=1: None
    elif sys.stderr.isatty():
        with _bar(description, total, done) as advance:
            yield advance
    else:
        yield from _plain(description, total, done)


@contextmanager
def _bar(description: str, total: int, done: int) -> Iterator[Callable[..., None]]:
    from rich import progress
    from rich.console import Console

    global _bars, _open_tasks
    with _lock:
        if _bars is None:
            _bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            _bars.start()
        _open_tasks += 1
        bars = _bars
        row = bars.add_task(description, total=total, completed=done)
    try:
        yield lambda steps=1: bars.advance(row, steps)
    finally:
        with _lock:
            bars.stop_task(row)
            _open_tasks -= 1
            if _open_tasks == 0:
                bars.stop()
                _bars = None


def _plain(description: str, total: int, done: int) -> Iterator[Callable[..., None]]:
    """A line early, one about every tenth of the way, `PLAIN_INTERVAL_S` apart or more, and one after a long task."""
    start = last = time.monotonic()
    before, shown = done, -1

    def advance(steps: int = 1) -> None:
        nonlocal done, shown, last
        done += steps
        now = time.monotonic()
        tenth = 10 * done // max(total, 1)
        if tenth > shown and done < total and now - last >= PLAIN_INTERVAL_S:
            left = (now - start) / (done - before) * (total - done)
            print(f"{description}: {done}/{total}, about {duration(left)} left", file=sys.stderr, flush=True)
            shown, last = tenth, now

    yield advance
    taken = time.monotonic() - start
    if taken >= PLAIN_INTERVAL_S:
        print(f"{description}: {done}/{total} in {duration(taken)}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
