"""A whole reference, untrained and tiny, to a bundle: every component proven, on sizes that were not traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ldm_deploy.errors import ConfigError, ParityError, StageMissingError
from ldm_deploy.eval.parity import compare_outputs, read_probes
from ldm_deploy.export import traced
from ldm_deploy.export.export import export_source
from ldm_deploy.export.to_onnx import export_module
from ldm_deploy.models.reference import (
    load_reference,
)
from ldm_deploy.models.sources import source_digest
from ldm_deploy.models.torch_engine import torch_pipeline
from ldm_deploy.runtime.bundle import Bundle, verify_bundle
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from ldm_deploy.runtime.pipeline import load

# Four exports in one fixture: half a minute of torch, several where other work fills the machine.
pytestmark = pytest.mark.timeout(900)

COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")


@pytest.fixture(scope="module")
def exported(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_source(reference, tmp_path_factory.mktemp("exported") / "bundle", threads=1)


def test_four_engines_and_one_variant(exported: Bundle, reference: Path) -> None:
    verify_bundle(exported.root)
    assert exported.data["parents"] == {"reference": source_digest(reference)}
    assert exported.variant().name == "fp32-onnxruntime-cpu"
    assert [engine["component"] for engine in exported.data["engines"]] == list(COMPONENTS)
    for engine in exported.data["engines"]:
        assert engine["parity"]["passed"]
        assert engine["parity"]["relative_error"] < engine["parity"]["limit"] == 1e-4
        assert set(engine["precision_found"]) == {"fp32"}
        assert engine["opset"] == 20
        assert engine["size_bytes"] == (exported.root / engine["files"][0]).stat().st_size


def test_inputs_and_outputs_are_recorded_with_axes_and_ranges(exported: Bundle) -> None:
    values: dict[str, dict[str, Any]] = {
        engine["component"]: {value["name"]: value for value in (*engine["inputs"], *engine["outputs"])}
        for engine in exported.data["engines"]
    }
    assert values["unet"]["sample"] == {
        "name": "sample",
        "dtype": "float32",
        "shape": ["batch", 4, "height", "width"],
        "range": None,
    }
    assert values["unet"]["timestep"]["range"] == [0, 999]
    assert values["text_encoder"]["input_ids"]["shape"] == ["batch", "sequence"]
    assert values["vae_decoder"]["latent"]["shape"] == ["batch", 4, "H/4", "W/4"]
    assert values["vae_decoder"]["image"]["shape"] == ["batch", 3, "H", "W"]
    assert values["vae_encoder"]["image"]["range"] == [-1, 1]
    assert list(values["vae_encoder"]) == ["image", "latent_mean", "latent_logvar"]


def test_probes_are_real_and_differ_in_every_axis(exported: Bundle) -> None:
    total = 0
    for component in COMPONENTS:
        path = exported.root / "probes" / f"{component}.safetensors"
        total += path.stat().st_size
        probes = read_probes(path)
        assert len({probe.describe() for probe in probes}) >= 3
        for probe in probes:
            for value in (*probe.inputs.values(), *probe.outputs.values()):
                assert np.isfinite(value).all()
                assert len(np.unique(value)) > 1 or value.dtype == np.int64
        engine = OnnxRuntimeEngine(exported.root / "engines" / f"{component}-fp32.onnx", threads=1)
        assert compare_outputs(engine, probes, 1e-4).passed
    assert total < 1_000_000
    timesteps = [probe.inputs["timestep"] for probe in read_probes(exported.root / "probes" / "unet.safetensors")]
    assert len({int(value) for array in timesteps for value in array}) >= 3
    assert any(len(set(array.tolist())) > 1 for array in timesteps)  # two timesteps in one batch
    assert {len(array) for array in timesteps} >= {1, 2, 3, 4}


def test_it_draws_what_torch_draws(exported: Bundle, reference: Path) -> None:
    options: dict[str, Any] = {"seed": [3, 4], "steps": 4, "size": (32, 48)}
    ours = load(exported.root, threads=1)(["sun", "cat face"], **options)
    torchs = torch_pipeline(load_reference(reference), threads=1)(["sun", "cat face"], **options)
    assert ours.shape == (2, 32, 48, 3)
    assert np.abs(ours.astype(int) - torchs.astype(int)).max() <= 1


def test_a_wrong_export_leaves_nothing_behind(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export_another(module: nn.Module, *arguments: Any, **options: Any) -> None:
        with torch.no_grad():
            module.get_parameter("norm.bias").add_(0.1)
        export_module(module, *arguments, **options)

    monkeypatch.setattr(traced, "export_module", export_another)
    with pytest.raises(ParityError, match="engine text_encoder-fp32-onnxruntime-cpu differs from the"):
        export_source(reference, tmp_path / "bundle", components=["text_encoder"], threads=1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_built_is_said(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(StageMissingError, match="'bf16' is not built for onnxruntime-cpu; there is: fp32, fp16"):
        export_source(reference, tmp_path / "out", variants=[("bf16", "onnxruntime-cpu")])
    with pytest.raises(StageMissingError, match="'coreml-cpu' is not built yet; there is: onnxruntime-cpu"):
        export_source(reference, tmp_path / "out", variants=[("fp32", "coreml-cpu")])
    with pytest.raises(ConfigError, match="'decoder' is not in this model; there are: text_encoder, unet"):
        export_source(reference, tmp_path / "out", components=["decoder"])


def test_half_precision_is_half_the_size_and_proven(reference: Path, tmp_path: Path) -> None:
    variants = [
        ("fp32", "onnxruntime-cpu"),
        ("fp16", "onnxruntime-cpu"),
        ("bf16", "openvino-cpu"),
    ]
    bundle = export_source(reference, tmp_path / "bundle", variants=variants, components=["unet"], threads=1)
    verify_bundle(bundle.root)
    engines = {engine["id"]: engine for engine in bundle.data["engines"]}
    wide, narrow = engines["unet-fp32-onnxruntime-cpu"], engines["unet-fp16-onnxruntime-cpu"]
    assert 0.4 < narrow["size_bytes"] / wide["size_bytes"] < 0.75
    assert 1e-5 < narrow["parity"]["relative_error"] < narrow["parity"]["limit"] == 5e-3
    assert set(narrow["precision_found"]) == {"fp32"}  # what ONNX Runtime's CPU computes in
    assert narrow["narrowed"]["limit"] == 65504
    assert len(narrow["narrowed"]["largest"]) == 20
    assert "narrowed" not in wide
    refused = {entry["name"] for entry in bundle.data["refused"]}
    if "unet-bf16-openvino-cpu" in engines:
        assert set(engines["unet-bf16-openvino-cpu"]["precision_found"]) == {"bf16"}
        assert refused == set()
    else:
        assert refused == {"unet-bf16-openvino-cpu"}  # a CPU without bf16: said, with the reason
