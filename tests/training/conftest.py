"""References with random weights, to distil from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm_deploy.config import PRESETS
from ldm_deploy.models.reference import build_modules, describe, read_model, save_reference
from tests.tiny_bundle import CONTEXT_LENGTH, VOCABULARY, write_tokenizer

TEXT_ENCODER = {
    "vocab_size": VOCABULARY,
    "context_length": CONTEXT_LENGTH,
    "width": 32,
    "layers": 1,
    "head_channels": 16,
}


@pytest.fixture
def make_teacher(tmp_path: Path) -> Callable[..., Path]:
    """`make_teacher(autoencoder=..., unet=...)` -> a directory like the preset `tiny` with these sections changed;
    residual branches, which start as zero, are random, too."""

    def make(**sections: Any) -> Path:
        directory = tmp_path / "teacher"
        directory.mkdir()
        write_tokenizer(directory / "tokenizer.json")
        config = dataclasses.replace(PRESETS["tiny"], **sections)
        model = describe(config, 0.7, TEXT_ENCODER, {"report": ["one"], "calibration": ["two"]})
        save_reference(directory, model, {"autoencoder": {}, "text_encoder": {}, "unet": {}})
        torch.manual_seed(0)
        modules = build_modules(read_model(directory))
        for module in modules.values():
            for parameter in module.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
        save_reference(directory, model, {name: module.state_dict() for name, module in modules.items()})
        return directory

    return make
