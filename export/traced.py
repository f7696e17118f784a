"""A component on its way to its engines: torch module, what it is judged on, and its graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_deploy.export.to_onnx import Axes, export_module

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ldm_deploy.eval.parity import Probe
    from ldm_deploy.export.half import HalfReport
    from ldm_deploy.onnx_graph import ValueInfo

Ranges = Mapping[str, tuple[float, float]]
Sizes = tuple[int, ...]
Shapes = Mapping[str, tuple[Sizes, Sizes, Sizes]]  # input -> the smallest, the usual and the largest it was proven on


@dataclass
class Traced:
    """A component on its way: the module, what it is judged on, and its graphs, one per precision, in `folder`."""

    module: nn.Module | None  # None once `release` was called
    probes: Sequence[Probe]
    axes: tuple[Axes, Axes]
    component: str
    ranges: Ranges
    folder: Path
    graphs: dict[str, Path] = field(default_factory=dict)
    narrowed: dict[str, nn.Module] = field(default_factory=dict)
    reports: dict[str, HalfReport] = field(default_factory=dict)

    def graph(self, precision: str) -> Path:
        """The ONNX file in a precision, written when it is first asked for."""
        if precision not in self.graphs:
            path = self.folder / f"{self.component}-{precision}.onnx"
            module = self.module_in(precision)
            export_module(module, largest(self.probes).inputs, *self.axes, path, component=self.component)
            self.graphs[precision] = path
        return self.graphs[precision]

    def module_in(self, precision: str) -> nn.Module:
        """The module in a precision. A narrower one than fp32 is proven in torch first: on a CPU, engines may compute
        wider than the graph says and hide that a value overflows (`ParityError`)."""
        assert self.module is not None
        if precision == "fp32":
            return self.module
        if precision not in self.narrowed:
            self.narrowed[precision] = self._narrow(self.module, precision)
        return self.narrowed[precision]

    def release(self) -> None:
        """Give the memory of modules back: only graphs that are written already can be asked for from here."""
        self.module = None
        self.narrowed.clear()

    def _narrow(self, wide: nn.Module, precision: str) -> nn.Module:
        from ldm_deploy.eval.budget import load_budget
        from ldm_deploy.eval.parity import check_parity
        from ldm_deploy.export.half import to_half
        from ldm_deploy.models.torch_engine import TorchEngine

        samples = [probe.inputs for probe in self.probes]
        module, self.reports[precision] = to_half(wide, samples, self.axes[0], precision)
        engine = TorchEngine(self.component, module, (tuple(self.axes[0]), tuple(self.axes[1])))
        limit = load_budget(None).parity_limit(precision, self.component)
        check_parity(engine, self.probes, limit, component=self.component, name=f"{precision} in torch")
        return module


def largest(probes: Sequence[Probe]) -> Probe:
    """The probe to trace with: no symbolic axis may have length 1."""
    return max(probes, key=lambda probe: min(size for value in probe.inputs.values() for size in value.shape))


def proven_shapes(probes: Sequence[Probe]) -> Shapes:
    """Of every input, axis by axis, the smallest and the largest size among the probes; usual is the first probe."""
    found = {}
    for name, value in probes[0].inputs.items():
        shapes = [probe.inputs[name].shape for probe in probes]
        found[name] = (tuple(map(min, *shapes)) if len(shapes) > 1 else value.shape, value.shape,
                       tuple(map(max, *shapes)) if len(shapes) > 1 else value.shape)  # fmt: skip
    return found


def read_module(traced: Traced) -> tuple[list[ValueInfo], list[ValueInfo]]:
    """Inputs and outputs where there is no graph to read them from. An output's axis without a name gets that of an
    input's axis that is always as long, else one of its own."""
    from ldm_deploy.onnx_graph import ValueInfo

    lengths: dict[str, list[int]] = {}
    for name, axes in traced.axes[0].items():
        for axis, symbol in axes.items():
            lengths[symbol] = [probe.inputs[name].shape[axis] for probe in traced.probes]

    def describe(name: str, arrays: list[np.ndarray], given: Axes) -> ValueInfo:
        axes = given.get(name, {})
        shape: list[int | str] = []
        for axis, size in enumerate(arrays[0].shape):
            found = [array.shape[axis] for array in arrays]
            symbol = axes.get(axis) or next((key for key, value in lengths.items() if value == found), f"{name}_{axis}")
            shape.append(symbol if axis in axes or len(set(found)) > 1 else size)
        return ValueInfo(name, str(arrays[0].dtype), tuple(shape))

    probes = traced.probes
    return (
        [describe(name, [probe.inputs[name] for probe in probes], traced.axes[0]) for name in probes[0].inputs],
        [describe(name, [probe.outputs[name] for probe in probes], traced.axes[1]) for name in probes[0].outputs],
    )
