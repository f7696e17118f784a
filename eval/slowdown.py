"""Is an engine slower than another? Judged from one interleaved run, on a machine that others use too.

Neither to cry wolf nor to sleep takes an estimate that bursts of load do not move, an interval that holds whatever the
load does, and no more looks at it than were planned:

- A pair is a call of each, one right after the other, in random order. Which of the two meets a burst is then a fair
  coin's choice, so the signs of (log ratio - its median) are independent however the load is correlated in time. The
  sign test's interval of the median (Conover 1999, section 3.2) needs nothing else.
- Each side has several processes, since every process has a speed of its own (`placement.py`). One that stands out from
  its like is left out, on either side by the same rule: one in fifty was seen to be 3 to 7 % slower for its whole life.
  What the others differ by, or what they were seen to differ by elsewhere if that is more, widens the interval.
- The number of looks is fixed beforehand and each has its share of the error (Bonferroni; Jennison and Turnbull 2000,
  chapter 2, on what looking until it fits does to a test).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval.budget import Result, judge
from ldm_deploy.eval.latency import Worker, WorkerTimeoutError, warm_up
from ldm_deploy.eval.machine import conditions, usable_threads
from ldm_deploy.eval.speedup import median_variance

TOLERANCE = 0.02  # slower by this much is not yet slower
LEVEL = 0.99
# After so many pairs, and once more when the time is up
LOOKS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)
PROCESSES = 3  # per side: the fewest of which one can stand out
# Standard deviation of a process's own speed with and without huge pages (measured: 0.2 % and 1.2 %)
PROCESS_SPREAD = {True: 0.003, False: 0.012}
STANDS_OUT = 3.5  # so many standard deviations from the middle process of its side

Call = Callable[[], float]  # milliseconds
Prepare = Callable[[Worker], Call]


@dataclass(frozen=True)
class Slowdown:
    """`ratio`: candidate / baseline with its interval `low` to `high`; above 1 is slower. None where it has none.

    `left_out`: how many of the `processes` on each side stood out and do not count.
    `result` is what `limit` makes of the interval, `reason` says why unless it passed. `seconds`: loading, warm-up and
    measuring. `conditions`: see `machine.conditions`, `before` and `after`.
    """

    result: Result
    reason: str | None
    ratio: float | None
    low: float | None
    high: float | None
    left_out: int
    limit: float
    level: float
    pairs: int
    processes: int
    huge_pages: bool
    seconds: float
    conditions: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def engine_call(feeds: Mapping[str, np.ndarray], component: str | None = None) -> Prepare:
    """What is timed: one engine (for a variant, that of `component`) on `feeds`."""

    def prepare(worker: Worker) -> Call:
        key = worker.put(feeds)
        return lambda: worker.run(key, component=component)[0]

    return prepare


def image_call(prompt: str, seed: int = 0, **options: Any) -> Prepare:
    """What is timed: a whole image, drawn with the pipeline's keyword arguments."""
    return lambda worker: lambda: worker.image(prompt, seed, **options)[0]


