"""Exporting a U-Net to ONNX, ours against plain `torch.onnx.export`: time, memory, and how fast the result is.

    .venv/bin/python benchmarks/export_unet.py [--size 71m|sd15] [--rounds 30] [--threads N] [--json FILE]

71m: the U-Net of benchmarks/quantization.py. sd15: diffusers' defaults with cross-attention 768, 860 M parameters.
Random weights. Ours is `ldm-deploy export benchmarks.export_unet:<size> --component unet`: trace, write, compare with
torch at five sizes, digests; then the same command again, and once more into another directory, from the cache. Each
export is a process of its own, whose largest resident set is told. The two files are then timed interleaved in ONNX
Runtime. Takes two minutes for 71m, six minutes and 14 GB of disk for sd15.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
AXES = {
    "sample": {0: "batch", 2: "height", 3: "width"},
    "timestep": {0: "batch"},
    "encoder_hidden_states": {0: "batch", 1: "sequence"},
}


def _offer(options: dict[str, Any], context: int, tokens: int) -> tuple[Any, dict[str, Any], Any]:
    import diffusers
    import torch

    class Unet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet: Any = diffusers.UNet2DConditionModel(cross_attention_dim=context, **options)  # type: ignore[attr-defined]

        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    torch.manual_seed(0)
    module = Unet().eval().requires_grad_(False)
    inputs = {
        "sample": torch.randn(2, 4, 32, 32),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, tokens, context),
    }
    return module, inputs, AXES


def size_71m() -> tuple[Any, dict[str, Any], Any]:
    """The U-Net that most of our figures are about."""
    options = {
        "sample_size": 32,
        "block_out_channels": (128, 256, 512),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
    }
    return _offer(options, 256, 16)


def size_sd15() -> tuple[Any, dict[str, Any], Any]:
    """The size of Stable Diffusion 1.5's."""
    return _offer({"sample_size": 64}, 768, 77)


def export(how: str, size: str, folder: Path) -> dict[str, Any]:
    """In this process; returns seconds without the making of the module, and the largest resident set in bytes."""
    from ldm_deploy.eval.memory import peak_memory_bytes

    made = globals()[f"size_{size}"]()
    start = time.monotonic()
    if how != "plain":
        from ldm_deploy.cache import Cache
        from ldm_deploy.export import foreign

        handed = [_checked(made)]
        del made
        foreign.call_function = lambda source: handed.pop()  # type: ignore[assignment]
        source, cache = f"benchmarks.export_unet:size_{size}", Cache(folder / "cache")
        out = folder / ("elsewhere" if how == "elsewhere" else "ours")
        bundle = foreign.export_function(source, "unet", out, cache=cache)
        file = bundle.data["engines"][0]["files"][0]
        found = {"file": str(out / file), "parity": bundle.data["engines"][0]["parity"]["relative_error"]}
    else:
        import torch

        module, inputs, axes = made
        dynamic = {name: dict.fromkeys(named, torch.export.Dim.AUTO) for name, named in axes.items()}
        found = {"file": str(folder / "plain.onnx")}
        torch.onnx.export(
            module, (), found["file"], kwargs=inputs, dynamo=True, dynamic_shapes=dynamic,
            input_names=list(inputs), external_data=size == "sd15", verbose=False,
        )  # fmt: skip
    return {**found, "seconds": time.monotonic() - start, "peak_memory_bytes": peak_memory_bytes()}


def _checked(made: tuple[Any, dict[str, Any], Any]) -> tuple[Any, Any, Any]:
    module, inputs, axes = made
    return module, {name: value.numpy() for name, value in inputs.items()}, axes


def benchmark(size: str, rounds: int, threads: int | None, folder: Path) -> dict[str, Any]:
    from ldm_deploy.eval.latency import compare_engines
    from ldm_deploy.eval.machine import machine

    result: dict[str, Any] = {"machine": machine(threads), "size": size}
    for how in ("plain", "ours", "again", "elsewhere"):
        command = [sys.executable, __file__, "--size", size, "--child", how, "--folder", str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        result[how] = json.loads(told.stdout.splitlines()[-1])
        print(
            f"{how:9} {result[how]['seconds']:6.1f} s {result[how]['peak_memory_bytes'] / 2**30:5.1f} GiB", flush=True
        )
    specs = {
        how: {"kind": "engine", "runtime": "onnxruntime", "path": result[how]["file"]} for how in ("plain", "ours")
    }
    context = (77, 768) if size == "sd15" else (16, 256)
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((2, 4, 32, 32), np.float32),
        "timestep": np.array([500, 500]),
        "encoder_hidden_states": rng.standard_normal((2, *context), np.float32),
    }
    measured = compare_engines(specs, feeds, rounds=rounds, threads=threads, seed=0, time_limit_s=240)
    if measured["failed"]:
        raise SystemExit(f"error: {measured['failed']}")
    result["latency_ms"], result["speedup"] = measured["latency_ms"], measured["speedup"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=("71m", "sd15"), default="71m")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("plain", "ours", "again", "elsewhere"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(export(given.child, given.size, given.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = benchmark(given.size, given.rounds, given.threads, Path(folder))
    print(json.dumps({key: result[key] for key in ("latency_ms", "speedup")}, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
