"""The rate-distortion study on a budget of two steps, and the whole command on a tiny reference."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_deploy.config import PRESETS, AutoencoderConfig, StageConfig
from ldm_deploy.errors import ConfigError, EvaluationError
from ldm_deploy.eval.analysis import analyze, rate_distortion
from ldm_deploy.eval.analysis.analyze import analyze_reference, print_analysis
from ldm_deploy.eval.analysis.page import to_html
from ldm_deploy.eval.analysis.rate_distortion import study_rows
from ldm_deploy.eval.analysis.semantic import GroupClassifier, preservation
from ldm_deploy.training.data import ImageSet
from ldm_deploy.training.train import train


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The study's networks and budget made small: three levels of eight channels, one image a batch."""
    quick = dataclasses.replace(
        PRESETS["tiny"],
        resolution=64,
        autoencoder=AutoencoderConfig(8, (1, 1, 1), 1, 4, 0, "compact"),
        autoencoder_training=StageConfig(4, 2, 1e-3),
        autocast_bf16=False,
    )
    monkeypatch.setitem(PRESETS, "quick", quick)
    monkeypatch.setattr(rate_distortion, "LATENCY_ROUNDS", 5)
    monkeypatch.setattr(rate_distortion, "GroupClassifier", functools.partial(GroupClassifier, steps=5))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def coloured(count: int = 40) -> ImageSet:
    draw = np.random.default_rng(0)
    groups = ["warm", "cold"] * (count // 2)
    base = np.array([[200, 40, 30] if group == "warm" else [30, 60, 210] for group in groups], np.uint8)
    noise = draw.integers(0, 40, (count, 64, 64, 3), dtype=np.uint8)
    held_out = np.arange(count) < 8
    return ImageSet(base[:, None, None] + noise, groups, groups, held_out, np.zeros(count, bool), "sha256:d", groups)


def test_rows_differ_in_what_their_names_say() -> None:
    rows = {row.name: row for row in study_rows(PRESETS["quick"], 100, None)}
    assert len(rows) == 10
    for name, row in rows.items():
        factor, z = map(int, re.findall(r"^f(\d+)-z(\d+)", name)[0])
        assert (row.config.autoencoder.downsampling, row.config.autoencoder.z_channels) == (factor, z)
        assert row.config.autoencoder_training.steps == 100
        assert (row.config.autoencoder_loss.perceptual_weight > 0) == (row.study != "rate")
        assert (row.config.autoencoder_loss.gan_weight > 0) == (row.study == "discriminator")
    starts = [row.config.autoencoder_loss.disc_start for row in rows.values() if row.study == "discriminator"]
    assert starts == [0, 25, 50]
    with pytest.raises(ConfigError, match="the number of steps per row is 0; give 1 or more"):
        study_rows(PRESETS["quick"], 0, None)


@pytest.mark.slow
def test_rows_without_lpips_say_so_and_the_others_are_measured_and_kept(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpips = rate_distortion.Lpips()
    lpips.reason = "no weights here"
    monkeypatch.setattr(rate_distortion, "Lpips", lambda *backbone: lpips)
    trained: list[str] = []
    train_row = rate_distortion._train

    def counted(config, images, directory):
        trained.append(directory.name)
        return train_row(config, images, directory)

    monkeypatch.setattr(rate_distortion, "_train", counted)
    found = rate_distortion.rate_distortion(coloured(), tmp_path, 2)
    assert [row["reason"] for row in found["rows"]] == [None] * 6 + ["no weights here"] * 4
    assert len(trained) == 6
    for row in found["rows"][:6]:
        assert row["psnr_db"] > 0
        assert row["lpips"] is None
        assert 0 <= row["semantic"]["accuracy"] <= 1
        assert row["latency_ms"]["unet"]["samples"] == 5
        assert row["unet_peak_bytes"] > 0
    by_name = {row["name"]: row for row in found["rows"]}
    assert by_name["f16-z4"]["latent_shape"] == [4, 4, 4]
    assert by_name["f4-z16"]["compression"] == 3
    assert by_name["f16-z4"]["unet_times_lower"] > by_name["f8-z4"]["unet_times_lower"] > 20
    again = rate_distortion.rate_distortion(coloured(), tmp_path, 2)
    assert len(trained) == 6  # nothing is trained twice
    assert [row.get("psnr_db") for row in again["rows"]] == [row.get("psnr_db") for row in found["rows"]]


def test_a_reconstruction_that_lost_its_meaning_is_noticed() -> None:
    images = coloured()
    classifier = GroupClassifier(images.images, images.groups, steps=30)
    same = preservation(classifier, images.images, images.images, images.groups)
    assert (same["accuracy"], same["agreement"]) == (1, 1)
    swapped = preservation(classifier, images.images, images.images[..., ::-1], images.groups)
    assert (swapped["accuracy_originals"], swapped["accuracy"], swapped["agreement"]) == (1, 0, 0)
    with pytest.raises(ValueError, match="needs two labels or more"):
        GroupClassifier(images.images, ["one"] * 40)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reference") / "model"
    train(dataclasses.replace(PRESETS["tiny"], autocast_bf16=False), "photos", directory, threads=1)
    return directory


def test_the_command_writes_a_page_and_plain_data(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(analyze, "RESOLUTIONS", (64,))
    monkeypatch.setattr(analyze, "MOST_IMAGES", 24)
    result = analyze_reference(reference, "photos", tmp_path / "out", threads=1)
    assert json.loads((tmp_path / "out" / "analysis.json").read_text()) == json.loads(json.dumps(result))
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert page.count("<svg") == 3
    assert "http://" not in re.sub(r'xmlns\S*="[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>', "", page, flags=re.S)
    assert len(result["latent_space"]["map"]["points"]) == 24
    print_analysis(result)
    shown = capsys.readouterr().out
    assert "latents 4x8x8 of 24 images" in shown
    assert re.search(r"unet at 32: \S+ GFLOP, \S+ MB of activations; predicted within \d\.\d% of what was", shown)
    assert "rate-distortion: not measured: it trains ten small autoencoders; ask for it with --study-steps" in shown


def test_the_page_shows_the_study_beside_the_claim(
    reference: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analyze, "RESOLUTIONS", ())
    monkeypatch.setattr(analyze, "MOST_IMAGES", 8)
    lpips = rate_distortion.Lpips()
    lpips.reason = "no weights here"
    monkeypatch.setattr(rate_distortion, "Lpips", lambda *backbone: lpips)
    result = analyze_reference(reference, "photos", tmp_path / "out", threads=1)
    monkeypatch.setattr(rate_distortion, "FACTORS", (4,))
    monkeypatch.setattr(rate_distortion, "CLASSIC_CLAIM", {4: ("above 30", 16)})
    study = rate_distortion.rate_distortion(coloured(), tmp_path / "rows", 2)
    page = to_html({**result, "rate_distortion": study}, np.zeros((1, 2, 8, 8, 3), np.uint8))
    assert page.count("<svg") == 4
    assert "<td>f4-z16</td>" in page
    assert "no weights here" in page
    assert "<td>above 30</td>" in page


def test_a_file_is_not_overwritten_by_a_directory(reference: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EvaluationError, match="is a file and a directory is to be written; give another --out"):
        analyze_reference(reference, "photos", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