def judge_slowdown(
    baseline: Mapping[str, Any],
    candidate: Mapping[str, Any],
    prepare: Prepare,
    *,
    tolerance: float = TOLERANCE,
    level: float = LEVEL,
    time_limit_s: float = 15.0,
    processes: int = PROCESSES,
    threads: int | None = None,
    seed: int = 0,
) -> Slowdown:
    """Does the candidate take more than 1 + `tolerance` times as long as the baseline?

    `baseline`, `candidate`: what workers load (`Worker`'s spec); `prepare`: see `engine_call`. "fail" if the whole
    interval of the ratio, at `level`, is above the limit, "pass" if none of it is, else "not measured". Ends at the
    first look that decides, and after `time_limit_s`, loading included, at what there is by then. Raises `WorkerError`
    for what does not load or run, and `EvaluationError` for settings that make no sense.
    """
    if not (tolerance >= 0 and 0 < level < 1 and time_limit_s > 0 and processes >= 1):
        raise EvaluationError(
            f"tolerance {tolerance:g}, level {level:g}, time limit {time_limit_s:g} s, {processes} processes: give a "
            "tolerance of 0 or more (0.02 is 2 %), a level between 0 and 1, some seconds and one process or more"
        )
    start, before, limit = time.monotonic(), conditions(), 1 + tolerance
    workers = [
        Worker(f"{name} {index + 1}", spec, threads=threads, huge_pages=True)
        for index in range(processes)
        for name, spec in (("baseline", baseline), ("candidate", candidate))
    ]
    interval: Interval | None = None
    result: Result = "not measured"
    confidence = 1 - (1 - level) / (len(LOOKS) + 1)
    try:
        for pairs, huge_pages in _looks(workers, prepare, start + time_limit_s, seed):
            interval = ratio_interval(pairs.log_ratios, pairs.who, confidence, PROCESS_SPREAD[huge_pages])
            if interval is not None:
                result = judge(interval.low, interval.high, limit, minimum=False)
            if result != "not measured":
                break
        seconds = time.monotonic() - start
    finally:
        for worker in workers:
            worker.stop()
    after = conditions()
    reason = _reason(result, interval, limit, level, len(pairs), seconds, after)
    ratio, low, high, left_out = (None, None, None, 0) if interval is None else interval
    return Slowdown(
        result, reason, ratio, low, high, left_out, limit, level, len(pairs), processes, huge_pages, seconds,
        {"before": before, "after": after},
    )  # fmt: skip


def _looks(workers: Sequence[Worker], prepare: Prepare, deadline: float, seed: int) -> Iterator[tuple[Pairs, bool]]:
    """(pairs so far, whether all processes have huge pages): at every planned look, and when the time is up."""
    pairs, huge_pages = Pairs((), ()), True

    def start(worker: Worker) -> None:
        worker.timeout_s = max(0.0, deadline - time.monotonic())
        worker.start()

    try:
        with ThreadPoolExecutor(usable_threads()) as pool:  # nothing is timed yet
            list(pool.map(start, workers))
        calls = [_until(deadline, worker, prepare(worker)) for worker in workers]
        for worker, call in zip(workers, calls, strict=True):
            warm_up(call)
            huge_pages &= bool(worker.settle()["huge_page_bytes"])
        pairs = Pairs(calls[::2], calls[1::2], seed=seed)
        for look in LOOKS:
            while len(pairs) < look:
                pairs.round()
            yield pairs, huge_pages
    except WorkerTimeoutError:
        yield pairs, huge_pages


def _until(deadline: float, worker: Worker, call: Call) -> Call:
    """The call, which is not begun after the deadline and not waited for any longer."""

    def bounded() -> float:
        worker.timeout_s = deadline - time.monotonic()
        if worker.timeout_s <= 0:
            raise WorkerTimeoutError(f"{worker.name}: the time is up")
        return call()

    return bounded


def _reason(
    result: Result,
    interval: Interval | None,
    limit: float,
    level: float,
    pairs: int,
    seconds: float,
    after: Mapping[str, Any],
) -> str | None:
    if result == "pass":
        return None
    spent = f"after {pairs} pairs of calls in {seconds:.1f} s"
    if interval is None:
        return f"too noisy: {spent} are too few for an interval; give more time, a shorter call, or a quieter machine"
    found = (
        f"it takes {interval.ratio:.3f} times as long ({level:.0%} interval {interval.low:.3f} to {interval.high:.3f}) "
        + spent
    )
    if result == "fail":
        return f"{found}; the limit is {limit:g}"
    load = after["load_average"]
    busy = f" (load average {load[0]:.1f})" if load else ""
    return f"too noisy: {found}, and the limit {limit:g} lies inside; give more time, or a quieter machine{busy}"


