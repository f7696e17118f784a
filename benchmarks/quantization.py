"""Our INT8 beside that of ONNX Runtime, NNCF and optimum: one model, one interleaved run, every engine against torch.

    .venv/bin/python benchmarks/quantization.py MODEL [--work DIR] [--rows ROW ...] [--rounds N] [--threads N]

- `unet71m`: diffusers' UNet2DConditionModel, 71.2 M parameters (block_out_channels 128, 256, 512; two layers per
  block; cross-attention 256; attention_head_dim 8), latents 1x4x32x32, context 1x16x256; random weights, fixed seed
- `decoder12m`: the decoder of diffusers' AutoencoderKL, 12.4 M parameters (64, 128, 256, 256), to 256x256; likewise
- `sd15`: UNet2DConditionModel as diffusers has it, cross-attention 768: the size of Stable Diffusion 1.5's, 859.5 M
  parameters, latents 1x4x64x64, context 1x77x768; random weights. 20 GB of disk, 16 GB of memory
- `reference`: the U-Net of the shipped text-to-emoji model

Every engine is calibrated on the same samples: of the U-Net's own trajectories, and for the decoder their last
latents. PSNR is that of the output against torch fp32 on other trajectories, peak: the range of the reference. What is
built lies in DIR (build/quantization) and is not built again, so that a run that was killed goes on with the next row;
the measurement at the end is one run of everything. Each row is built by a process of its own, whose memory, with that
of all processes it starts, is watched (Linux). A row that fails stays in the table with its reason.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.artifact import atomic_write_json
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.eval.latency import compare_engines
from ldm_deploy.eval.machine import machine
from ldm_deploy.eval.metrics import psnr_db_of
from ldm_deploy.eval.parity import Probe, read_probes, write_probes
from ldm_deploy.eval.speedup import speedup
from ldm_deploy.export.to_onnx import component_axes, export_module
from ldm_deploy.export.to_onnxruntime import to_onnxruntime
from ldm_deploy.export.to_openvino import to_openvino
from ldm_deploy.models.components import SIGNATURES
from ldm_deploy.progress import note
from ldm_deploy.quantize.calibration import (
    PROMPTS,
    CalibrationSet,
    Samples,
    collect,
    read_calibration,
    write_calibration,
)
from ldm_deploy.quantize.candidates import quantize_component
from ldm_deploy.quantize.kit import Kit
from ldm_deploy.quantize.onnxruntime_cpu import OnnxRuntimeKit
from ldm_deploy.quantize.openvino_cpu import OpenVinoKit
from ldm_deploy.runtime.engine_openvino import OpenVinoEngine
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from ldm_deploy.runtime.pipeline import Pipeline

SEED = 0
CONTEXTS = {"unet71m": (16, 256), "sd15": (77, 768)}  # tokens, channels
LATENTS = {"unet71m": 32, "sd15": 64}
# (Steps, with guidance) of what is calibrated with, and of what is judged with; of all prompts a step of sd15 takes a
# minute.
DRAWN = {"calibration": ((10, True), (10, False)), "probes": ((4, True),)}
DRAWN_SD15 = {"calibration": ((4, False),), "probes": ((2, False),)}
LEAST_DB = 40.0  # what an engine of ours must keep
TORCH = "torch eager fp32"
PREPARE = "prepare"  # what is not a row
OURS = "ours"  # folder with the files that have our passes for a runtime
AGAINST = (TORCH, "ONNX Runtime fp32", "OpenVINO bf16", "NNCF, its default, + bf16", "the same, sizes fixed")
SHOWN = (TORCH, "ONNX Runtime fp32", "NNCF, its default, + bf16")  # of these in the table
COMPONENTS = {"unet71m": "unet", "decoder12m": "vae_decoder", "sd15": "unet", "reference": "unet"}

Spec = dict[str, Any]


UNETS: dict[str, dict[str, Any]] = {
    "unet71m": {
        "block_out_channels": (128, 256, 512),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
    },
    "sd15": {},
}


def build_unet(model: str) -> Any:
    """One of `UNETS` as a module with the contract's signature."""
    import diffusers
    import torch

    class Unet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            unet: Any = diffusers.UNet2DConditionModel
            self.unet = unet(sample_size=LATENTS[model], cross_attention_dim=CONTEXTS[model][1], **UNETS[model])

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    torch.manual_seed(SEED)
    return Unet().eval().requires_grad_(False)


