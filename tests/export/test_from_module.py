"""Targets that are made of the torch module: no ONNX graph is written on the way, by either road."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from ldm_deploy.export import targets
from ldm_deploy.export.export import export_source
from ldm_deploy.export.foreign import export_function
from ldm_deploy.export.to_onnx import export_module
from ldm_deploy.export.traced import Traced, largest
from ldm_deploy.runtime.bundle import verify_bundle


@pytest.fixture(autouse=True)
def made_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As AOTInductor's target, with a runtime that is quick to build for."""

    def build(traced: Traced, precision: str, stem: Path) -> targets.Built:
        path = stem.with_name(f"{stem.name}.onnx")
        module = traced.module_in(precision)
        export_module(module, largest(traced.probes).inputs, *traced.axes, path, component=traced.component)
        return targets.Built([path], precision_found={"fp32": 1})

    target = targets.Target("onnxruntime", "cpu", ">=1.22", (), {"fp32": "fp32"}, build, from_module=True)
    monkeypatch.setattr(targets, "TARGETS", {"onnxruntime-cpu": target})


def test_a_component_of_a_reference(reference: Path, tmp_path: Path) -> None:
    made = export_source(
        reference, tmp_path / "out", variants=[("fp32", "onnxruntime-cpu")], components=["vae_decoder"], threads=1
    )
    verify_bundle(made.root)
    (engine,) = made.data["engines"]
    assert engine["parity"]["passed"]
    assert engine["opset"] is None
    assert sorted(path.name for path in made.root.iterdir()) == ["bundle.json", "engines", "probes", "tokenizer.json"]


def test_a_module_of_somebody_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("their_module")
    module.make = lambda: (nn.Conv2d(3, 4, 1), {"x": torch.rand(2, 3, 4, 5)}, {"x": {0: "n"}})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_module", module)
    made = export_function("their_module:make", "vae_decoder", tmp_path / "out", target="onnxruntime-cpu", threads=1)
    verify_bundle(made.root)
    assert made.data["engines"][0]["parity"]["passed"]
