"""The machine that figures were taken on. Milliseconds compare on one machine only; ratios travel further."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

# What decides how fast low precision is: x86 and Arm extensions, in /proc/cpuinfo's spelling
EXTENSIONS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
CPUS = Path("/sys/devices/system/cpu")
PACKAGES = ("ldm-deploy", "numpy", "onnxruntime", "torch", "lpips")


def usable_threads() -> int:
    """How many processors this process may use; the default number of threads everywhere."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int | None = None) -> dict[str, Any]:
    """report.json's `machine`. The fingerprint covers the hardware, not versions, threads or load."""
    cpu, isa = _processor()
    hardware = {"cpu": cpu, "isa": isa, "cores": usable_threads(), "memory_bytes": _memory_bytes(), "gpu": _gpu()}
    digest = hashlib.sha256(json.dumps(hardware, sort_keys=True).encode()).hexdigest()
    return {
        "fingerprint": f"sha256:{digest}",
        **hardware,
        "threads": threads or usable_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": conditions()["load_average"],
        "versions": {
            "python": platform.python_version(),
            **{name: found for name in PACKAGES if (found := _version(name))},
        },
    }


def conditions() -> dict[str, Any]:
    """What changes from minute to minute; None where the system does not tell.

    `load_average` (1, 5, 15 minutes), `frequency_mhz` of every processor now, `stolen_s`: seconds since the machine was
    started in which a hypervisor gave its processors to others.
    """
    return {
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "frequency_mhz": _frequency_mhz(),
        "stolen_s": _stolen_s(),
    }


def _frequency_mhz() -> list[float] | None:
    """cpufreq's figure where there is one, else that of /proc/cpuinfo, which virtual machines may hold fixed."""
    files = sorted(CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    try:
        if files:
            return [int(file.read_text()) / 1000 for file in files]
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except (OSError, ValueError):
        return None
    return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")] or None


def _stolen_s() -> float | None:
    """The eighth figure of /proc/stat's first line, proc(5)."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def _processor() -> tuple[str, list[str]]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.processor() or platform.machine(), [e for e in EXTENSIONS if e in flags]


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpu() -> str | None:
    """The name of the first NVIDIA GPU, as its driver gives it, without loading a library."""
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text().splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