def build_decoder() -> Any:
    """The 12 M decoder as a module with the contract's signature."""
    import diffusers
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            autoencoder: Any = diffusers.AutoencoderKL
            widths = (64, 128, 256, 256)
            made = autoencoder(
                block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=32,
                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            )  # fmt: skip
            self.post, self.decoder = made.post_quant_conv, made.decoder

        def forward(self, latent: Any) -> Any:
            return self.decoder(self.post(latent))

    torch.manual_seed(SEED)
    return Decoder().eval().requires_grad_(False)


def build_reference_unet() -> Any:
    """The shipped one."""
    from ldm_deploy.models.sources import load_source

    return load_source("reference").components()["unet"].eval().requires_grad_(False)


BUILDERS: dict[str, Callable[[], Any]] = {
    **{model: functools.partial(build_unet, model) for model in UNETS},
    "decoder12m": build_decoder,
    "reference": build_reference_unet,
}


def torch_engine(model: str, threads: int) -> Any:
    """What a worker calls for the row of torch itself."""
    import torch

    from ldm_deploy.models.torch_engine import TorchEngine

    torch.set_num_threads(threads)
    return TorchEngine(COMPONENTS[model], BUILDERS[model]())


def free_engine(path: str, precision: str, rest: str | None, threads: int) -> OpenVinoEngine:
    """What a worker calls for an OpenVINO file as it comes: its axes stay free, as `compile_model` leaves them."""
    return OpenVinoEngine(Path(path), precision=precision, rest=rest, threads=threads, fixed=0)


