"""Peak memory and size: bytes, of a process and of what a variant is made of."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable
from pathlib import Path


def peak_memory_bytes() -> int:
    """The largest resident set this process has had since it was started.

    Linux: VmHWM, which starts anew with the program (`ru_maxrss` would carry over what the parent had).
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


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
