"""A component as torch's exported program: inputs in order, a flat tuple out, as a program without Python calls it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm_deploy.errors import ExportError
from ldm_deploy.export.graph import root_cause, tensors_in

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ldm_deploy.eval.parity import Arrays
    from ldm_deploy.export.to_onnx import Axes
    from ldm_deploy.export.traced import Shapes

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "int8"}
ARITHMETIC = ("conv", "linear", "addmm", "baddbmm", "bmm", "mm", "matmul", "scaled_dot_product_attention")


class Ordered(nn.Module):
    """`module` with its inputs by position, in the order of `names`, and its outputs in one flat tuple."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names
        self.by_name = set(names) <= set(inspect.signature(module.forward).parameters)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        found = self.module(**dict(zip(self.names, values, strict=True))) if self.by_name else self.module(*values)
        if isinstance(found, Mapping):
            return tuple(found.values())
        return tuple(found) if isinstance(found, tuple | list) else (found,)


def to_program(
    module: nn.Module, inputs: Arrays, axes: Axes, *, device: str, bounds: Shapes | None = None, component: str
) -> ExportedProgram:
    """The program of `module` on `device`, with the symbolic axes of `axes` free, or free within `bounds`.

    `inputs`: examples; every symbolic axis must be 2 or longer. Raises `ExportError`.
    """
    auto = torch.export.Dim.AUTO
    shapes = tuple(
        {
            axis: auto if bounds is None else auto(min=bounds[name][0][axis], max=bounds[name][2][axis])
            for axis in axes.get(name, {})
        }
        for name in inputs
    )
    examples = tuple(torch.from_numpy(value).to(device) for value in inputs.values())
    try:
        ordered = Ordered(module, list(inputs)).eval().to(device)
        with torch.no_grad():
            return torch.export.export(ordered, examples, dynamic_shapes=(shapes,))
    except Exception as error:
        raise ExportError(
            f"{component}: torch.export failed: {root_cause(error)}; rewrite that part of forward()"
        ) from error


def count_precisions(program: ExportedProgram) -> dict[str, int]:
    """How many operators that multiply or convolve are in which precision: torch changes none of them later."""
    found: Counter[str] = Counter()
    for node in program.graph.nodes:
        name = getattr(node.target, "__name__", "").partition(".")[0].lstrip("_")
        if node.op == "call_function" and name.startswith(ARITHMETIC):
            types = [value.dtype for value in tensors_in(_value(node))]
            found[next((NAMES[kind] for kind in types if kind in NAMES), "unknown")] += 1
    return dict(sorted(found.items()))


def _value(node: Any) -> Any:
    return node.meta.get("val")