class Words:
    """Stands for a tokenizer and a text encoder: every prompt has a random context of its own, (tokens, channels)."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        return np.array([[sum(map(ord, prompt))] for prompt in prompts])

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seeds = feeds["input_ids"][:, 0].tolist()
        rows = [np.random.default_rng(seed).standard_normal(self.shape, np.float32) for seed in seeds]
        return {"encoder_hidden_states": np.stack(rows)}


def random_pipeline(model_name: str, unet: Any) -> Pipeline:
    """A pipeline around one of `UNETS`."""
    size = (LATENTS[model_name],) * 2
    model = {"default_size": size, "size_multiple": 8, "downsampling": 1, "latent_channels": 4, "scale_factor": 1.0}
    # Taken as v, what random weights predict leaves latents near unit variance, where a trained model keeps them. Taken
    # as epsilon it drives their standard deviation to 14, and INT8 would be calibrated for that.
    schedule = Schedule(prediction_type="v_prediction")
    words: Any = Words(CONTEXTS[model_name])
    defaults = {"sampler": "ddim", "steps": 10, "guidance_scale": 3.0}
    return Pipeline({"unet": unet, "text_encoder": words}, words, model, schedule, defaults)


def prepare(model: str, folder: Path, threads: int | None) -> None:
    """In `folder`: fp32.onnx and fp32.xml, in its `OURS` as we give them to a runtime, calibration.npz and
    probes.safetensors; what is there is kept."""
    component = COMPONENTS[model]
    if (folder / "prepared.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    module = BUILDERS[model]()
    rows: dict[str, Samples] = {}
    if model == "decoder12m":
        unet = folder.parent / "unet71m" / "fp32.onnx"
        prepare("unet71m", unet.parent, threads)
        pipeline = random_pipeline("unet71m", OnnxRuntimeEngine(unet, threads=threads))
        for part, count in (("calibration", 8), ("probes", 2)):
            seeds = [1000 * len(rows) + number for number in range(count)]
            latents = pipeline.sample_latents([f"{part} {seed}" for seed in seeds], seed=seeds, steps=10)
            rows[part] = Samples({"latent": latents})
        example, factor = {"latent": rows["probes"].arrays["latent"][:, :, :24, :]}, 8
    else:
        factor = 8
        if model == "reference":
            from ldm_deploy.models.sources import load_source
            from ldm_deploy.models.torch_engine import torch_pipeline

            source = load_source("reference")
            pipeline = torch_pipeline(source, threads)
            factor = int(source.model["downsampling"])
        else:
            from ldm_deploy.models.torch_engine import TorchEngine

            pipeline = random_pipeline(model, TorchEngine("unet", module))
        for part, trajectories in (DRAWN_SD15 if model == "sd15" else DRAWN).items():
            prompts = PROMPTS if part == "calibration" else ("rocket",)
            data = collect(
                pipeline, "", seed=SEED + len(rows), prompts=prompts, trajectories=trajectories, per_stratum=1,
                decode=False,
            )  # fmt: skip
            rows[part] = data.samples("unet")
        example = {name: np.concatenate([value[:1], value[:1]]) for name, value in rows["probes"].arrays.items()}
    export_module(
        module, example, *component_axes(component, factor, SIGNATURES[component]), folder / "fp32.onnx",
        component=component,
    )  # fmt: skip
    import openvino

    openvino.save_model(openvino.Core().read_model(folder / "fp32.onnx"), folder / "fp32.xml", compress_to_fp16=False)
    (folder / OURS).mkdir(exist_ok=True)
    to_openvino(folder / "fp32.onnx", folder / OURS / "fp32.xml", component=component)
    to_onnxruntime(folder / "fp32.onnx", folder / OURS)
    import torch

    names = SIGNATURES[component]
    probes = []
    with torch.inference_mode():
        for feeds in rows["probes"]:
            output = module(*(torch.from_numpy(feeds[name]) for name in names[0])).numpy()
            probes.append(Probe(feeds, {names[1][0]: output}))
    (folder / "probes.safetensors").unlink(missing_ok=True)
    write_probes(folder / "probes.safetensors", probes)
    write_calibration(CalibrationSet(model, {component: rows["calibration"].arrays}, {}), folder / "calibration.npz")
    parameters = sum(weight.numel() for weight in module.parameters())
    atomic_write_json(folder / "prepared.json", {"parameters": parameters, "samples": len(rows["calibration"])})
    note(f"{model}: {parameters / 1e6:.1f} M parameters prepared in {time.monotonic() - start:.0f} s")


class Reader:
    """Calibration data as ONNX Runtime's tools want it."""

    def __init__(self, samples: Samples) -> None:
        self.rows = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)


def error_at(psnr_db: float, probes: Sequence[Probe]) -> float:
    """The relative error of an output with this PSNR, peak: the range of the reference."""
    (name,) = probes[0].outputs
    values = np.concatenate([probe.outputs[name].ravel() for probe in probes]).astype(np.float64)
    return float(np.ptp(values) / np.sqrt(np.mean(values**2)) * 10 ** (-psnr_db / 20))


def ours(kit_of: Callable[[Path, int | None], Kit], model: str, folder: Path, out: Path, threads: int | None) -> Spec:
    """The engine that `ldm-deploy quantize` would keep."""
    component = COMPONENTS[model]
    kit = kit_of(folder, threads)
    probes = read_probes(folder / "probes.safetensors")
    best, refused = quantize_component(
        component, kit, out, _samples(model, folder), probes, error_at(LEAST_DB, probes), rounds=15
    )
    reasons = {loser.name: loser.refused for loser in refused}
    if best is None:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return kit.spec(best.path, best.recipe) | {
        "about": {"recipe": best.name, **best.recipe.to_dict(), "found": best.found, "refused": reasons}
    }


