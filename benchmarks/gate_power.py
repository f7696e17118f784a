"""The power of the gate: how often it cries wolf, and how often it sleeps.

    .venv/bin/python benchmarks/gate_power.py [--kind TEXT] [--load off|on] [--trials PERCENT] [--table]

Trials of every kind in `KINDS` are run without and with background load and judged by the very functions that gates
call. Each result is a line of build/gate_power/trials.jsonl; a killed run, started again, goes on where it stopped.
With every processor to itself it takes about an hour. Exits 1 if a target is missed.

- `same engine twice`: the U-Net of the shipped reference in ONNX Runtime, fp32, two threads, the batch of two that
  guidance asks for, against itself. Every trial starts its own processes, so that their whims are sampled too.
- `5 % slower`: the same, where every call of the candidate is followed by busy waiting for 5 % of its own time.
- `int8: …`, `fp32: …`: whole variants of the shipped reference against stored results, with a fault planted in one
  engine (`planted_faults.py`) or with none and another number of threads; see `gate_power_quality.py`. Load does not
  change images, so these are run without.
- `elsewhere, int8: …`: as if the result had been stored on another machine, to show what can be told there.

Background load: a process that multiplies matrices in bursts, on average 0.3 s of work and 0.3 s of rest, both
exponentially distributed, from start to end of a trial.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path("build") / "gate_power"
THREADS = 2
PLANTED = 0.05
LOADS = ("off", "on")
BURST_S = 0.3
FAULTS = ("a scale off by 10 %", "two channels swapped", "half a grey level")


@dataclass(frozen=True)
class Kind:
    """One kind of trial: `run(seed)` returns at least `result` (a gate's) and `seconds`.

    `wanted`: what the gate should say, "fail" of a fault and "pass" of none. `count` trials for each of `loads`, of
    which `least` must be caught, or at most `most` may be false alarms. None may take longer than `limit_s`.
    """

    name: str
    count: int
    run: Callable[[int], dict[str, Any]]
    wanted: str
    least: int = 0
    most: int = 0
    limit_s: float = float("inf")
    loads: tuple[str, ...] = LOADS


def quality_kinds(name: str, variant: str, count: int, least: int, *, elsewhere: bool = False) -> list[Kind]:
    def run(fault: str | None) -> Callable[[int], dict[str, Any]]:
        def judge(seed: int) -> dict[str, Any]:
            from gate_power_quality import judge_quality  # here, because workers load this file from elsewhere

            return judge_quality(FOLDER, variant, fault, seed, elsewhere=elsewhere)

        return judge

    none = Kind(f"{name}: nothing planted", count, run(None), "pass", loads=("off",))
    return [none, *(Kind(f"{name}: {fault}", count, run(fault), "fail", least, loads=("off",)) for fault in FAULTS)]


class SlowerEngine:
    """An engine whose every call takes `share` longer."""

    def __init__(self, path: str, share: float) -> None:
        from ldm_deploy.runtime.engines import OnnxRuntimeEngine

        self.engine, self.share = OnnxRuntimeEngine(Path(path), threads=THREADS, spinning=False), share

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        outputs = self.engine.run(feeds)
        end = time.perf_counter()
        while time.perf_counter() < end + self.share * (end - start):
            pass
        return outputs


def unet_bundle() -> Path:
    """The exported U-Net of the shipped reference; made by the first run."""
    bundle = FOLDER / "unet"
    if not (bundle / "bundle.json").is_file():
        from ldm_deploy.export.export import export_source

        export_source("reference", bundle, variants=[("fp32", "onnxruntime-cpu")], components=["unet"], threads=THREADS)
    return bundle


def judge_latency(share: float, seed: int) -> dict[str, Any]:
    """A trial: the U-Net against itself, made slower by `share`."""
    from ldm_deploy.eval.measure import component_feeds
    from ldm_deploy.eval.parity import read_probes
    from ldm_deploy.eval.slowdown import engine_call, judge_slowdown

    bundle = unet_bundle()
    engine = {"kind": "engine", "runtime": "onnxruntime", "path": str(bundle / "engines" / "unet-fp32.onnx")}
    arguments = {"path": engine["path"], "share": share}
    slower = {"kind": "factory", "file": __file__, "function": "SlowerEngine", "arguments": arguments}
    feeds = component_feeds("unet", read_probes(bundle / "probes" / "unet.safetensors"))
    found = judge_slowdown(engine, slower if share else engine, engine_call(feeds), threads=THREADS, seed=seed)
    return found.to_dict()


KINDS = (
    Kind("same engine twice", 200, lambda seed: judge_latency(0.0, seed), "pass", most=2, limit_s=15.5),
    Kind("5 % slower", 100, lambda seed: judge_latency(PLANTED, seed), "fail", least=95, limit_s=15.5),
    *quality_kinds("int8", "int8-onnxruntime-cpu", 100, 100),
    *quality_kinds("fp32", "fp32-onnxruntime-cpu", 100, 100),
    *quality_kinds("elsewhere, int8", "int8-onnxruntime-cpu", 50, 0, elsewhere=True),
)


def burn() -> None:
    """The background load; runs until it is ended."""
    rng = np.random.default_rng()
    matrix = rng.random((300, 300))
    while True:
        end = time.monotonic() + rng.exponential(BURST_S)
        while time.monotonic() < end:
            matrix @ matrix
        time.sleep(rng.exponential(BURST_S))


@contextlib.contextmanager
def background_load(on: bool) -> Iterator[None]:
    if not on:
        yield
        return
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, "--burn"], env={**os.environ, **one_thread})
    try:
        time.sleep(0.5)  # its imports are no part of the load
        yield
    finally:
        process.kill()
        process.wait()


def read_trials(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(kind, load, number) -> trial. A line that a kill cut short is left out, so its trial is run again."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            trial = json.loads(line)
            found[trial["kind"], trial["load"], trial["number"]] = trial
    return found


def append_trial(path: Path, trial: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        if stream.tell() and _last_byte(stream) != b"\n":
            stream.write(b"\n")
        stream.write((json.dumps(trial) + "\n").encode())
        stream.flush()
        os.fsync(stream.fileno())


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, os.SEEK_END)
    last: bytes = stream.read(1)
    return last


def run_trials(path: Path, text: str, loads: tuple[str, ...], percent: float) -> None:
    """Run what is missing; kinds take turns, so that a run cut short has some of each."""
    done = read_trials(path)
    planned = [
        (kind, load, number)
        for load in loads
        for kind in KINDS
        if load in kind.loads and text in kind.name
        for number in range(max(1, round(kind.count * percent / 100)))
    ]
    planned.sort(key=lambda trial: (trial[1], trial[2] / trial[0].count))
    missing = [trial for trial in planned if (trial[0].name, trial[1], trial[2]) not in done]
    for place, (kind, load, number) in enumerate(missing):
        with background_load(load == "on"):
            found = kind.run(number)
        append_trial(path, {"kind": kind.name, "load": load, "number": number, **found})
        told = f"{found['result']} in {found['seconds']:.1f} s"
        print(f"{place + 1}/{len(missing)} {kind.name}, load {load}: {told}", flush=True)


def show(path: Path) -> bool:
    """The table, and whether every target is kept by the trials there are."""
    trials = list(read_trials(path).values())
    print("| trials of | load | number | fail | pass | not measured | seconds: median, 95 %, longest | target |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    kept = True
    for kind in KINDS:
        for load in LOADS:
            own = [trial for trial in trials if (trial["kind"], trial["load"]) == (kind.name, load)]
            if not own:
                continue
            results = [trial["result"] for trial in own]
            counts = {result: results.count(result) for result in ("fail", "pass", "not measured")}
            seconds = [trial["seconds"] for trial in own]
            if kind.wanted == "fail":
                allowed = len(own) * (kind.count - kind.least) / kind.count
                good = len(own) - counts["fail"] <= allowed
                target = f"{kind.least} of {kind.count} caught" if kind.least else "none"
            else:
                good = counts["fail"] <= len(own) * kind.most / kind.count
                target = f"at most {kind.most} of {kind.count} false alarms"
            good = good and max(seconds) <= kind.limit_s
            kept = kept and good
            p50, p95 = np.percentile(seconds, [50, 95])
            print(
                f"| {kind.name} | {load} | {len(own)} | {counts['fail']} | {counts['pass']} | {counts['not measured']} "
                f"| {p50:.1f}, {p95:.1f}, {max(seconds):.1f} | {target}: {'kept' if good else 'MISSED'} |"
            )
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", default="", metavar="TEXT", help="only the kinds whose name has it")
    parser.add_argument("--load", choices=LOADS, default=None, help="only without, or only with background load")
    parser.add_argument("--trials", type=float, default=100.0, metavar="PERCENT", help="how many of the trials")
    parser.add_argument("--table", action="store_true", help="run nothing, show what there is")
    parser.add_argument("--burn", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.burn:
        burn()
    path = FOLDER / "trials.jsonl"
    if not options.table:
        run_trials(path, options.kind, LOADS if options.load is None else (options.load,), options.trials)
    return 0 if show(path) else 1


if __name__ == "__main__":
    sys.exit(main())
