"""Several processes that train one model: each computes a part of every batch, and gradients are summed.

Started by `accelerate launch` or `torchrun`, which set WORLD_SIZE; without it there is one process. Every process draws
the random numbers of the whole batch and keeps its rows, so the result does not depend on how many there are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process, `rank`, among `count`, and the device it computes on."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def parts(self, batch_size: int, accumulation: int) -> Iterator[slice]:
        """The rows of a batch that are this process's, cut into at most `accumulation` parts; none is empty."""
        low, high = (batch_size * rank // self.count for rank in (self.rank, self.rank + 1))
        edges = [low + (high - low) * part // accumulation for part in range(accumulation + 1)]
        return (slice(start, stop) for start, stop in itertools.pairwise(edges) if start < stop)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.count == 1:
            return
        tensors = list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def wait(self) -> None:
        """Until every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()


def processes() -> Processes:
    """This process's place, from the launcher's environment. Connects to the others at the first call.

    The device is a CUDA GPU where torch sees one (CUDA_VISIBLE_DEVICES says which it may see), else the CPU.
    """
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=torch.device("cuda" if cuda else "cpu"))
    from accelerate import PartialState

    state = PartialState(cpu=not cuda)
    return Processes(state.process_index, state.num_processes, state.device)