def onnxruntime_static(model: str, folder: Path, out: Path, threads: int | None) -> Spec:
    """`quantize_static` as it comes (QDQ, U8S8, min-max), for the ops with weights: with all it knows it stops with an
    error at weights that two nodes share."""
    from onnxruntime.quantization import quantize_static

    samples = _samples(model, folder)
    quantize_static(
        str(folder / "fp32.onnx"), str(out / "model.onnx"), Reader(samples),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
    )  # fmt: skip
    return {"kind": "engine", "runtime": "onnxruntime", "path": str(out / "model.onnx")}


def onnxruntime_dynamic(model: str, folder: Path, out: Path, threads: int | None) -> Spec:
    """`quantize_dynamic` as it comes."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(folder / "fp32.onnx"), str(out / "model.onnx"))
    return {"kind": "engine", "runtime": "onnxruntime", "path": str(out / "model.onnx")}


def optimum_dynamic(model: str, folder: Path, out: Path, threads: int | None) -> Spec:
    """optimum's quantizer with its configuration for AVX512-VNNI (its static mode wants a dataset of `datasets`)."""
    import transformers
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer(folder / "fp32.onnx", config=transformers.PretrainedConfig())
    quantizer.quantize(save_dir=out, quantization_config=AutoQuantizationConfig.avx512_vnni(is_static=False))
    return {"kind": "engine", "runtime": "onnxruntime", "path": str(next(out.glob("*.onnx")))}


def nncf_default(rest: str, model: str, folder: Path, out: Path, threads: int | None) -> Spec:
    """`nncf.quantize` with nothing but the data; `rest`: what OpenVINO computes in elsewhere."""
    import openvino

    from ldm_deploy.quantize.openvino_cpu import _import_nncf

    nncf = _import_nncf()
    samples = _samples(model, folder)
    quantized = nncf.quantize(openvino.Core().read_model(folder / "fp32.xml"), nncf.Dataset(samples))
    openvino.save_model(quantized, out / "model.xml", compress_to_fp16=False)
    return _openvino(out / "model.xml", "int8", rest)


def plain(spec: Callable[[Path], Spec], model: str, folder: Path, out: Path, threads: int | None) -> Spec:
    """An engine that needs no building."""
    return spec(folder)


def _openvino(path: Path, precision: str, rest: str | None = None) -> Spec:
    return {"kind": "engine", "runtime": "openvino", "path": str(path), "precision": precision, "rest": rest}


Row = Callable[[str, Path, Path, int | None], Spec]
ROWS: dict[str, Row] = {
    "ONNX Runtime fp32": functools.partial(
        plain, lambda folder: {"kind": "engine", "runtime": "onnxruntime", "path": str(folder / "fp32.onnx")}
    ),
    "ours, ONNX Runtime fp32": functools.partial(
        plain, lambda folder: {"kind": "engine", "runtime": "onnxruntime", "path": str(folder / OURS / "fp32.onnx")}
    ),
    "OpenVINO fp32": functools.partial(plain, lambda folder: _openvino(folder / "fp32.xml", "fp32")),
    "OpenVINO bf16": functools.partial(plain, lambda folder: _openvino(folder / "fp32.xml", "bf16")),
    "ours, OpenVINO bf16": functools.partial(plain, lambda folder: _openvino(folder / OURS / "fp32.xml", "bf16")),
    "ONNX Runtime static, its default": onnxruntime_static,
    "ONNX Runtime dynamic, its default": onnxruntime_dynamic,
    "optimum dynamic (avx512_vnni)": optimum_dynamic,
    "NNCF, its default": functools.partial(nncf_default, "fp32"),
    "NNCF, its default, + bf16": functools.partial(nncf_default, "bf16"),
    "the same, sizes fixed": functools.partial(
        plain, lambda folder: _openvino(row_folder(folder, "NNCF, its default, + bf16") / "model.xml", "int8", "bf16")
    ),
    "ours, ONNX Runtime": functools.partial(
        ours, lambda folder, threads: OnnxRuntimeKit(folder / OURS / "fp32.onnx", threads=threads)
    ),
    "ours, OpenVINO": functools.partial(
        ours, lambda folder, threads: OpenVinoKit(folder / OURS / "fp32.xml", threads=threads)
    ),
}


