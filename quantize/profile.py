"""Where an engine's time goes: milliseconds per op type, from the runtime's own profile."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

NodeTimes = dict[str, float]  # node and kernel -> milliseconds of one run


@dataclass(frozen=True)
class OpCost:
    op: str
    ms: float  # per run
    share: float  # of the time in kernels, 0 to 1
    calls: int  # per run

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ms": round(self.ms, 3), "share": round(self.share, 3)}


def profile_ops(
    path: Path, feeds: Mapping[str, np.ndarray], *, runs: int = 8, threads: int | None = None
) -> list[OpCost]:
    """Kernel time per op type as ONNX Runtime executes the file, dearest first.

    The first run (memory planning) is left out. Kernels run one after another, so the sum is about the latency, plus
    what profiling itself costs.
    """
    return summarize_events(_events(path, feeds, runs, threads), runs)


def onnxruntime_node_times(
    path: Path, feeds: Mapping[str, np.ndarray], *, runs: int = 8, threads: int | None = None
) -> list[NodeTimes]:
    """Milliseconds of every kernel, one dict per run. A key has the node's name and its kernel's."""
    events = _events(path, feeds, runs, threads)
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")[-runs:]
    found: list[NodeTimes] = [{} for _ in starts]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= starts[0]:
            run = found[int(np.searchsorted(starts, event["ts"], side="right")) - 1]
            key = f"{event['name'].removesuffix('_kernel_time')} {event['args']['op_name']}"
            run[key] = run.get(key, 0.0) + event["dur"] / 1000
    return found


def _events(path: Path, feeds: Mapping[str, np.ndarray], runs: int, threads: int | None) -> list[dict[str, Any]]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(runs + 1):
            session.run(None, dict(feeds))
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return events


def summarize_events(events: list[dict[str, Any]], runs: int) -> list[OpCost]:
    """Sum the kernel events of the last `runs` model runs in a profile (`dur` and `ts` in microseconds)."""
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    first = starts[-runs] if len(starts) >= runs else 0
    time_us: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time") and event["ts"] >= first:
            time_us[event["args"]["op_name"]] += event["dur"]
            calls[event["args"]["op_name"]] += 1
    total = sum(time_us.values()) or 1
    return [OpCost(op, us / 1000 / runs, us / total, calls[op] // runs) for op, us in time_us.most_common()]


def profile_openvino(
    spec: Mapping[str, Any], feeds: Mapping[str, np.ndarray], *, runs: int = 8, threads: int | None = None
) -> list[OpCost]:
    """The same as `profile_ops` from OpenVINO's counters. `spec`: of a worker, with "path", "precision" and "rest"."""
    time_ms: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for run in openvino_node_times(spec, feeds, runs=runs, threads=threads):
        for key, milliseconds in run.items():
            kind = key.split(" ")[1]
            time_ms[kind] += milliseconds  # type: ignore[assignment]
            calls[kind] += 1
    total = sum(time_ms.values()) or 1
    return [OpCost(op, ms / runs, ms / total, calls[op] // runs) for op, ms in time_ms.most_common()]


def openvino_node_times(
    spec: Mapping[str, Any], feeds: Mapping[str, np.ndarray], *, runs: int = 8, threads: int | None = None
) -> list[NodeTimes]:
    """Milliseconds of every node that ran, one dict per run. A key has the node's name, its kind and its kernel."""
    from ldm_deploy.runtime.engine_openvino import OpenVinoEngine

    compiled = spec.get("compiled")
    engine = OpenVinoEngine(
        Path(spec["path"]), precision=spec["precision"], rest=spec.get("rest"), threads=threads, profiled=True,
        compiled=None if compiled is None else Path(compiled),
    )  # fmt: skip
    engine.run(feeds)
    found = []
    for _ in range(runs):
        engine.run(feeds)
        found.append({f"{name} {kind} {kernel}": ms for name, kind, kernel, ms in engine.profile()})
    return found


def slower_ops(before: list[OpCost], after: list[OpCost], count: int = 5) -> list[OpCost]:
    """The ops that cost more after than before, by the milliseconds they added: why an engine did not get faster.

    Less than 1 % of the whole time is taken for noise.
    """
    known = {cost.op: cost.ms for cost in before}
    noise = 0.01 * sum(cost.ms for cost in before)
    added = {cost.op: cost.ms - known.get(cost.op, 0.0) for cost in after}
    costly = sorted((cost for cost in after if added[cost.op] > noise), key=lambda cost: -added[cost.op])
    return costly[:count]
