"""Timing one call, on the processor or on a GPU."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Clock = Callable[[Callable[[], T]], tuple[float, T]]


def host_clock(call: Callable[[], T]) -> tuple[float, T]:
    """(milliseconds, result). Right on a GPU too for a call that returns arrays of the host: they are there by then."""
    start = time.perf_counter()
    result = call()
    return 1000 * (time.perf_counter() - start), result


def cuda_clock(call: Callable[[], T]) -> tuple[float, T]:
    """(milliseconds, result) between two events on torch's current stream: the device's own clock, copies included."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()  # what was queued before is not this call's
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)), result


def clock_of(engine: Any) -> tuple[str, Clock[Any]]:
    """("cuda events" or "host", the clock) for an engine: events where torch runs it on a GPU."""
    torch = sys.modules.get("torch")
    if device_of(engine) == "cuda" and torch is not None and torch.cuda.is_available():
        return "cuda events", cuda_clock
    return "host", host_clock


def device_of(engine: Any) -> str:
    """Where an engine runs: "cpu" or "cuda"."""
    module = getattr(engine, "module", None)  # torch's own
    device = next(module.parameters()).device.type if module is not None else getattr(engine, "device", "cpu")
    return str(device).partition(":")[0]
