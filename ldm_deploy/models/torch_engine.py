"""Engines that run a reference's own torch modules: the fp32 baseline, behind the interface every engine has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.errors import EngineError

if TYPE_CHECKING:
    from torch import nn

    from ldm_deploy.models.components import Signature
    from ldm_deploy.models.sources import Source
    from ldm_deploy.runtime.pipeline import Pipeline


class TorchEngine:
    """One component in eager fp32. `run` takes and returns numpy arrays by the names of its signature."""

    def __init__(self, name: str, module: nn.Module, signature: Signature | None = None) -> None:
        import torch

        from ldm_deploy.models.components import SIGNATURES

        self.name = name
        self.module = module
        self.dtype = torch.float32
        self.call: Callable[..., Any] = module
        self.input_names, self.output_names = signature or SIGNATURES[name]

    def to(self, device: str, precision: str, *, compiled: bool = False) -> None:
        """Move the module, as it is: nothing is kept wider. What goes in and comes out stays fp32."""
        import torch

        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        self.module = self.module.to(device, self.dtype)
        self.call = torch.compile(self.module) if compiled else self.module

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Raises `EngineError` if an input is missing."""
        import torch

        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise EngineError(f"{self.name} needs the input {missing[0]!r}; given: {', '.join(feeds)}")
        device = next(self.module.parameters()).device
        with torch.inference_mode():
            inputs = [torch.from_numpy(np.ascontiguousarray(feeds[name])).to(device) for name in self.input_names]
            outputs = self.call(*(value.to(self.dtype) if value.is_floating_point() else value for value in inputs))
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        found = (value.float() if value.is_floating_point() else value for value in outputs)
        return {name: value.cpu().numpy() for name, value in zip(self.output_names, found, strict=True)}


def torch_engines(source: Source, threads: int | None = None) -> dict[str, TorchEngine]:
    """The components of a source as engines. `threads` sets torch's thread count for the whole process."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    return {name: TorchEngine(name, module, source.signatures[name]) for name, module in source.components().items()}


def torch_pipeline(source: Source, threads: int | None = None) -> Pipeline:
    """The baseline: the runtime's own host-side pipeline with torch engines in it."""
    from ldm_deploy.runtime.pipeline import Pipeline
    from ldm_deploy.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer(source.tokenizer_text(), source.model["context_length"])
    return Pipeline(torch_engines(source, threads), tokenizer, source.model, source.schedule, source.model["sampling"])
