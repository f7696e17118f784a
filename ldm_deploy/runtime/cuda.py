"""CUDA through NVIDIA's cuda-python, for engines that want device memory: no torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_deploy.errors import EngineError


def runtime() -> Any:
    """The module of CUDA's runtime API. Raises `EngineError` if it is not installed."""
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        raise EngineError("cuda-python is not installed; pip install 'ldm-deploy[tensorrt]'") from None
    return cudart


def checked(result: Any) -> Any:
    """What a call returned beside its status. Raises `EngineError` with CUDA's name for what went wrong."""
    status, *values = result
    if int(status) != 0:
        raise EngineError(f"CUDA: {status.name}; is there an NVIDIA GPU with memory to spare, and a recent driver?")
    return values[0] if len(values) == 1 else values


def device_properties() -> dict[str, str]:
    """`gpu` and `compute_capability` of the first device. Raises `EngineError` if there is none."""
    found = checked(runtime().cudaGetDeviceProperties(0))
    name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
    return {"gpu": name.rstrip("\0"), "compute_capability": f"{found.major}.{found.minor}"}


def check_gpu(name: str, needs: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Raises `EngineError` if engine `name` was built for another `gpu` or `compute_capability` than those found.

    One that is `hardware_compatible` runs from Ampere on.
    """
    if needs.get("hardware_compatible") and float(found["compute_capability"]) >= 8.0:
        return
    for key, what in (("gpu", "on a"), ("compute_capability", "for compute capability")):
        if needs.get(key) != found[key]:
            raise EngineError(
                f"engine {name} was built {what} {needs.get(key)} and this is {found[key]}; "
                "build it again here, or choose the portable variant"
            )
