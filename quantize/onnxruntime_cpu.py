"""The INT8 recipe for ONNX Runtime on a CPU, and the function that applies it to any ONNX graph.

What the kernel profile says (FACTS: 71 M U-Net, two Zen 4 cores):
- The attention's activation-by-activation MatMuls stay in float. Quantizing them pulls the Softmax between them into
  INT8, and QLinearSoftmax alone then takes 40 % of the time: slower than fp32.
- A convolution's INT8 kernel (QLinearConv) writes INT8, so its output is quantized too. A MatMul's need not:
  MatMulIntegerToFloat returns float, which costs no second rounding.
- The timestep embedding's Gemms have as many rows as the batch: nothing to win, and every block depends on them.
- First and last convolution have 3 or 4 channels on one side: little arithmetic, and the last one's output would be the
  image or the noise prediction rounded to 256 levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldm_deploy.errors import QuantizationError
from ldm_deploy.onnx_graph import load_model
from ldm_deploy.quantize.observe import Histogram, observe
from ldm_deploy.quantize.qdq import insert_qdq, select_nodes, tensors_to_observe
from ldm_deploy.quantize.scheme import Recipe

# From most to least INT8. Which one is fastest depends on the graph and the machine, so it is measured.
RECIPES: dict[str, Recipe] = {
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
        histograms = observe(model_path, tensors, calibration_samples, threads=threads)
    missing = [name for name in tensors if name not in histograms]
    if missing:
        raise QuantizationError(
            f"activation {missing[0]!r} of {model_path.name} was not observed; calibrate this very file"
        )
    ranges = {name: histograms[name].range(recipe.range_method) for name in tensors}
    insert_qdq(model, nodes, ranges, recipe)
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
    for recipe in RECIPES.values():
        for name in tensors_to_observe(select_nodes(model, recipe), recipe):
            tensors.setdefault(name)
    return observe(model_path, list(tensors), calibration_samples, threads=threads)


def has_vnni() -> bool | None:
    """Whether the CPU multiplies U8 by S8 without saturating 16-bit sums; None where the system does not say."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    return any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "asimddp", "i8mm"))
