"""Memory and size: bytes, of a process, of a GPU, and of what a variant is made of."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def peak_memory_bytes() -> int:
    """The largest resident set this process has had since it was started.

    Linux: VmHWM, which starts anew with the program (`ru_maxrss` would carry over what the parent had).
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class MemoryLog:
    """What this process holds before it loads, after, and at most while it works. Linux tells; elsewhere it is None.

    `gpu`: whether the driver is asked too, which costs the process a context.
    """

    def __init__(self, *, gpu: bool = False) -> None:
        self.before = _status_bytes("VmRSS")
        self.after: int | None = None
        self.peak_so_far = 0
        self.restarted = False
        self.gpu_before = _gpu_used_bytes() if gpu else None

    def loaded(self) -> None:
        """From here on, the peak is that of work."""
        self.after, self.peak_so_far = _status_bytes("VmRSS"), peak_memory_bytes()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): starts VmHWM anew
            self.restarted = True
        except OSError:
            pass

    def report(self, device: str) -> dict[str, Any]:
        """report.json's `memory` of one process; resident set, in bytes.

        `before_load`: interpreter and libraries. `weights`: what loading added, that is the weights as the runtime
        holds them and its own structures. `activations`: what work added to that at its peak, outputs included.
        """
        peak = peak_memory_bytes()
        working = peak if self.restarted else None
        found: dict[str, Any] = {
            "peak_bytes": max(peak, self.peak_so_far),
            "before_load_bytes": self.before,
            "after_load_bytes": self.after,
            "peak_working_bytes": working,
            "weights_bytes": None,
            "activations_bytes": None,
            "reason": None
            if working is not None
            else "this system does not tell the peak of a part of a process's life",
        }
        if self.before is not None and self.after is not None:
            found["weights_bytes"] = max(0, self.after - self.before)
        if working is not None and self.after is not None:
            found["activations_bytes"] = max(0, working - self.after)
        return found | self._gpu(device)

    def _gpu(self, device: str) -> dict[str, Any]:
        """The most that torch's allocator handed out; of other runtimes, what the device lacks since before loading.

        They keep what they once took, so that this is their peak, unless another process takes memory meanwhile.
        """
        if device != "cuda":
            return {"gpu_peak_bytes": None, "gpu_reason": "it runs on the processor"}
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            return {"gpu_peak_bytes": int(torch.cuda.max_memory_allocated()), "gpu_reason": None}
        used = _gpu_used_bytes()
        if used is None or self.gpu_before is None:
            reason = "the driver was not asked: cuda-python is not installed; pip install 'ldm-deploy[tensorrt]'"
            return {"gpu_peak_bytes": None, "gpu_reason": reason}
        return {"gpu_peak_bytes": max(0, used - self.gpu_before), "gpu_reason": None}


def _gpu_used_bytes() -> int | None:
    """Of the first GPU, by all processes; None without a GPU or without cuda-python."""
    from ldm_deploy.errors import EngineError
    from ldm_deploy.runtime.cuda import checked, runtime

    try:
        free, total = checked(runtime().cudaMemGetInfo())
    except EngineError:
        return None
    return int(total - free)


def size_bytes(files: Iterable[Path]) -> int:
    """The size of the files on disk, each counted once."""
    return sum(file.stat().st_size for file in sorted(set(files)))


def fp32_size_bytes(weights: Iterable[Path]) -> int:
    """What a model's weights take as fp32, which is what the baseline computes with and an fp32 engine holds.

    Read from the headers of the safetensors files (which may store them as fp16), without loading a weight.
    """
    total = 0
    for file in weights:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for size in entry["shape"]:
                    count *= size
                total += 4 * count
    return total
