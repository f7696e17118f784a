"""Threads that compute get a processor each; the heap asks for huge pages."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ldm_deploy.eval.latency import Worker
from ldm_deploy.eval.placement import HUGE_PAGES, huge_page_bytes, pin_threads, with_huge_pages

FACTORIES = Path(__file__).with_name("factories.py")
FEEDS = {"sample": np.ones((1, 2), np.float32)}
MADVISE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def worker(function: str, **options: int | bool) -> Worker:
    return Worker(function, {"kind": "factory", "file": str(FACTORIES), "function": function}, **options)  # type: ignore[arg-type]


def test_every_thread_that_computes_has_a_processor_of_its_own() -> None:
    processors = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(processors) < 2 or not Path("/proc/self/task").is_dir():
        pytest.skip("needs Linux and two processors")
    with worker("pool_engine", threads=2) as holder:
        holder.run(holder.put(FEEDS), repeats=5)
        assert holder.processors == processors[:2]
        assert holder._process is not None
        tasks = [int(path.name) for path in Path(f"/proc/{holder._process.pid}/task").iterdir()]
        assert all(os.sched_getaffinity(task) == set(processors[:2]) for task in tasks)
        assert holder.settle()["threads"] == 2
        places = [os.sched_getaffinity(task) for task in tasks]
    own = [place for place in places if len(place) == 1]
    assert sorted(min(place) for place in own) == processors[:2]
    assert len(places) > len(own)  # the idle thread stays where it likes


def test_without_processors_or_threads_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pin_threads([], {}) == {}
    monkeypatch.setattr("ldm_deploy.eval.placement.thread_times", dict)  # a system without /proc
    assert pin_threads([0], {}) == {}


def test_huge_pages_are_asked_for_beside_what_the_user_tunes() -> None:
    assert with_huge_pages({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": HUGE_PAGES}
    tuned = with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
    assert tuned == {"GLIBC_TUNABLES": f"glibc.malloc.arena_max=2:{HUGE_PAGES}"}


def test_a_worker_told_to_lies_on_huge_pages_and_another_does_not() -> None:
    if huge_page_bytes() is None or not MADVISE.is_file() or "[madvise]" not in MADVISE.read_text():
        pytest.skip("this system has no transparent huge pages on demand")
    found = {}
    for wanted in (True, False):
        with worker("heavy_engine", threads=1, huge_pages=wanted) as holder:
            holder.run(holder.put(FEEDS))
            found[wanted] = holder.settle()["huge_page_bytes"]
    # numpy asks for them by itself for arrays of 4 MiB and more, so what is left is all smaller blocks.
    assert found[True] >= found[False]
    assert found[True] > 32 * 2**20
