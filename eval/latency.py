"""Latency that can be compared: one worker process per engine, one active at a time, rounds interleaved at random.

What slows the machine down (another tenant, heat, a changed clock) then falls on all alike, and the ratio of paired
samples is steady where the milliseconds are not.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval.machine import machine, usable_threads
from ldm_deploy.eval.placement import with_huge_pages
from ldm_deploy.eval.speedup import narrow, speedup

__all__ = [
    "Worker",
    "WorkerError",
    "WorkerTimeoutError",
    "compare_engines",
    "interleaved",
    "machine",
    "summary",
    "warm_up",
]

LEAST_ROUNDS = 5  # whatever the time limit says: fewer have no useful interval
ROUNDS_PER_LOOK = 20  # before an interval is asked whether it is narrow enough
LONG_MS = 10_000  # of calling an engine before it is timed: one that takes seconds is not waited for
THREADS_TO_LOAD = 2  # an engine that is opened keeps about as many busy
P99_SAMPLES = 100  # fewer have no 99th percentile

# numpy's OpenBLAS lets threads spin for 2^26 cycles once they have nothing to do; a worker would take them for threads
# that compute. The least that it allows is 2^4.
NUMPY_SLEEPS = {"OPENBLAS_THREAD_TIMEOUT": "4"}

T = TypeVar("T")


class WorkerError(EvaluationError):
    """A worker that died, did not answer in time, or could not do what it was asked."""


class WorkerTimeoutError(WorkerError):
    """A worker that did not answer in time; it was ended."""


class Worker:
    """A process that holds one variant, reference or engine. Use as a context manager; entering loads it.

    `spec`: {"kind": "variant", "bundle", "variant"}, {"kind": "reference", "path"}, {"kind": "engine", "bundle",
    "engine"}, {"kind": "engine", "runtime": "onnxruntime" or "openvino", "path"} (OpenVINO's also takes "precision" and
    "rest"), {"kind": "module", "path", "component", "precision", "device", "compile"} (see `worker.open_module`) or
    {"kind": "factory", "file", "function"} with, if the function takes some, "arguments". `huge_pages`: see
    `placement.py`; for workers whose memory is not measured.
    No call waits longer than `timeout_s`: `WorkerError` says what happened, and the process is ended.
    """

    def __init__(
        self,
        name: str,
        spec: Mapping[str, Any],
        *,
        threads: int | None = None,
        timeout_s: float = 600.0,
        huge_pages: bool = False,
    ) -> None:
        self.name = name
        self.spec = dict(spec)
        self.threads = threads or usable_threads()
        self.timeout_s = timeout_s
        self.huge_pages = huge_pages
        self.load_ms: float | None = None  # imports included
        self.cold_start_ms: dict[str, float] = {}
        self.processors: list[int] = []
        self.clock = "host"  # what the last `run` was timed with
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._folder: Path | None = None

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and load the subject.

        `cold_start_ms` has "process" (interpreter, numpy), "import" (the engine's library), "load" (opening engines).
        """
        began = time.time()
        self._folder = Path(tempfile.mkdtemp(prefix="ldm-deploy-worker-"))
        environment = {**NUMPY_SLEEPS, **os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        if self.huge_pages:
            environment = with_huge_pages(environment)
        with (self._folder / "stderr.txt").open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ldm_deploy.eval.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
            )
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        try:
            answer = self._ask({"op": "load", "spec": self.spec, "threads": self.threads})
        except BaseException:
            self.stop()
            raise
        process_ms = max(0.0, 1000 * (answer["ready"] - began))  # both clocks are the system's
        self.cold_start_ms = {"process": process_ms, "import": answer["import_ms"], "load": answer["load_ms"]}
        self.load_ms, self.processors = answer["import_ms"] + answer["load_ms"], answer["processors"]

    def image(self, prompt: str | Sequence[str], seed: int | Sequence[int], **options: Any) -> tuple[float, np.ndarray]:
        """Draw one image, or several at once: (milliseconds, the first as uint8 (H, W, 3)).

        `options`: the pipeline's keyword arguments.
        """
        out = self._files() / "image.npy"
        answer = self._ask({"op": "image", "prompt": prompt, "seed": seed, **options, "out": str(out)})
        return answer["latency_ms"], np.load(out, allow_pickle=False)

    def put(self, feeds: Mapping[str, np.ndarray]) -> str:
        """Store feeds for `run`; returns their key."""
        folder = self._files()
        path = folder / f"feeds{len(list(folder.glob('feeds*.npz')))}.npz"
        arrays: dict[str, Any] = dict(feeds)
        np.savez(path, allow_pickle=False, **arrays)
        return str(path)

    def run(self, feeds: str, *, component: str | None = None, repeats: int = 1) -> list[float]:
        """Run one engine `repeats` times on feeds from `put`: milliseconds of each call."""
        answer = self._ask({"op": "run", "feeds": feeds, "component": component, "repeats": repeats})
        self.clock = answer["clock"]
        times: list[float] = answer["latency_ms"]
        return times

    def settle(self) -> dict[str, Any]:
        """After warm-up, of a worker that holds one engine: give every thread that computes a processor of its own.

        Returns {"threads": how many were pinned, "huge_page_bytes": what lies on huge pages or None}.
        """
        return self._ask({"op": "settle"})

    def memory(self) -> dict[str, Any]:
        """What the worker's process held and holds: see `MemoryLog.report`."""
        return self._ask({"op": "memory"})

    def stop(self, patience_s: float = 0.5) -> None:
        """End the process, whatever state it is in; it has `patience_s` to go by itself. May be called again."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()  # an idle worker sees the end of its input and goes
            try:
                process.wait(timeout=patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _files(self) -> Path:
        if self._folder is None:
            raise WorkerError(f"{self.name}: its worker is not running")
        return self._folder

    def _listen(self, stream: Any) -> None:
        with stream:
            for line in stream:
                self._answers.put(line)
        self._answers.put(None)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.stdin is None:
            raise WorkerError(f"{self.name}: its worker is not running")
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self.timeout_s)
        except queue.Empty:
            self.stop(patience_s=0)
            raise WorkerTimeoutError(
                f"{self.name}: no answer to {request['op']!r} within {self.timeout_s:g} s; its worker was ended"
            ) from None
        except OSError:
            line = None
        if line is None:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        assert self._process is not None
        assert self._folder is not None
        code = self._process.wait()
        lines = (self._folder / "stderr.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it left no message")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        self.stop()
        return f"{self.name}: its worker died {how}{hint}: {last}"


class Stoppable(Protocol):
    """What can take turns: a worker, or one engine inside a worker."""

    @property
    def name(self) -> str: ...

    def stop(self) -> None: ...


Turn = TypeVar("Turn", bound=Stoppable)


def start_all(workers: Sequence[Worker], after: Callable[[], object] | None = None) -> dict[str, str]:
    """Start workers one after another; returns name -> reason of those that could not be loaded."""
    failed: dict[str, str] = {}
    for worker in workers:
        try:
            worker.start()
        except WorkerError as error:
            failed[worker.name] = str(error)
        if after is not None:
            after()
    return failed


def interleaved(
    workers: Sequence[Turn],
    call: Callable[[Turn, int], T],
    rounds: int,
    *,
    seed: int = 0,
    time_limit_s: float | None = None,
    least: int = 1,
    enough: Callable[[Mapping[str, list[T]]], bool] | None = None,
    after: Callable[[], object] | None = None,
) -> tuple[dict[str, list[T]], dict[str, str]]:
    """In every round `call(worker, round)` once per worker, in random order, one at a time.

    Returns (name -> one result per round, name -> reason of those that failed). A worker that fails is ended and takes
    no part in later rounds; its results are dropped, the others' stay paired. After `time_limit_s` no new round begins,
    once there were `least`; nor once `enough(results)`, asked every `ROUNDS_PER_LOOK` rounds. `after` is called
    after every call.
    """
    rng = np.random.default_rng(seed)
    results: dict[str, list[T]] = {worker.name: [] for worker in workers}
    failed: dict[str, str] = {}
    start = time.monotonic()
    for index in range(rounds):
        if index >= least and time_limit_s is not None and time.monotonic() - start > time_limit_s:
            break
        if enough is not None and index and index % ROUNDS_PER_LOOK == 0 and enough(results):
            break
        for place in rng.permutation(len(workers)):
            worker = workers[int(place)]
            if worker.name in failed:
                continue
            try:
                results[worker.name].append(call(worker, index))
            except WorkerError as error:
                failed[worker.name] = str(error)
                del results[worker.name]
                worker.stop()
            if after is not None:
                after()
    return results, failed


def warm_up(call: Callable[[], float], *, least: int = 3, most: int = 12, tolerance: float = 0.1) -> int:
    """Call until the last two latencies (ms) are within `tolerance` of the fastest so far, `LONG_MS` at most.

    Returns the number of calls.
    """
    seen: list[float] = []
    while len(seen) < most:
        seen.append(call())
        if len(seen) >= least and (max(seen[-2:]) <= (1 + tolerance) * min(seen) or sum(seen) > LONG_MS):
            break
    return len(seen)


def summary(samples_ms: Sequence[float]) -> dict[str, Any]:
    """Median and tails as report.json has them, in milliseconds; `p99` where there are samples for it."""
    p5, median, p95, p99 = (float(value) for value in np.percentile(samples_ms, [5, 50, 95, 99]))
    tails = {"p5": p5, "p95": p95} | ({"p99": p99} if len(samples_ms) >= P99_SAMPLES else {})
    return {"median": median, **tails, "samples": len(samples_ms)}


def compare_engines(
    specs: Mapping[str, Mapping[str, Any]],
    feeds: Mapping[str, np.ndarray],
    *,
    rounds: int = 40,
    threads: int | None = None,
    seed: int = 0,
    time_limit_s: float = 60.0,
    timeout_s: float = 600.0,
) -> dict[str, Any]:
    """Engines side by side on the same feeds. The first of `specs` (see `Worker`) is what the others are compared with.

    Returns {"latency_ms": {name: summary}, "samples_ms": {name: [...]}, "failed": {name: reason},
    "speedup": {name: see `speedup.speedup`}}: above 1 means faster than the first. Ends after `rounds`, after
    `time_limit_s`, or when every ratio is known to 4 %.
    """
    workers = [Worker(name, spec, threads=threads, timeout_s=timeout_s) for name, spec in specs.items()]
    keys: dict[str, str] = {}

    def open_once(worker: Worker) -> str | None:
        """Why it could not be loaded or run; what compiles at its first run has done so afterwards."""
        try:
            worker.start()
            keys[worker.name] = worker.put(feeds)
            worker.run(keys[worker.name])
        except WorkerError as error:
            return str(error)
        return None

    failed: dict[str, str] = {}
    try:
        with ThreadPoolExecutor(max(1, usable_threads() // THREADS_TO_LOAD)) as pool:
            for worker, reason in zip(workers, pool.map(open_once, workers), strict=True):
                failed |= {} if reason is None else {worker.name: reason}
        ready = [worker for worker in workers if worker.name not in failed]
        for worker in list(ready):
            try:
                warm_up(lambda worker=worker: worker.run(keys[worker.name])[0])  # type: ignore[misc]
            except WorkerError as error:
                failed[worker.name] = str(error)
                ready.remove(worker)
        samples, broken = interleaved(
            ready,
            lambda worker, _: worker.run(keys[worker.name])[0],
            rounds,
            seed=seed,
            time_limit_s=time_limit_s,
            least=LEAST_ROUNDS,
            enough=narrow,
        )
    finally:
        for worker in workers:
            worker.stop()
    first = next(iter(specs))
    speedups = {
        name: speedup(samples[first], times, first, seed=seed)
        for name, times in samples.items()
        if first in samples and name != first
    }
    return {
        "latency_ms": {name: summary(times) for name, times in samples.items()},
        "samples_ms": samples,
        "speedup": speedups,
        "failed": {**failed, **broken},
    }
