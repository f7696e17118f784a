"""Exports through the cache: the same again costs nothing, one weight, one byte or one option costs an export."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_deploy.cache import Cache
from ldm_deploy.export import export, foreign
from ldm_deploy.export.export import export_source
from ldm_deploy.export.foreign import export_function
from ldm_deploy.runtime.bundle import verify_bundle


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every export that is really done."""
    calls: list[str] = []

    def counted(module: Any) -> None:
        inner = module._export

        def call(*arguments: Any) -> None:
            calls.append(module.__name__)
            inner(*arguments)

        monkeypatch.setattr(module, "_export", call)

    counted(export)
    counted(foreign)
    return calls


def test_a_source_is_exported_once_for_each_content_and_option(
    reference: Path, tmp_path: Path, cache: Cache, built: list[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(reference, mine)

    def run(name: str, **options: Any) -> int:
        given: dict[str, Any] = {"components": ["text_encoder"], "threads": 1, **options}
        verify_bundle(export_source(mine, tmp_path / name, cache=cache, **given).root)
        return len(built)

    assert run("first") == 1
    assert run("same") == 1
    assert run("other_seed", seed=1) == 2
    assert run("other_precision", variants=[("fp16", "onnxruntime-cpu")]) == 3
    weights = load_file(mine / "text_encoder.safetensors")
    weights[max(weights)].view(-1)[-1] += 1e-3
    save_file(weights, mine / "text_encoder.safetensors")
    assert run("one_weight") == 4
    assert run("one_weight_again") == 4


class Scaled(nn.Module):
    """Computes with a weight, and with a number that is no parameter."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale = nn.Linear(4, 4), scale

    def forward(self, value: Tensor) -> Tensor:
        return self.linear(value) * self.scale


MODEL = """
import torch
from tests.export.test_export_cache import Scaled
from their_numbers import SCALE, EXAMPLE

def make():
    return Scaled(SCALE), {"value": torch.full((2, 4), EXAMPLE)}, {"value": {0: "batch"}}
"""


def test_a_function_is_exported_once_for_each_content_and_option(
    tmp_path: Path, cache: Cache, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "their_model.py").write_text(MODEL)

    def run(name: str, numbers: str = "SCALE, EXAMPLE = 2.0, 0.5", target: str = "onnxruntime-cpu") -> int:
        (tmp_path / "their_numbers.py").write_text(numbers)
        for module in ("their_model", "their_numbers"):
            sys.modules.pop(module, None)
        verify_bundle(
            export_function("their_model:make", "unet", tmp_path / name, target=target, threads=1, cache=cache).root
        )
        return len(built)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert run("first") == 1
    assert run("same") == 1
    assert run("other_target", target="openvino-cpu") == 2
    assert run("other_number", "SCALE, EXAMPLE = 3.0, 0.5") == 3
    assert run("other_example", "SCALE, EXAMPLE = 2.0, 0.25") == 4
    assert run("other_code", "SCALE, EXAMPLE = 2.0, 0.5  # as before") == 5
    assert run("same_again") == 5
