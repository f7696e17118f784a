"""Which methods make INT8 in ONNX Runtime more accurate: the U-Net of a reference, one method at a time.

    .venv/bin/python benchmarks/accuracy_methods.py [reference] [--work DIR]

Every row is the recipe `conv+matmul`, outputs by channel, ranges by the extremes, with one thing changed. Error:
‖engine - fp32‖ / ‖fp32‖, root mean square over calibration samples that were held out. Images: PSNR in dB against those
of the fp32 engine, mean and worst of 8 (4 prompts, 2 seeds, 20 steps). Methods that are not part of `quantize` are
written out here, as changes of the fp32 graph that leave what it computes as it is: they say what could be had, not
what it would cost in time. Two minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ldm_deploy.eval.machine import machine
from ldm_deploy.eval.parity import Probe, compare_outputs
from ldm_deploy.export.export import export_source
from ldm_deploy.models.sources import load_source
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.onnx_graph import load_model
from ldm_deploy.progress import note
from ldm_deploy.quantize import onnxruntime_cpu, qdq, scheme
from ldm_deploy.quantize.calibration import Samples, collect
from ldm_deploy.quantize.candidates import split_samples
from ldm_deploy.quantize.cpu import has_vnni
from ldm_deploy.quantize.drawing import Drawing, image_quality
from ldm_deploy.quantize.scheme import AnyRecipe, Recipe
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from ldm_deploy.runtime.pipeline import load

Change = Callable[[Any, Samples], None]  # of an fp32 graph, in place; the samples are calibration's
PROMPTS = 4


def weighted(model: Any, kinds: tuple[str, ...] = ("Conv", "MatMul")) -> list[Any]:
    """The nodes that the recipe quantizes, of these kinds."""
    return qdq.select_nodes(model, replace(base_recipe(), op_types=kinds))


def base_recipe() -> Recipe:
    recipe: AnyRecipe = onnxruntime_cpu.RECIPES["conv+matmul"]
    assert isinstance(recipe, Recipe)
    return replace(recipe, by_channel=True, reduce_range=has_vnni() is False)


def by_channel(model: Any, nodes: list[Any], samples: Samples, reduction: str) -> dict[str, np.ndarray]:
    """The largest magnitude ("max") or the mean ("mean") of each input channel of `nodes`: tensor -> (C,)."""
    axes = {node.input[0]: 1 if node.op_type == "Conv" else -1 for node in nodes}
    shown = copy.deepcopy(model)
    inputs = {value.name for value in shown.graph.input}
    for name in axes:
        if name not in inputs:
            shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [name for name in axes if name not in inputs]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in axes}
    for feeds in samples:
        values = dict(zip(names, session.run(names, dict(feeds)), strict=True)) | {
            name: feeds[name] for name in axes if name in inputs
        }
        for name, axis in axes.items():
            rest = tuple(index for index in range(values[name].ndim) if index != axis % values[name].ndim)
            rows[name].append(np.abs(values[name]).max(rest) if reduction == "max" else values[name].mean(rest))
    return {name: np.max(found, 0) if reduction == "max" else np.mean(found, 0) for name, found in rows.items()}


def constants(model: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def add_constant(model: Any, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
    return name


def put_nodes(model: Any, nodes: list[Any]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def correct_biases(model: Any, samples: Samples) -> None:
    """What rounding the weights does to the mean of each output channel, taken off its bias (Nagel et al. 2019,
    arXiv:1906.04721, section 4.2; means are measured)."""
    means, known = by_channel(model, weighted(model), samples, "mean"), constants(model)
    for node in weighted(model):
        weight = numpy_helper.to_array(known[node.input[1]])
        axis = qdq._weight_axis(node)
        quantized, scale = scheme.quantize_weight(weight, axis, reduce_range=base_recipe().reduce_range)
        lost = weight - quantized * scale.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])
        mean = means[node.input[0]]
        shift = lost.sum(axis=(2, 3)) @ mean if node.op_type == "Conv" else mean @ lost
        add = next((one for one in model.graph.node if one.op_type == "Add" and node.output[0] in one.input), None)
        names = node.input[2:] if node.op_type == "Conv" else [] if add is None else add.input
        for name in names:
            if name in known and sum(name in other.input for other in model.graph.node) == 1:
                known[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(known[name]) + shift, name))


def split_shortcuts(model: Any, samples: Samples) -> None:
    """A convolution over skip connections: one per part of the concatenation, each part with a scale of its own."""
    known = constants(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    widths = {
        value.name: value.type.tensor_type.shape.dim[1].dim_value
        for value in inferred
        if len(value.type.tensor_type.shape.dim) == 4
    }
    nodes = []
    for node in model.graph.node:
        joined = makers.get(node.input[0]) if node.op_type == "Conv" else None
        if joined is None or joined.op_type != "Concat":
            nodes.append(node)
            continue
        weight, end, total = numpy_helper.to_array(known[node.input[1]]), 0, ""
        for index, name in enumerate(joined.input):
            end += widths[name]
            part = add_constant(model, f"{node.name}_{index}_weight", weight[:, end - widths[name] : end])
            inputs = [name, part, *(node.input[2:] if index == 0 else [])]
            made = helper.make_node("Conv", inputs, [f"{node.name}_{index}"], f"{node.name}_{index}")
            made.attribute.extend(node.attribute)
            nodes.append(made)
            if index:
                last = index == len(joined.input) - 1
                result = node.output[0] if last else f"{node.name}_{index}_sum"
                nodes.append(helper.make_node("Add", [total, made.output[0]], [result], f"{node.name}_{index}_sum"))
                total = result
            else:
                total = made.output[0]
    put_nodes(model, nodes)


def equalise(kind: str, alpha: float) -> Change:
    """Input channels divided by what their weights are multiplied by (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438,
    equation 4; of convolutions: cross-layer equalisation, with a multiplication where the layer before is a norm)."""

    def change(model: Any, samples: Samples) -> None:
        layers, known = weighted(model, (kind,)), constants(model)
        largest = by_channel(model, layers, samples, "max")
        readers: dict[str, list[Any]] = {}
        for node in layers:
            readers.setdefault(node.input[0], []).append(node)
        nodes = []
        first = {id(found[0]): (name, found) for name, found in readers.items()}
        for node in model.graph.node:
            if id(node) in first:
                name, found = first[id(node)]
                weights = [numpy_helper.to_array(known[one.input[1]]) for one in found]
                rest, shape = ((0, 2, 3), (-1, 1, 1)) if kind == "Conv" else ((1,), (-1,))
                heaviest = np.max([np.abs(weight).max(rest) for weight in weights], 0)
                scale = np.maximum(largest[name], 1e-5) ** alpha / np.maximum(heaviest, 1e-5) ** (1 - alpha)
                scale /= np.exp(np.log(scale).mean())
                inverse = add_constant(model, f"{name}_{kind}_inverse", (1 / scale).reshape(shape))
                result = f"{name}_{kind}_equalised"
                nodes.append(helper.make_node("Mul", [name, inverse], [result], result))
                for one, weight in zip(found, weights, strict=True):
                    one.input[0] = result
                    factor = scale.reshape((1, -1, 1, 1) if kind == "Conv" else (-1, 1))
                    one.input[1] = add_constant(model, f"{one.name}_equalised_weight", weight * factor)
            nodes.append(node)
        put_nodes(model, nodes)

    return change


def unchanged(model: Any, samples: Samples) -> None:
    pass


def pointwise(model: Any) -> tuple[str, ...]:
    """Names of the 1x1 convolutions."""
    known = constants(model)
    return tuple(node.name for node in weighted(model, ("Conv",)) if tuple(known[node.input[1]].dims[2:]) == (1, 1))


class Bench:
    def __init__(self, name: str, work: Path) -> None:
        self.work, folder = work, work / name
        if not folder.exists():
            export_source(name, folder, variants=[("fp32", "onnxruntime-cpu")])
        self.path = folder / "engines" / "unet-fp32.onnx"
        data = collect(torch_pipeline(load_source(name)), "", decode=False)
        held_out, self.observed = split_samples(data.samples("unet"))
        fp32 = OnnxRuntimeEngine(self.path)
        self.probes = [Probe(feeds, fp32.run(feeds)) for feeds in held_out]
        prompts = tuple(data.details["prompts"])[-PROMPTS:]  # the last: few samples are of them
        self.drawing = Drawing(load(folder), prompts, (0, 1), 20)
        self.images = self.drawing.images("unet", fp32)

    def row(self, title: str, recipe: Recipe, change: Change = unchanged, **constants_of_scheme: float) -> None:
        """Change the graph, quantize it, judge it, print the row."""
        before: Mapping[str, float] = {name: getattr(scheme, name) for name in constants_of_scheme}
        changed, out = self.work / "changed.onnx", self.work / "row.onnx"
        model = load_model(self.path)
        # The ranges are those of the graph that computes what fp32 does; corrected biases shift what it computes.
        if change is not correct_biases:
            change(model, self.observed)
        onnx.save(model, changed)
        histograms = onnxruntime_cpu.observe_graph(changed, self.observed)
        if change is correct_biases:
            change(model, self.observed)
            onnx.save(model, changed)
        try:
            for name, value in constants_of_scheme.items():
                setattr(scheme, name, value)
            onnxruntime_cpu.quantize_graph(changed, out, (), recipe, histograms=histograms)
        finally:
            for name, value in before.items():
                setattr(scheme, name, value)
        self.judge(title, out)

    def weights_alone(self) -> None:
        model = load_model(self.path)
        qdq.store_weights(model, weighted(model), 0)
        onnx.save(model, self.work / "row.onnx")
        self.judge("weights alone", self.work / "row.onnx")

    def judge(self, title: str, path: Path) -> None:
        engine = OnnxRuntimeEngine(path)
        errors = compare_outputs(engine, self.probes, np.inf).errors
        quality = image_quality(self.images, self.drawing.images("unet", engine))
        error = float(np.sqrt(np.mean(np.square(errors))))
        print(f"| {title} | {error:.4f} | {quality['mean']:.1f} | {quality['worst']:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="?", default="reference", help="a shipped reference or a directory")
    parser.add_argument("--work", type=Path, default=Path("build/accuracy-methods"), help="where engines are kept")
    options = parser.parse_args()
    computer, recipe = machine(None), base_recipe()
    note(f"{computer['cpu']}, {computer['threads']} threads, {', '.join(computer['isa'])}")
    bench = Bench(options.name, options.work)
    print("\n| what is changed | error | images dB | worst |\n|---|---:|---:|---:|")
    bench.row("nothing", recipe)
    for method in scheme.RANGE_METHODS[1:]:
        bench.row(f"ranges: {method}", replace(recipe, range_method=method))
    single = replace(recipe, by_channel=False)
    bench.row("outputs of convolutions: one scale for all channels", single)
    bench.row("the same, ranges: mse", replace(single, range_method="mse"))
    bench.row("outputs by channel, no headroom", recipe, HEADROOM=1.0)
    bench.row("all outputs by channel", recipe, LEAST_GAIN=0.0)
    bench.row("outputs of convolutions not rounded (no kernel)", replace(recipe, quantize_outputs=()))
    bench.weights_alone()
    bench.row("convolutions alone", replace(recipe, op_types=("Conv",)))
    bench.row("products alone", replace(recipe, op_types=("MatMul",)))
    bench.row("1x1 convolutions in float", replace(recipe, keep_float=pointwise(load_model(bench.path))))
    bench.row("skip connections: a scale for each part", recipe, split_shortcuts)
    bench.row("biases corrected", recipe, correct_biases)
    for alpha in (0.5, 1.0):
        bench.row(f"convolutions equalised, α {alpha}", recipe, equalise("Conv", alpha))
    for alpha in (0.25, 0.5):
        bench.row(f"products smoothed, α {alpha}", recipe, equalise("MatMul", alpha))


if __name__ == "__main__":
    main()
