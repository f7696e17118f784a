"""A reference that several tests of this folder export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ldm_deploy.config import PRESETS
from ldm_deploy.models.reference import build_modules, describe, read_model, save_reference
from tests.tiny_bundle import CONTEXT_LENGTH, VOCABULARY, write_tokenizer


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset `tiny` with random weights; residual branches, which start as zero, too."""
    directory = tmp_path_factory.mktemp("reference")
    config = PRESETS["tiny"]
    assert config.text_encoder.context_length == CONTEXT_LENGTH
    write_tokenizer(directory / "tokenizer.json")
    torch.manual_seed(0)
    placeholder: dict[str, dict[str, torch.Tensor]] = {"autoencoder": {}, "text_encoder": {}, "unet": {}}
    text_encoder = {"vocab_size": VOCABULARY, "context_length": CONTEXT_LENGTH, "width": 32, "layers": 1}
    model = describe(config, 0.7, {**text_encoder, "head_channels": 16}, {"report": ["one"], "calibration": ["two"]})
    save_reference(directory, model, placeholder)
    modules = build_modules(read_model(directory))
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    save_reference(directory, model, {name: module.state_dict() for name, module in modules.items()})
    return directory
