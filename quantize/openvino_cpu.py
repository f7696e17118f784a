"""INT8 for OpenVINO on a CPU: NNCF's post-training quantization, less of it where it loses more than it wins.

What the profile says (FACTS: 71 M U-Net, two Zen 4 cores; and the shipped reference on two cores with AMX):
- The model type TRANSFORMER with the MIXED preset costs no time and is 5 dB better than the default: activations after
  SiLU are one-sided, and symmetric scales waste half of the 256 levels on values that never come.
- Softmax stays float there, and the plugin still fuses the whole attention into one subgraph.
- The timestep embedding's products have as many rows as the batch: nothing to win, and every block depends on them.
  First and last convolution stay float for the same reasons as in `onnxruntime_cpu.py`.
- A zero point costs: on the CPU with AMX the decoder took 4.3 ms with and 4.0 ms without, so both ways are tried.
- What is left computes in bf16 where the CPU has it; in fp32 where an engine errs too much with it.
- Ranges by minimum and maximum over all samples. NNCF's own way, the mean of every sample's extremes, cuts off what
  only some timesteps reach: of the student of few steps it errs by 0.14 where this errs by 0.05.
- Bias correction changed no digit: the exporter's biases are not of the form that NNCF corrects. It is off, which makes
  every layer independent of the others.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import QuantizationError
from ldm_deploy.eval.parity import Probe, Runnable, compare_outputs
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.cpu import has_bf16, has_vnni
from ldm_deploy.quantize.kit import LayerInfo, Spec, is_large
from ldm_deploy.quantize.openvino_graph import (
    follows_from_constants,
    layers_of,
    make_symmetric,
    quantized_layers,
    restore,
)
from ldm_deploy.quantize.profile import NodeTimes, OpCost, openvino_node_times, profile_openvino
from ldm_deploy.quantize.scheme import AnyRecipe, OpenVinoRecipe
from ldm_deploy.runtime.engine_openvino import FIXED, OpenVinoEngine

TARGET = "openvino-cpu"
# From most to least INT8. Which one is fastest depends on the graph and the machine, so it is measured.
RECIPES: dict[str, AnyRecipe] = {
    "all": OpenVinoRecipe(),
    "symmetric": OpenVinoRecipe(symmetric=True),
    "conv+matmul": OpenVinoRecipe(op_types=("Convolution", "MatMul")),
    "conv": OpenVinoRecipe(op_types=("Convolution",)),
    "matmul": OpenVinoRecipe(op_types=("MatMul",)),
}
# Of SmoothQuant; of a large model the first. NNCF's own 0.95 divides by extremes that the next caption exceeds.
ALPHAS = (None, 0.5)


class OpenVinoKit:
    """See `kit.Kit`. `bf16`: a file of the same component in bf16, where there is one."""

    runtime = "openvino"
    title = "OpenVINO"
    suffix = ".xml"
    spares_milder = False  # fp32 for the rest takes longer than a few layers more in bf16

    def __init__(
        self,
        model_path: Path,
        *,
        bf16: Path | None = None,
        recipes: Mapping[str, AnyRecipe] = RECIPES,
        threads: int | None = None,
    ) -> None:
        self.model_path = model_path
        self.recipes = recipes
        self.threads = threads
        self._bf16 = bf16
        self._quantized: dict[float | None, Path] = {}  # by the alpha of SmoothQuant
        self._alpha: float | None = None

    def calibrate(self, observed: Samples, held_out: Samples, folder: Path) -> None:
        """Quantize with each of `ALPHAS` and keep the one that errs least on samples which it has not seen."""
        engine = OpenVinoEngine(self.model_path, threads=self.threads, fixed=0)
        check_activations(engine, observed)
        probes = [Probe(feeds, engine.run(feeds)) for feeds in held_out]
        del engine  # its weights
        errors: dict[float | None, float] = {}
        smoothable = any(layer.kind == "MatMul" for layer in layers_of(_read(self.model_path)))
        trial = folder / "alpha.xml"
        for alpha in ALPHAS if smoothable and not is_large(self) else ALPHAS[:1]:
            self._alpha = alpha
            recipe = self.settle(next(iter(self.recipes.values())))
            assert isinstance(recipe, OpenVinoRecipe)
            self._quantized[alpha] = folder / f"nncf-{len(self._quantized)}.xml"
            quantize_file(self.model_path, self._quantized[alpha], observed, recipe)
            try:
                self.build(trial, recipe)
            except QuantizationError:
                errors[alpha] = np.inf
                continue
            result = compare_outputs(self.open(trial, recipe, trial=True), probes, np.inf)
            errors[alpha] = float(np.sqrt(np.mean(np.square(result.errors))))
            for file in self.files(trial):
                file.unlink()
        self._alpha = min(errors, key=lambda alpha: errors[alpha] if np.isfinite(errors[alpha]) else np.inf)

    def settle(self, recipe: AnyRecipe) -> AnyRecipe:
        assert isinstance(recipe, OpenVinoRecipe)
        rest = "bf16" if has_bf16() else "fp32"
        return replace(recipe, smooth_quant_alpha=self._alpha, rest=rest, reduce_range=has_vnni() is False)

    def milder(self, recipe: AnyRecipe) -> AnyRecipe | None:
        assert isinstance(recipe, OpenVinoRecipe)
        return None if recipe.rest == "fp32" else replace(recipe, rest="fp32")

    def layers(self, recipe: AnyRecipe) -> list[LayerInfo]:
        known = layers_of(_read(self.model_path))
        quantized = quantized_layers(_read(self._path(recipe)))
        return [
            LayerInfo(layer.name, layer.kind)
            for layer in known
            if layer.name in quantized
            and layer.name not in recipe.keep_float
            and layer.kind in recipe.op_types
            and layer.rows
            and (layer.kind == "attention" or min(layer.channels) >= recipe.min_channels)
        ]

    def build(self, path: Path, recipe: AnyRecipe) -> None:
        import openvino

        chosen = {layer.name for layer in self.layers(recipe)}
        if not chosen:
            raise QuantizationError(
                f"{self.model_path.name} has no {' or '.join(recipe.op_types)} that NNCF quantizes; use the fp32 engine"
            )
        model = _read(self._path(recipe))
        restore(model, _read(self.model_path), quantized_layers(model) - chosen)
        assert isinstance(recipe, OpenVinoRecipe)
        if recipe.symmetric:
            make_symmetric(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        openvino.save_model(model, path, compress_to_fp16=False)

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]

    def open(self, path: Path, recipe: AnyRecipe, *, trial: bool = False) -> Runnable:
        fixed = 0 if trial else FIXED
        return OpenVinoEngine(path, precision="int8", rest=_rest(recipe), threads=self.threads, fixed=fixed)

    def found(self, path: Path, engine: Runnable) -> dict[str, int]:
        assert isinstance(engine, OpenVinoEngine)
        return engine.precision_found()

    def spec(self, path: Path, recipe: AnyRecipe) -> Spec:
        return {
            "kind": "engine", "runtime": "openvino", "path": str(path), "precision": "int8", "rest": _rest(recipe),
        }  # fmt: skip

    def siblings(self) -> dict[str, Spec]:
        specs = {"fp32": self.model_path} | ({"bf16": self._bf16 or self.model_path} if has_bf16() else {})
        return {
            f"{precision}-{TARGET}": {
                "kind": "engine", "runtime": "openvino", "path": str(path), "precision": precision,
            }
            for precision, path in specs.items()
        }  # fmt: skip

    def base(self, recipe: AnyRecipe) -> Spec:
        return {
            "kind": "engine", "runtime": "openvino", "path": str(self.model_path), "precision": _rest(recipe),
        }  # fmt: skip

    def open_spec(self, spec: Spec) -> Runnable:
        return OpenVinoEngine(
            Path(spec["path"]), precision=spec["precision"], rest=spec.get("rest"), threads=self.threads
        )

    def node_times(self, spec: Spec, feeds: Mapping[str, np.ndarray], runs: int) -> list[NodeTimes]:
        return openvino_node_times(spec, feeds, runs=runs, threads=self.threads)

    def profile(self, spec: Spec, feeds: Mapping[str, np.ndarray]) -> list[OpCost]:
        return profile_openvino(spec, feeds, threads=self.threads)

    def _path(self, recipe: AnyRecipe) -> Path:
        assert isinstance(recipe, OpenVinoRecipe)
        return self._quantized[recipe.smooth_quant_alpha]


def quantize_file(model_path: Path, out_path: Path, samples: Samples, recipe: OpenVinoRecipe) -> None:
    """NNCF's post-training quantization of an OpenVINO file, every layer it can; deterministic, says nothing.

    Of the recipe, how values are scaled, always with a zero point. Raises `QuantizationError` with NNCF's reason.
    """
    import openvino

    nncf = _import_nncf()
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    advanced = nncf.AdvancedQuantizationParameters(
        disable_bias_correction=True,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(
            matmul=-1 if recipe.smooth_quant_alpha is None else recipe.smooth_quant_alpha
        ),
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        overflow_fix=nncf.OverflowFix.ENABLE if recipe.reduce_range else nncf.OverflowFix.DISABLE,
    )
    try:
        with _silent():
            quantized = nncf.quantize(
                _read(model_path),
                nncf.Dataset(samples),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(samples),
                advanced_parameters=advanced,
            )
    except (RuntimeError, nncf.ValidationError, nncf.InternalError, nncf.UnsupportedModelError) as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise QuantizationError(
            f"NNCF cannot quantize {model_path.name}: {reason}; leave the component out, or use its fp32 engine"
        ) from None
    openvino.save_model(quantized, out_path, compress_to_fp16=False)


def check_activations(engine: OpenVinoEngine, samples: Samples) -> None:
    """Raises `QuantizationError` naming layer and timestep if the fp32 model returns what is not finite on a sample."""
    for count, feeds in enumerate(samples):
        if all(np.isfinite(value).all() for value in engine.run(feeds).values()):
            continue
        where = f", timestep {feeds['timestep'].ravel().tolist()}" if "timestep" in feeds else ""
        raise QuantizationError(
            f"activation {_first_not_finite(engine.path, feeds)!r} is not finite on calibration sample {count}{where}; "
            "the fp32 model itself overflows there: repair it, or leave the sample out"
        )


def _first_not_finite(model_path: Path, feeds: Mapping[str, np.ndarray]) -> str:
    """The first node, in the order of the graph, whose float output has NaN or infinity."""
    import openvino

    model = _read(model_path)
    nodes = [
        node
        for node in model.get_ordered_ops()
        if node.get_output_size() == 1
        and node.get_input_size()
        and node.get_type_name() != "Result"
        and node.get_output_element_type(0) == openvino.Type.f32
        # A bias that is reshaped to fit is a constant, whatever its shape is computed from.
        and not all(follows_from_constants(value) for value in node.input_values()[: 1 if _shapes(node) else None])
    ]
    results = [openvino.opset13.result(node.output(0)) for node in nodes]
    model.add_results(results)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = list(compiled(dict(feeds)).values())[-len(nodes) :]
    bad = (node for node, value in zip(nodes, found, strict=True) if not np.isfinite(value).all())
    return next((node.get_friendly_name() for node in bad), model_path.stem)


def _shapes(node: Any) -> bool:
    return node.get_type_name() in ("Reshape", "Broadcast", "Unsqueeze", "Squeeze", "Transpose", "Convert")


def _read(path: Path) -> Any:
    import openvino

    return openvino.Core().read_model(path)


def _rest(recipe: AnyRecipe) -> str:
    assert isinstance(recipe, OpenVinoRecipe)
    return recipe.rest


def _import_nncf() -> Any:
    """Without its telemetry: nothing is sent from a user's machine."""
    import logging

    os.environ.setdefault("NNCF_CI", "1")
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """NNCF draws bars of its own on stdout, which belongs to results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
