"""A reference with random weights, for every test that exports one or distils from one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ldm_deploy.config import PRESETS, Config
from ldm_deploy.models.reference import build_modules, describe, read_model, save_reference
from tests.tiny_bundle import CONTEXT_LENGTH, VOCABULARY, write_tokenizer

TEXT_ENCODER = {
    "vocab_size": VOCABULARY,
    "context_length": CONTEXT_LENGTH,
    "width": 32,
    "layers": 1,
    "head_channels": 16,
}


def write_tiny_reference(directory: Path, config: Config = PRESETS["tiny"]) -> Path:
    """The same weights every time; residual branches, which start as zero, are random, too. `directory` is there."""
    write_tokenizer(directory / "tokenizer.json")
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
