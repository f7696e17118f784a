"""The INT8 recipe for ONNX Runtime on a CPU, and the function that applies it to any ONNX graph.

What the kernel profile says (FACTS: 71 M U-Net, two Zen 4 cores):
- The attention's activation-by-activation MatMuls stay in float. Quantizing them pulls the Softmax between them into
  INT8, and QLinearSoftmax alone then takes 40 % of the time: slower than fp32.
- A convolution's INT8 kernel (QLinearConv) writes INT8, so its output is quantized too. A MatMul's need not:
  MatMulIntegerToFloat returns float, which costs no second rounding.
- That second rounding is most of the error, and few outputs, with channels of very different size, are most of that.
  A scale for each of their channels costs nothing in the kernel: weights and bias are in units of its output's steps.
  Back to float they take longer on large maps (1.15 times the whole small decoder): only where one scale errs too much.
- The timestep embedding's Gemms have as many rows as the batch: nothing to win, and every block depends on them.
- First and last convolution have 3 or 4 channels on one side: little arithmetic, and the last one's output would be the
  image or the noise prediction rounded to 256 levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ldm_deploy.errors import QuantizationError
from ldm_deploy.eval.parity import Probe, Runnable, compare_outputs
from ldm_deploy.onnx_graph import load_model, precision_found
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.cpu import has_vnni
from ldm_deploy.quantize.kit import LayerInfo, Spec, is_large
from ldm_deploy.quantize.observe import Histogram, observe
from ldm_deploy.quantize.profile import NodeTimes, OpCost, onnxruntime_node_times, profile_ops
from ldm_deploy.quantize.qdq import insert_qdq, outputs_by_channel, select_nodes, tensors_to_observe
from ldm_deploy.quantize.scheme import RANGE_METHODS, AnyRecipe, Recipe
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

TARGET = "onnxruntime-cpu"

# From most to least INT8. Which one is fastest depends on the graph and the machine, so it is measured.
RECIPES: dict[str, AnyRecipe] = {
    "conv+matmul": Recipe(op_types=("Conv", "MatMul")),
    "conv": Recipe(op_types=("Conv",)),
    "matmul": Recipe(op_types=("MatMul",)),
}


@dataclass(frozen=True)
class QuantizedGraph:
    """What `quantize_graph` did: number of nodes quantized, by op type."""

    path: Path
    recipe: Recipe
    nodes: dict[str, int]


def quantize_graph(
    model_path: Path,
    out_path: Path,
    calibration_samples: Iterable[Mapping[str, np.ndarray]],
    recipe: Recipe,
    *,
    threads: int | None = None,
    histograms: Mapping[str, Histogram] | None = None,
) -> QuantizedGraph:
    """Write `model_path` with the recipe's nodes in explicit INT8 Q/DQ form.

    `calibration_samples`: feeds of the model, read twice and never held at once. `histograms`: what `observe_graph`
    returned for this model earlier, so that several recipes share one calibration. Symbolic axes stay symbolic.
    Raises `QuantizationError` if the graph has nothing to quantize.
    """
    import onnx

    model = load_model(model_path)
    nodes = select_nodes(model, recipe)
    if not nodes:
        raise QuantizationError(
            f"{model_path.name} has no {' or '.join(recipe.op_types)} with constant weights to quantize; "
            "use the fp32 engine"
        )
    tensors = tensors_to_observe(nodes, recipe)
    if histograms is None:
        by_channel = outputs_by_channel(model, nodes)
        histograms = observe(model_path, tensors, calibration_samples, channels=by_channel, threads=threads)
    missing = [name for name in tensors if name not in histograms]
    if missing:
        raise QuantizationError(
            f"activation {missing[0]!r} of {model_path.name} was not observed; calibrate this very file"
        )
    ranges = {name: histograms[name].range(recipe.range_method) for name in tensors}
    told = {name: each for name in tensors if (each := histograms[name].channels) is not None}
    insert_qdq(model, nodes, ranges, recipe, told if recipe.by_channel else {})
    out_path.parent.mkdir(parents=True, exist_ok=True)
    large = model.ByteSize() > 2**31 - 2**24
    onnx.save(model, str(out_path), save_as_external_data=large, location=f"{out_path.name}.data" if large else None)
    counts = {kind: sum(node.op_type == kind for node in nodes) for kind in recipe.op_types}
    return QuantizedGraph(out_path, recipe, counts)


def observe_graph(
    model_path: Path, calibration_samples: Iterable[Mapping[str, np.ndarray]], *, threads: int | None = None
) -> dict[str, Histogram]:
    """Histograms of every activation that any of `RECIPES` quantizes."""
    model = load_model(model_path)
    tensors: dict[str, None] = {}
    channels: dict[str, int] = {}
    for recipe in RECIPES.values():
        assert isinstance(recipe, Recipe)
        nodes = select_nodes(model, recipe)
        channels |= outputs_by_channel(model, nodes)
        for name in tensors_to_observe(nodes, recipe):
            tensors.setdefault(name)
    return observe(model_path, list(tensors), calibration_samples, channels=channels, threads=threads)


class OnnxRuntimeKit:
    """See `kit.Kit`."""

    runtime = "onnxruntime"
    title = "ONNX Runtime"
    suffix = ".onnx"
    spares_milder = True

    def __init__(
        self, model_path: Path, *, recipes: Mapping[str, AnyRecipe] = RECIPES, threads: int | None = None
    ) -> None:
        self.model_path = model_path
        self.recipes = recipes
        self.threads = threads
        self._histograms: dict[str, Histogram] = {}
        self._method = RANGE_METHODS[0]

    def calibrate(self, observed: Samples, held_out: Samples, folder: Path) -> None:
        """Observe, and take the way to choose ranges that errs least on samples which the ranges have not seen."""
        if not any(self.layers(recipe) for recipe in self.recipes.values()):
            return
        self._histograms = observe_graph(self.model_path, observed, threads=self.threads)
        reference = OnnxRuntimeEngine(self.model_path, threads=self.threads)
        probes = [Probe(feeds, reference.run(feeds)) for feeds in held_out]
        errors: dict[str, float] = {}
        path = folder / "ranges.onnx"
        for method in RANGE_METHODS[: 2 if is_large(self) else None]:
            self._method = method
            recipe = self.settle(next(iter(self.recipes.values())))
            try:
                self.build(path, recipe)
            except QuantizationError:
                return
            result = compare_outputs(self.open(path, recipe, trial=True), probes, np.inf)
            errors[method] = float(np.sqrt(np.mean(np.square(result.errors))))
            for file in self.files(path):
                file.unlink()
        self._method = min(errors, key=lambda name: errors[name] if np.isfinite(errors[name]) else np.inf)

    def settle(self, recipe: AnyRecipe) -> AnyRecipe:
        assert isinstance(recipe, Recipe)
        return replace(recipe, range_method=self._method, reduce_range=has_vnni() is False)

    def milder(self, recipe: AnyRecipe) -> AnyRecipe | None:
        assert isinstance(recipe, Recipe)
        return replace(recipe, by_channel=True) if "Conv" in recipe.op_types and not recipe.by_channel else None

    def layers(self, recipe: AnyRecipe) -> list[LayerInfo]:
        assert isinstance(recipe, Recipe)
        return [LayerInfo(node.name, node.op_type) for node in select_nodes(load_model(self.model_path), recipe)]

    def build(self, path: Path, recipe: AnyRecipe) -> None:
        assert isinstance(recipe, Recipe)
        quantize_graph(self.model_path, path, (), recipe, histograms=self._histograms)

    def files(self, path: Path) -> list[Path]:
        return [file for file in (path, path.with_name(f"{path.name}.data")) if file.exists()]

    def open(self, path: Path, recipe: AnyRecipe, *, trial: bool = False) -> Runnable:
        return OnnxRuntimeEngine(path, threads=self.threads)

    def found(self, path: Path, engine: Runnable) -> dict[str, int]:
        return precision_found(path)

    def spec(self, path: Path, recipe: AnyRecipe) -> Spec:
        return {"kind": "engine", "runtime": "onnxruntime", "path": str(path)}

    def siblings(self) -> dict[str, Spec]:
        return {f"fp32-{TARGET}": {"kind": "engine", "runtime": "onnxruntime", "path": str(self.model_path)}}

    def base(self, recipe: AnyRecipe) -> Spec:
        return self.siblings()[f"fp32-{TARGET}"]

    def open_spec(self, spec: Spec) -> Runnable:
        return OnnxRuntimeEngine(Path(spec["path"]), threads=self.threads)

    def node_times(self, spec: Spec, feeds: Mapping[str, np.ndarray], runs: int) -> list[NodeTimes]:
        return onnxruntime_node_times(Path(spec["path"]), feeds, runs=runs, threads=self.threads)

    def profile(self, spec: Spec, feeds: Mapping[str, np.ndarray]) -> list[OpCost]:
        return profile_ops(Path(spec["path"]), feeds, threads=self.threads)
