"""`ldm-deploy bench`: rows for every engine and variant, and a reason where one does not run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from ldm_deploy.eval.bench import bench_bundle, print_bench
from ldm_deploy.eval.parity import Probe, write_probes
from ldm_deploy.runtime.bundle import read_bundle, write_bundle
from tests.tiny_bundle import write_tiny_bundle


def with_probes(bundle: Path) -> Path:
    """A toy bundle whose decoder has an input to be measured on, and a second variant without a U-Net that works."""
    data = read_bundle(bundle).data
    (bundle / "probes").mkdir()
    latent = np.zeros((1, 4, 8, 8), np.float32)
    write_probes(bundle / "probes" / "vae_decoder.safetensors", [Probe({"latent": latent}, {})])
    (unet,) = (engine for engine in data["engines"] if engine["component"] == "unet")
    (bundle / "engines" / "broken.onnx").write_bytes(b"no graph")
    broken = {**unet, "id": "unet-broken", "files": ["engines/broken.onnx"]}
    (variant,) = data["variants"]
    others = [engine for engine in variant["engines"] if engine != unet["id"]]
    second = {**variant, "name": "broken-onnxruntime-cpu", "engines": [*others, "unet-broken"]}
    write_bundle(bundle, {**data, "engines": [*data["engines"], broken], "variants": [second, variant]})
    return bundle


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_bundle(with_probes(write_tiny_bundle(tmp_path / "bundle")), threads=1, images=2, steps=1)
    fp32, broken = result["variants"]
    assert fp32["name"] == "fp32-onnxruntime-cpu"
    assert fp32["latency_ms"]["samples"] == 2
    assert fp32["latency_ms"]["median"] > 0
    assert (fp32["speedup"], fp32["reason"]) == (None, None)
    assert broken["latency_ms"] is None
    assert "broken.onnx" in broken["reason"]
    (decoder,) = result["components"]
    assert (decoder["component"], decoder["inputs"]) == ("vae_decoder", "latent 1x4x8x8")
    assert decoder["latency_ms"]["samples"] > 2
    assert [row["batch"] for row in decoder["throughput"]] == [1, 2, 4, 8]
    assert all(row["per_s"] > 0 for row in decoder["throughput"])
    assert [row["batch"] for row in fp32["throughput"]] == [1, 4]
    assert list(fp32["cold_start_ms"]) == ["process", "import", "load", "first_image"]
    assert min(fp32["cold_start_ms"].values()) > 0
    assert fp32["peak_memory_bytes"] > 2**20
    assert fp32["memory"]["gpu_reason"] == "it runs on the processor"
    assert (broken["memory"], broken["cold_start_ms"]) == (None, None)
    print_bench(result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "vae_decoder: latent 1x4x8x8"
    assert any("not measured: " in line for line in lines)
    shown = [" ".join(line.split()) for line in lines if fp32["name"] in line]
    assert any(re.search(r" 1: \S+, 2: \S+, 4: \S+, 8: \S+ per second$", line) for line in shown)
    assert any(re.search(r" \d+ ms: process \d+, import \d+, load \d+, first image \d+$", line) for line in shown)
    assert lines[-1].strip().startswith("libraries ")
