"""What this CPU multiplies in: it decides how a graph is quantized."""

from __future__ import annotations

from pathlib import Path


def has_vnni() -> bool | None:
    """Whether the CPU multiplies U8 by S8 without saturating 16-bit sums; None where the system does not say."""
    flags = _flags()
    return None if flags is None else any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "asimddp", "i8mm"))


def has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 on this CPU."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _flags() -> str | None:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
