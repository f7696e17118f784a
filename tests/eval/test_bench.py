"""`ldm-deploy bench`: rows for every engine and variant, and a reason where one does not run."""

from __future__ import annotations

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
    print_bench(result)
    lines = capsys.readouterr().out.splitlines()
    assert "not measured: " in lines[-1]
    assert lines[1] == "vae_decoder: latent 1x4x8x8"