def build_row(name: str, model: str, folder: Path, threads: int | None) -> dict[str, Any]:
    """{"spec", "seconds", "size_bytes", "psnr_db", "about"} or {"failed": reason}; in this process."""
    out = row_folder(folder, name)
    out.mkdir(parents=True, exist_ok=True)
    note(f"{model}: {name}")
    start = time.monotonic()
    try:
        spec = ROWS[name](model, folder, out, threads)
        about = spec.pop("about", None)
        path = Path(spec["path"])
        return {
            "spec": spec,
            "seconds": round(time.monotonic() - start, 1),
            "size_bytes": sum(file.stat().st_size for file in weights_beside(path) if file.is_file()),
            "psnr_db": _psnr(spec, folder, threads),
            "about": about,
        }
    except Exception as error:  # a peer's failure is a row, whatever it is
        return {"failed": next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)}


def weights_beside(path: Path) -> list[Path]:
    """An engine's file and where its weights may be."""
    return [path, path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(f"{path.name}.data")]


def row_folder(folder: Path, name: str) -> Path:
    """Where a row's files are, row.json among them."""
    return folder / "".join(letter if letter.isalnum() else "-" for letter in name)


def built_row(name: str, model: str, work: Path, threads: int | None) -> dict[str, Any]:
    """What `build_row` says in a process of its own, and `peak_memory_bytes`; kept beside the row's files."""
    done = row_folder(work / model, name) / "row.json"
    if not done.is_file():
        process = subprocess.Popen(own_process(model, work, name, threads))
        peak = 0
        while process.poll() is None:
            peak = max(peak, family_bytes(process.pid))
            time.sleep(0.25)
        row = {"failed": f"its process ended with {process.returncode}"}
        if done.is_file():
            row = json.loads(done.read_text(encoding="utf-8"))
        atomic_write_json(done, row | {"peak_memory_bytes": peak})
    kept: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return kept


def own_process(model: str, work: Path, name: str, threads: int | None) -> list[str]:
    """The command that builds one row, or prepares."""
    command = [sys.executable, __file__, model, "--work", str(work), "--only", name]
    return [*command, *(["--threads", str(threads)] if threads else [])]


