"""What NNCF's options cost in accuracy: the U-Net of a reference in INT8, by how ranges are found and scaled.

    .venv/bin/python benchmarks/nncf_options.py [reference few-steps] [--work DIR]

Relative error ‖engine - fp32‖ / ‖fp32‖ (root mean square over inputs) in three places: on calibration samples that were
held out, whose captions others share; where parity is judged, with captions that no calibration saw, at the size the
model draws; and the same at other sizes. Every layer that our recipe `all` has in INT8 is in INT8, all else in fp32.
First, for scale, what fp32 itself makes of noise of 1 % on its input. Three minutes for the shipped models, two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm_deploy.eval.machine import machine
from ldm_deploy.eval.parity import Probe, compare_outputs, read_probes
from ldm_deploy.export.export import export_source
from ldm_deploy.models.sources import load_source
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.progress import note
from ldm_deploy.quantize import openvino_cpu
from ldm_deploy.quantize.calibration import Samples, collect
from ldm_deploy.quantize.candidates import split_samples
from ldm_deploy.quantize.cpu import has_vnni
from ldm_deploy.runtime.engine_openvino import OpenVinoEngine

# (model type TRANSFORMER, preset MIXED, ranges by the extremes of all samples, SmoothQuant's alpha)
OPTIONS = (
    (False, False, False, None),
    (False, True, False, None),
    (True, True, False, None),
    (True, True, False, 0.95),
    (True, True, True, None),
    (True, True, True, 0.5),
    (True, True, True, 0.95),
)


def quantize(xml: Path, out: Path, samples: Samples, option: tuple[bool, bool, bool, float | None]) -> None:
    """NNCF with one of `OPTIONS`; 7-bit weights without VNNI."""
    import openvino

    nncf = openvino_cpu._import_nncf()
    from nncf.quantization.range_estimator import RangeEstimatorParameters, RangeEstimatorParametersSet

    transformer, mixed, extremes, alpha = option
    with openvino_cpu._silent():
        model = nncf.quantize(
            openvino.Core().read_model(xml),
            nncf.Dataset(samples),
            preset=nncf.QuantizationPreset.MIXED if mixed else nncf.QuantizationPreset.PERFORMANCE,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            subset_size=len(samples),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                disable_bias_correction=True,
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1 if alpha is None else alpha),
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
                if extremes
                else RangeEstimatorParameters(),
                overflow_fix=nncf.OverflowFix.ENABLE if has_vnni() is False else nncf.OverflowFix.DISABLE,
            ),
        )
    openvino.save_model(model, out, compress_to_fp16=False)


def passed_on(engine: OpenVinoEngine, probes: Sequence[Probe]) -> tuple[float, float]:
    """Least and most relative change of the prediction if the sample gets Gaussian noise of 1 % of its spread."""
    rng = np.random.default_rng(0)
    changes = []
    for probe in probes:
        sample = probe.inputs["sample"]
        noise = rng.standard_normal(sample.shape, np.float32) * np.float32(0.01 * sample.std())
        changed = Probe({**probe.inputs, "sample": sample + noise}, probe.outputs)
        changes += compare_outputs(engine, [changed], np.inf).errors
    return min(changes), max(changes)


def rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def table(name: str, work: Path) -> None:
    folder = work / name
    if not folder.exists():
        export_source(name, folder, variants=[("fp32", "openvino-cpu")], components=["unet"])
    xml, probes = folder / "engines" / "unet-fp32.xml", read_probes(folder / "probes" / "unet.safetensors")
    data = collect(torch_pipeline(load_source(name)), "", decode=False)
    held_out, observed = split_samples(data.samples("unet"))
    engine = OpenVinoEngine(xml)
    held = [Probe(feeds, engine.run(feeds)) for feeds in held_out]
    own = probes[0].inputs["sample"].shape[2:]  # the first is of the model's own size
    places = (
        held,
        [probe for probe in probes if probe.inputs["sample"].shape[2:] == own],
        [probe for probe in probes if probe.inputs["sample"].shape[2:] != own],
    )
    print(f"\n{name}: {len(observed)} samples")
    for size, place in zip(("its own size", "other sizes"), places[1:], strict=True):
        least, most = passed_on(engine, place)
        print(f"noise of 1 % becomes {least:.2%} to {most:.2%} at {size}")
    print("\n| model type, preset | ranges | α | held out | own size | other sizes |")
    print("|---|---|---|---:|---:|---:|")
    for option in OPTIONS:
        kit = openvino_cpu.OpenVinoKit(xml)
        quantize(xml, work / "nncf.xml", observed, option)
        kit._quantized[None] = work / "nncf.xml"
        recipe = kit.settle(openvino_cpu.RECIPES["all"])
        kit.build(work / "trial.xml", recipe)
        trial = kit.open(work / "trial.xml", recipe)
        errors = [rms(compare_outputs(trial, place, np.inf).errors) for place in places]
        del trial
        transformer, mixed, extremes, alpha = option
        print(
            f"| {'TRANSFORMER' if transformer else 'default'}, {'MIXED' if mixed else 'PERFORMANCE'} "
            f"| {'extremes' if extremes else 'mean of extremes'} | {'none' if alpha is None else alpha} | "
            + " | ".join(f"{error:.3f}" for error in errors) + " |"
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "names", nargs="*", default=["reference", "few-steps"], help="shipped references or directories"
    )
    parser.add_argument("--work", type=Path, default=Path("build/nncf-options"), help="where engines are kept")
    options = parser.parse_args()
    computer = machine(None)
    note(f"{computer['cpu']}, {computer['threads']} threads, {', '.join(computer['isa'])}")
    for name in options.names:
        table(name, options.work)


if __name__ == "__main__":
    main()
