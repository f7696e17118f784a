"""Exponential moving average of a model's parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Ema:
    """Averages that start unbiased: the decay at step t is min(decay, (1 + t) / (10 + t)).

    Parameters are read in the module's own order; `averages` maps their names to float32 tensors.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the averages towards the parameters after optimizer step `step` (0-based)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        names = list(self.averages)
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_([self.averages[n] for n in names], [parameters[n].detach() for n in names], weight)

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module has the averages as its parameters, and is in evaluation mode without gradients."""
        own = {name: value.detach().clone() for name, value in module.named_parameters()}
        training = module.training
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.averages[name])
            module.eval()
            try:
                yield
            finally:
                for name, parameter in module.named_parameters():
                    parameter.copy_(own[name])
                module.train(training)

    def state(self) -> dict[str, Tensor]:
        return self.averages
