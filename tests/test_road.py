"""Models of other kinds go down the same road: trained, exported, quantized, evaluated, bundled, drawn with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm_deploy
from ldm_deploy.config import PRESETS, AutoencoderConfig, Config, UNetConfig
from ldm_deploy.errors import PromptError
from ldm_deploy.optimize import optimize
from ldm_deploy.training.train import train

pytestmark = pytest.mark.timeout(900)

BUDGET = """
format = 1
[default]
psnr_db_min = 10.0
required = ["psnr_db_min"]
[parity]
int8 = 0.5
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of three classes."""
    path = tmp_path / "data"
    path.mkdir()
    lines = ["file_name,label"]
    for index in range(12):
        name = ("red", "green", "blue")[index % 3]
        image = np.zeros((32, 32, 3), np.uint8)
        image[8:24, 8:24, index % 3] = 200 + index
        Image.fromarray(image).save(path / f"{index}.png")
        lines.append(f"{index}.png,{name}")
    (path / "metadata.csv").write_text("\n".join(lines) + "\n")
    return path


def small(**changes: object) -> Config:
    return dataclasses.replace(PRESETS["tiny"], autocast_bf16=False, **changes)  # type: ignore[arg-type]


KINDS = {
    "vq-labels-sd1": small(
        conditioning="labels",
        autoencoder=AutoencoderConfig(8, (1, 2, 2), 1, 4, 8, "sd1", kind="vq", codebook_size=64),
        unet=UNetConfig((16, 32), 1, (1,), (2, 2), 8, "sd1"),
    ),
    "kl-none": small(conditioning="none"),
}


@pytest.mark.parametrize("kind", ["vq-labels-sd1", pytest.param("kl-none", marks=pytest.mark.slow)])
def test_other_kinds_go_down_the_same_road(kind: str, folder: Path, tmp_path: Path) -> None:
    config = KINDS[kind]
    train(config, folder, tmp_path / "model", threads=1)
    (tmp_path / "budget.toml").write_text(BUDGET)
    report = optimize(str(tmp_path / "model"), tmp_path / "bundle", budget=tmp_path / "budget.toml", threads=1)
    statuses = {row["name"]: (row["status"], row["reason"]) for row in report["variants"]}
    assert statuses["fp32-onnxruntime-cpu"] == ("ok", None)
    prompts = {"labels": ["blue", "green", "red"], "none": [""]}[config.conditioning]
    assert report["protocol"]["prompts"] == prompts
    details = json.loads((tmp_path / "bundle.stages" / "quantized-onnxruntime-cpu.calibration.json").read_text())
    assert set(details["prompts"]) <= set(prompts)
    bundle = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    tried = {entry["id"] for entry in bundle["engines"]} | {entry["name"] for entry in bundle["refused"]}
    for component in ("unet", "vae_decoder"):
        assert any(name.startswith(f"{component}-int8-onnxruntime-cpu") for name in tried)
    too_slow = [entry["reason"] for entry in bundle["refused"]]
    assert all("is not faster than" in reason for reason in too_slow)  # nothing was refused for what it computes
    pipeline = ldm_deploy.load(tmp_path / "bundle")
    assert pipeline(prompts, seed=0, steps=2).shape == (len(prompts), 32, 32, 3)
    if config.conditioning == "labels":
        with pytest.raises(PromptError, match="prompt 'a red apple' is none of the classes"):
            pipeline("a red apple", seed=0)