def family_bytes(pid: int) -> int:
    """Resident memory of a process and of all that it started, pages that they share counted once (proc(5): Pss)."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                total = int(line.split()[1]) * 1024
        children = [
            int(child)
            for thread in Path(f"/proc/{pid}/task").iterdir()
            for child in (thread / "children").read_text(encoding="ascii").split()
        ]
    except OSError:  # it ended meanwhile
        return total
    return total + sum(family_bytes(child) for child in children)


def _samples(model: str, folder: Path) -> Samples:
    return read_calibration(folder / "calibration.npz").samples(COMPONENTS[model])


def _psnr(spec: Spec, folder: Path, threads: int | None) -> float:
    """Of the output on the probes, all taken together, against torch fp32."""
    path = Path(spec["path"])
    engine: Any
    if spec["runtime"] == "openvino":
        engine = OpenVinoEngine(path, precision=spec["precision"], rest=spec["rest"], threads=threads)
    else:
        engine = OnnxRuntimeEngine(path, threads=threads)
    probes = read_probes(folder / "probes.safetensors")
    expected, found = (
        np.concatenate([next(iter(outputs.values())) for outputs in both])
        for both in ([probe.outputs for probe in probes], [engine.run(probe.inputs) for probe in probes])
    )
    mse = np.mean((expected.astype(np.float64) - found.astype(np.float64)) ** 2)
    return float(psnr_db_of(mse, peak=float(np.ptp(expected))))


def benchmark(model: str, work: Path, names: Sequence[str], rounds: int, threads: int | None) -> dict[str, Any]:
    """Build what is missing, measure everything in one run."""
    folder = work / model
    subprocess.run(own_process(model, work, PREPARE, threads), check=True)  # torch's weights go with it
    rows = {name: built_row(name, model, work, threads) for name in names}
    count = machine(threads)["threads"]
    specs: dict[str, Spec] = {
        TORCH: {
            "kind": "factory", "file": str(Path(__file__).resolve()), "function": "torch_engine",
            "arguments": {"model": model, "threads": count},
        }
    }  # fmt: skip
    specs |= {name: row["spec"] for name, row in rows.items() if "spec" in row}
    for name in (name for name in specs if name.startswith("NNCF")):
        spec = {key: specs[name][key] for key in ("path", "precision", "rest")} | {"threads": count}
        specs[name] = {
            "kind": "factory",
            "file": str(Path(__file__).resolve()),
            "function": "free_engine",
            "arguments": spec,
        }
    feeds = read_probes(folder / "probes.safetensors")[0].inputs
    note(f"{model}: {len(specs)} engines, {rounds} rounds")
    measured = compare_engines(specs, feeds, rounds=rounds, threads=threads, seed=SEED, time_limit_s=240)
    samples = measured["samples_ms"]
    for name, row in {TORCH: {}, **rows}.items():
        rows.setdefault(name, row)
        if name in measured["failed"]:
            rows[name]["failed"] = measured["failed"][name]
        elif name in samples:
            rows[name]["latency_ms"] = measured["latency_ms"][name]
            rows[name]["versus"] = {
                other: speedup(samples[other], samples[name], other, seed=SEED)
                for other in AGAINST
                if other in samples and other != name
            }
    prepared = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    return {"model": model, **prepared, "machine": machine(threads), "rows": rows}


def show(result: dict[str, Any]) -> None:
    """A table for docs/quantization.md."""
    computer = result["machine"]
    print(f"{result['model']}: {computer['cpu']}, {computer['threads']} threads, {', '.join(computer['isa'])}\n")
    print(
        "| engine | ms | against torch | against ONNX Runtime fp32 | against NNCF + bf16 "
        "| PSNR dB | MB | built in s | with GB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in sorted(result["rows"].items(), key=lambda item: item[0] != TORCH):
        if "failed" in row:
            print(f"| {name} | failed: {row['failed'][:120]} | | | | | | | |")
            continue
        ratios = [
            f"{one['median']:.2f}x ({one['ci95_low']:.2f}–{one['ci95_high']:.2f})" if one else "–"
            for one in (row.get("versus", {}).get(other) for other in SHOWN)
        ]
        quality = f"{row['psnr_db']:.1f}" if "psnr_db" in row else "–"
        size = f"{row['size_bytes'] / 1e6:.1f}" if "size_bytes" in row else "–"
        latency = f"{row['latency_ms']['median']:.1f}" if "latency_ms" in row else "–"
        memory = f"{row['peak_memory_bytes'] / 1e9:.1f}" if row.get("peak_memory_bytes") else "–"
        cells = [name, latency, *ratios, quality, size, row.get("seconds", "–"), memory]
        print("".join(f"| {cell} " for cell in cells) + "|")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=tuple(COMPONENTS))
    parser.add_argument("--work", type=Path, default=Path("build/quantization"), help="where engines are kept")
    parser.add_argument("--only", choices=(PREPARE, *ROWS), default=None, help="build this row here, measure nothing")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), help="build and measure these")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds of the measurement")
    parser.add_argument("--threads", type=int, default=None, help="threads per engine (default: all)")
    parser.add_argument("--json", type=Path, default=None, help="write the result there")
    options = parser.parse_args()
    if options.only is not None:
        prepare(options.model, options.work / options.model, options.threads)
        if options.only == PREPARE:
            return 0
        row = build_row(options.only, options.model, options.work / options.model, options.threads)
        atomic_write_json(row_folder(options.work / options.model, options.only) / "row.json", row)
        return 0
    result = benchmark(options.model, options.work, options.rows, options.rounds, options.threads)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