class Pairs:
    """Calls of two sides, paired at random. `log_ratios`: log(candidate / baseline); `who`: the two processes."""

    def __init__(self, baseline: Sequence[Call], candidate: Sequence[Call], *, seed: int = 0) -> None:
        self._sides = (baseline, candidate)
        self._rng = np.random.default_rng(seed)
        self.log_ratios: list[float] = []
        self.who: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.log_ratios)

    def round(self) -> None:
        """Every process once, each with another of the other side."""
        orders = [self._rng.permutation(len(side)) for side in self._sides]
        for chosen in zip(*orders, strict=True):
            times = [0.0, 0.0]
            for side in self._rng.permutation(2):
                times[side] = self._sides[side][chosen[side]]()
            self.log_ratios.append(math.log(times[1] / times[0]))
            self.who.append((int(chosen[0]), int(chosen[1])))


class Interval(NamedTuple):
    ratio: float
    low: float
    high: float
    left_out: int


def ratio_interval(
    log_ratios: Sequence[float], who: Sequence[tuple[int, int]], confidence: float, process_spread: float
) -> Interval | None:
    """The median of the ratios and its interval; None for too few pairs.

    `log_ratios` (n,), `who` (n, 2): the process of either side. `process_spread`: the least standard deviation of a
    process's own log latency that is reckoned with; more is, where the processes of a side differ by more.
    """
    values, processes = np.asarray(log_ratios, np.float64), np.asarray(who).reshape(-1, 2)
    kept, left_out = np.ones(len(values), bool), 0
    for process in processes.T:
        for label in standing_out(values, process, process_spread):
            kept &= process != label
            left_out += 1
    values, processes = values[kept], processes[kept]
    rank = sign_test_rank(len(values), confidence)
    if rank is None:
        return None
    variance = sum(_process_variance(values, process, process_spread) for process in processes.T)
    spread = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 * variance
    values.sort()
    middle = float(np.median(values))
    low = middle - math.sqrt((middle - values[rank]) ** 2 + spread)
    high = middle + math.sqrt((values[-1 - rank] - middle) ** 2 + spread)
    return Interval(math.exp(middle), math.exp(low), math.exp(high), left_out)


def sign_test_rank(count: int, confidence: float) -> int | None:
    """k such that the k-th smallest and k-th largest of `count` values (from 0) hold the median with `confidence`.

    None if even the extremes do not. That fewer than k + 1 of n fair coins show heads must be rarer than half the
    error: exact, whatever the distribution.
    """
    allowed = (1 - confidence) / 2 * 2**count
    total, rank = 0, None
    for k in range(count // 2):
        total += math.comb(count, k)
        if total > allowed:
            break
        rank = k
    return rank


def standing_out(values: np.ndarray, process: np.ndarray, spread: float) -> list[int]:
    """The processes of a side, of three or more, whose median lies far from that of the middle one."""
    labels, medians, by_chance = _process_medians(values, process)
    if len(labels) < 3:
        return []
    far = np.abs(medians - np.median(medians)) > STANDS_OUT * np.sqrt(spread**2 + by_chance)
    return [int(label) for label in labels[far]]


def _process_variance(values: np.ndarray, process: np.ndarray, least: float) -> float:
    """Variance of a side's mean that comes from its processes: s²/P, s² at least `least`².

    s² is the variance of the processes' medians less what so few calls make them differ by.
    """
    labels, medians, by_chance = _process_medians(values, process)
    seen = float(np.var(medians, ddof=1) - np.mean(by_chance)) if len(labels) > 1 else 0.0
    return max(least**2, seen) / len(labels)


def _process_medians(values: np.ndarray, process: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(processes, median of each, variance of that median)."""
    labels = np.unique(process)
    groups = [values[process == label] for label in labels]
    return labels, np.array([np.median(group) for group in groups]), np.array([median_variance(g) for g in groups])
