"""Where a worker's threads and pages lie. Left to chance, either changes the latency of one and the same engine.

Measured with a 4 M-parameter U-Net, 11 ms a call, on two cores. Threads: with its helper woken now on the other core,
now on its own, ONNX Runtime needs 11 or 15 ms; with a core for each thread the spread of paired ratios halves. Pages:
ten processes that run the same engine differ by 1.2 % (standard deviation; one in twenty by 6 %), because 4 KiB pages
fall on cache sets by chance; with huge pages they differ by 0.2 %. See Mytkowicz et al. 2009, "Producing wrong data
without doing anything obviously wrong" (ASPLOS).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

HUGE_PAGES = "glibc.malloc.hugetlb=1"  # malloc asks for transparent huge pages; glibc 2.35 and later, others ignore it
BUSY = 0.02  # of the busiest thread's processor time


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process whose heap lies on huge pages where the system has them."""
    given = environment.get("GLIBC_TUNABLES")
    return {**environment, "GLIBC_TUNABLES": f"{given}:{HUGE_PAGES}" if given else HUGE_PAGES}


def huge_page_bytes() -> int | None:
    """How much of this process lies on huge pages; None where the system does not tell."""
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("AnonHugePages:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def pin(threads: int) -> list[int]:
    """Keep this process on as many processors as it has threads, so that none migrates. Returns the processors."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if threads < len(allowed):
        os.sched_setaffinity(0, allowed[:threads])
    return sorted(os.sched_getaffinity(0))


def thread_times() -> dict[int, int]:
    """Nanoseconds on a processor so far, by thread of this process; empty where the system does not tell."""
    times: dict[int, int] = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            times[int(task.name)] = int((task / "schedstat").read_text().split()[0])
        except OSError:  # it has just ended, or the kernel keeps no such figures
            continue
    return times


def pin_threads(processors: Sequence[int], before: Mapping[int, int]) -> dict[int, int]:
    """Give every thread that computes a processor of its own. Returns thread -> processor.

    A thread computes if it had processor time since `before`, the `thread_times` of then. To be called when all threads
    are there: one made later inherits its maker's one processor. A pool larger than the processors shares them in turn.
    """
    spent = {thread: time - before.get(thread, 0) for thread, time in thread_times().items()}
    if not processors or not spent:
        return {}
    busy = [thread for thread in sorted(spent) if spent[thread] > BUSY * max(spent.values())]
    pinned = {thread: processors[place % len(processors)] for place, thread in enumerate(busy)}
    for thread, processor in pinned.items():
        os.sched_setaffinity(thread, {processor})
    return pinned
