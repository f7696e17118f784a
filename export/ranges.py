"""How large the values inside a module become on real inputs: what half precision has to hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from ldm_deploy.export.graph import tensors_in


class _Scan(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.largest: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for tensor in tensors_in(value):
            if tensor.numel():
                found = float(tensor.abs().amax())
                known = self.largest.get(n.name, 0.0)
                # NaN stays, whichever of the two it is: max() would lose it.
                self.largest[n.name] = known if known != known or found <= known else found
        return value


def scan_ranges(graph: fx.GraphModule, samples: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """node name -> largest magnitude of its floating results over all samples, in fp32. Weights are nodes, too."""
    scan = _Scan(graph)
    for sample in samples:
        with torch.no_grad():
            scan.run(*(torch.from_numpy(value) for value in sample.values()))
    return scan.largest
