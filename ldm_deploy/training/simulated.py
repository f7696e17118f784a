"""INT8 as an engine computes it, simulated in fp32, so that weights can learn to live with it.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
arXiv:1712.05877, section 3: what a layer reads and its weights are rounded in the forward pass, and gradients pass the
rounding as if it were not there (where nothing is cut off). Inputs: uint8 per tensor, with the range seen in
calibration. Weights: int8 per output channel, symmetric. Outputs stay as they are, as ours do in the engines.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS = {"conv": nn.Conv2d, "linear": nn.Linear}


class Simulated(nn.Module):
    """A convolution or linear layer in INT8, with the shapes of `inner` and fp32 in and out.

    `low`, `high`: the range of what it reads.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, inner: nn.Conv2d | nn.Linear, low: float, high: float) -> None:
        super().__init__()
        self.inner = inner
        low, high = min(low, 0.0), max(high, 0.0)  # zero is exact
        scale = max(high - low, 1e-12) / 255
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.tensor(round(-low / scale), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.inner.weight, self.inner.bias
        x = torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 255)
        largest = weight.detach().flatten(1).abs().amax(1).clamp_min(1e-12)
        zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        weight = torch.fake_quantize_per_channel_affine(weight, largest / 127, zeros, 0, -127, 127)
        if isinstance(self.inner, nn.Linear):
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, self.inner.stride, self.inner.padding)


def simulate(module: nn.Module, inputs: Sequence[Tensor], layers: Sequence[str], keep: Sequence[str]) -> nn.Module:
    """A copy whose layers of the kinds `layers` (see `LAYERS`) are `Simulated`, with the ranges that `inputs` cause.

    Not those whose names begin with one of `keep`, and not those that read vectors instead of images or sequences (of
    time, of guidance): engines leave these in float.
    """
    found = copy.deepcopy(module)
    kinds = tuple(LAYERS[name] for name in layers)
    modules: dict[str, nn.Module] = dict(found.named_modules())
    kept = {name for name in modules if any(name == one or name.startswith(f"{one}.") for one in keep)}
    chosen = {name: part for name, part in modules.items() if isinstance(part, kinds) and name not in kept}
    ranges: dict[str, tuple[float, float]] = {}

    def widen(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given[0].dim() > 2:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, given[0].min().item()), max(high, given[0].max().item())

    handles = [part.register_forward_pre_hook(functools.partial(widen, name)) for name, part in chosen.items()]
    with torch.no_grad():
        found(*inputs)
    for handle in handles:
        handle.remove()
    for name, (low, high) in ranges.items():
        parent, _, own = name.rpartition(".")
        setattr(found.get_submodule(parent), own, Simulated(chosen[name], low, high))  # type: ignore[arg-type]
    return found


def in_float(simulated: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a module of `simulate` as the module itself has them."""
    return {
        name.replace(".inner.", "."): value
        for name, value in simulated.items()
        if name.rpartition(".")[2] not in ("scale", "zero_point")
    }
