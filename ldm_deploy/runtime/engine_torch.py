"""Engines that torch compiled ahead: AOTInductor packages, and exported programs with TensorRT engines in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import EngineError
from ldm_deploy.runtime.cuda import check_gpu


class TorchEngine:
    """`runtime`: "aoti" or "torch-tensorrt". `inputs`, `outputs`: names, in the order of the program.

    `built_for`: what bundle.json says the engine needs. Raises `EngineError` if this machine is another one, or the
    file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        runtime: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        built_for: Mapping[str, Any],
        *,
        device: str = "cuda",
    ) -> None:
        self.path, self.device, self.inputs, self.outputs = Path(path), device, list(inputs), list(outputs)
        found = torch_properties(device)
        _check_torch(self.path.stem, built_for, found["torch"])
        if device == "cuda":
            check_gpu(self.path.stem, built_for, found)
        import torch

        try:
            if runtime == "aoti":
                self._program: Any = torch._inductor.aoti_load_package(str(self.path))
            else:
                import torch_tensorrt  # noqa: F401  (it tells torch how to load its engines)

                self._program = torch.export.load(str(self.path)).module()
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EngineError(f"torch cannot load {self.path}: {reason}; build the engine again") from None

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises `EngineError` with torch's own first line. TF32 is off while it runs."""
        import torch

        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise EngineError(f"engine {self.path.stem} needs the input {missing[0]!r}; given: {', '.join(feeds)}")
        given = [torch.from_numpy(np.ascontiguousarray(feeds[name])).to(self.device) for name in self.inputs]
        try:
            with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
                found = self._program(*given)
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise EngineError(f"engine {self.path.stem} failed: {reason}") from None
        values = found if isinstance(found, tuple | list) else (found,)
        return {name: value.cpu().numpy() for name, value in zip(self.outputs, values, strict=True)}


def torch_properties(device: str) -> dict[str, str]:
    """What a compiled program depends on: torch, and on CUDA the GPU. Raises `EngineError` if there is none."""
    try:
        import torch
    except ImportError:
        raise EngineError(
            "engines compiled by torch need torch; pip install torch, or choose another variant"
        ) from None
    found = {"torch": torch.__version__.partition("+")[0]}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise EngineError("torch finds no NVIDIA GPU here; choose a variant for the CPU")
        major, minor = torch.cuda.get_device_capability()
        found |= {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
    return found


def _check_torch(name: str, needs: Mapping[str, Any], found: str) -> None:
    if needs.get("torch") != found:
        raise EngineError(
            f"engine {name} was built with torch {needs.get('torch')} and {found} is installed; build it again here"
        )
