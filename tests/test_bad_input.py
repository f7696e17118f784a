"""Each bad input of the command line: one line that says what, with the remedy, and the exit code of its kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tiny_bundle import write_tiny_bundle

Cli = Callable[..., Any]


@pytest.fixture(scope="session")
def pristine_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def bundle(pristine_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = bundle / "bundle.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def check(done: Any, code: int, *parts: str) -> None:
    assert done.code == code, done
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    for part in parts:
        assert part in done.err


# Data


def image_folder(folder: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir()
    for name in names:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / name)
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},a dot\n" for name in names))
    return folder


def train(cli: Cli, data: object, tmp_path: Path) -> Any:
    done = cli("train", "tiny", "--data", data, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return done


def test_missing_data(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    check(train(ldm_deploy_cli, tmp_path / "none", tmp_path), 1, "does not exist; give a folder, a zip file, or")


def test_empty_folder(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    check(train(ldm_deploy_cli, tmp_path / "images", tmp_path), 1, "has no metadata.csv")


def test_folder_without_images(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", ())
    check(train(ldm_deploy_cli, folder, tmp_path), 1, "holds no images; metadata.csv needs")


def test_image_that_does_not_open(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", ("a.png", "b.png"))
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:40])
    check(train(ldm_deploy_cli, folder, tmp_path), 1, "b.png does not open", "repair it or remove it")


def test_image_that_is_not_there(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", ("a.png", "b.png"))
    (folder / "b.png").unlink()
    check(train(ldm_deploy_cli, folder, tmp_path), 1, "b.png is in metadata.csv and not in the folder")


def test_archive_that_is_cut_off(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("metadata.csv", "file_name,text\n" + "x" * 1000)
    content = (tmp_path / "images.zip").read_bytes()
    (tmp_path / "images.zip").write_bytes(content[: len(content) // 2])
    check(train(ldm_deploy_cli, tmp_path / "images.zip", tmp_path), 1, "neither a folder nor a readable zip file; give")


def test_unknown_preset(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    done = ldm_deploy_cli("train", "tinny", "--out", tmp_path / "out")
    check(done, 2, "'tinny' is no file and no preset; presets: reference")


def test_unknown_reference(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    done = ldm_deploy_cli("optimize", tmp_path / "none", "--out", tmp_path / "out")
    check(done, 1, "is no model", "give 'reference', 'pruned' or 'few-steps' (the shipped ones), a directory")


# Requests


def sample(cli: Cli, bundle: Path, *arguments: object, prompt: str = "sun") -> Any:
    image = bundle.parent / "image.png"
    done = cli("sample", bundle, prompt, "--out", image, "--steps", 1, *arguments)
    assert image.exists() == (done.code == 0)
    return done


def test_a_good_request_is_served(ldm_deploy_cli: Cli, bundle: Path) -> None:
    """The damage below is what makes the difference."""
    assert sample(ldm_deploy_cli, bundle).code == 0
    assert ldm_deploy_cli("verify", bundle).code == 0
    assert ldm_deploy_cli("inspect", bundle).code == 0


def test_prompt_longer_than_the_context(ldm_deploy_cli: Cli, bundle: Path) -> None:
    done = sample(ldm_deploy_cli, bundle, prompt=" ".join(["sun"] * 100))
    check(done, 2, "has 100 tokens; the model takes ", "at most: shorten it")


def test_size_that_is_no_multiple(ldm_deploy_cli: Cli, bundle: Path) -> None:
    multiple = json.loads((bundle / "bundle.json").read_text())["model"]["size_multiple"]
    check(sample(ldm_deploy_cli, bundle, "--size", f"{multiple}x{multiple + 1}"), 2, f"multiple of {multiple}")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "steps is 0; allowed: 1 to 1000"),
        ("--steps", "5000", "steps is 5000; allowed: 1 to 1000"),
        ("--guidance-scale", "nan", "guidance_scale is nan; give a number of 0 or more"),
    ],
)
def test_request_out_of_range(ldm_deploy_cli: Cli, bundle: Path, option: str, value: str, message: str) -> None:
    check(sample(ldm_deploy_cli, bundle, option, value), 2, message)


def test_unknown_variant(ldm_deploy_cli: Cli, bundle: Path) -> None:
    name = json.loads((bundle / "bundle.json").read_text())["default_variant"]
    check(sample(ldm_deploy_cli, bundle, "--engine", "int3-abacus"), 2, "int3-abacus", name)


# Bundles


def some_engine(bundle: Path) -> Path:
    return max((bundle / "engines").iterdir(), key=lambda file: file.stat().st_size)


def flip_a_byte(bundle: Path) -> tuple[str, ...]:
    file = some_engine(bundle)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    return (file.name,)


def truncate(bundle: Path) -> tuple[str, ...]:
    file = some_engine(bundle)
    os.truncate(file, file.stat().st_size - 1)
    return (file.name,)


def remove(bundle: Path) -> tuple[str, ...]:
    file = some_engine(bundle)
    file.unlink()
    return (file.name,)


def add(bundle: Path) -> tuple[str, ...]:
    (bundle / "engines" / "extra.onnx").touch()
    return ("extra.onnx",)


def newer_format(bundle: Path) -> tuple[str, ...]:
    edit(bundle, lambda data: data.update(format=2))
    return ("format 2", "format 1", "upgrade")


def relative_path_out(bundle: Path) -> tuple[str, ...]:
    shutil.move(bundle / "tokenizer.json", bundle.parent / "tokenizer.json")
    edit(bundle, lambda data: data["files"].update({"../tokenizer.json": data["files"].pop("tokenizer.json")}))
    return ("../tokenizer.json",)


def absolute_path(bundle: Path) -> tuple[str, ...]:
    edit(bundle, lambda data: data["files"].update({"/etc/hostname": data["files"].pop("tokenizer.json")}))
    return ("/etc/hostname",)


def link_out(bundle: Path) -> tuple[str, ...]:
    shutil.move(bundle / "tokenizer.json", bundle.parent / "tokenizer.json")
    (bundle / "tokenizer.json").symlink_to("../tokenizer.json")
    return ("tokenizer.json", "leaves the bundle")


def not_json(bundle: Path) -> tuple[str, ...]:
    (bundle / "bundle.json").write_text('{"format": 1,')
    return ("bundle.json",)


def no_bundle_json(bundle: Path) -> tuple[str, ...]:
    (bundle / "bundle.json").unlink()
    return ("bundle.json",)


DAMAGE = (
    flip_a_byte, truncate, remove, add, newer_format, relative_path_out, absolute_path, link_out, not_json,
    no_bundle_json,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["verify", "inspect", "sample", "bench"])
def test_damaged_bundle(
    ldm_deploy_cli: Cli, bundle: Path, damage: Callable[[Path], tuple[str, ...]], command: str
) -> None:
    parts = damage(bundle)
    done = sample(ldm_deploy_cli, bundle) if command == "sample" else ldm_deploy_cli(command, bundle)
    check(done, 1, *parts, "; ")


def test_no_bundle_at_all(ldm_deploy_cli: Cli, tmp_path: Path) -> None:
    check(ldm_deploy_cli("verify", tmp_path / "none"), 1, str(tmp_path / "none"))
    (tmp_path / "file").touch()
    check(ldm_deploy_cli("verify", tmp_path / "file"), 1, str(tmp_path / "file"))


# Budgets


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("format = 1\n[default]\npsnr_db_mim = 30\n", ("psnr_db_mim", "psnr_db_min")),
        ("format = 1\n[default]\npsnr_db_min = 'high'\n", ("psnr_db_min", "'high'")),
        ("format = 2\n", ("format", "2")),
        ("format = \n", ("TOML",)),
    ],
)
def test_wrong_budget(ldm_deploy_cli: Cli, bundle: Path, text: str, parts: tuple[str, ...]) -> None:
    limits = bundle.parent / "limits.toml"
    limits.write_text(text)
    check(ldm_deploy_cli("eval", bundle, "--budget", limits), 2, "limits.toml", *parts)


def test_missing_budget(ldm_deploy_cli: Cli, bundle: Path) -> None:
    check(ldm_deploy_cli("eval", bundle, "--budget", bundle.parent / "none.toml"), 2, "none.toml")


# Stored results


STORED: dict[str, Any] = {
    "format": 1, "created": "2026-01-01T00:00:00+00:00", "variants": [],
    "source": {"name": "tiny", "digest": "sha256:" + "0" * 64},
    "protocol": {"threads": 1}, "machine": {"fingerprint": "sha256:0", "cpu": "x", "versions": {}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"format": 2}, ("has format 2; this version reads format 1: store a new result",)),
        ({"variants": [{"name": "x"}]}, ("is damaged", "restore it")),
        (
            {"source": {"name": "tiny", "digest": "sha256:" + "1" * 64}},
            ("is of another model (sha256:11", "store a new"),
        ),
        ({}, ("was drawn with prompts_sha256 None, and this run with ", "store a new result")),
    ],
)
def test_wrong_stored_result(ldm_deploy_cli: Cli, bundle: Path, change: dict[str, Any], parts: tuple[str, ...]) -> None:
    stored = bundle.parent / "stored.json"
    stored.write_text(json.dumps(STORED | change))
    check(ldm_deploy_cli("eval", bundle, "--against", stored), 1, "stored.json", *parts)


def test_cut_off_and_missing_stored_result(ldm_deploy_cli: Cli, bundle: Path) -> None:
    stored = bundle.parent / "stored.json"
    stored.write_text(json.dumps(STORED)[:50])
    check(ldm_deploy_cli("eval", bundle, "--against", stored), 1, "stored.json is damaged")
    stored.unlink()
    check(ldm_deploy_cli("eval", bundle, "--against", stored), 1, "stored.json cannot be read: No such file")


# The machine


def test_full_disk(ldm_deploy_cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old image stays, and nothing half-written is left beside it."""
    image = bundle.parent / "image.png"
    assert sample(ldm_deploy_cli, bundle).code == 0
    before, names = image.read_bytes(), sorted(os.listdir(bundle.parent))

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    done = ldm_deploy_cli("sample", bundle, "sun", "--out", image, "--steps", 2)
    check(done, 1, "full", "free")
    assert image.read_bytes() == before
    assert sorted(os.listdir(bundle.parent)) == names


def test_really_full_disk(bundle: Path, tmp_path: Path) -> None:
    """A file system of 16 KiB, where the machine lets us have one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=16k none {disk} && cat /dev/zero > {disk}/ballast; touch {disk}/file"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    call = f"{sys.executable} -m ldm_deploy sample {bundle} sun --steps 1 --out {disk}/image.png"
    command = ["unshare", "-rm", "sh", "-c", f"{mount}; {call}; code=$?; ls {disk}; exit $code"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert done.stdout.split() == ["ballast", "file"]
    errors = [line for line in done.stderr.splitlines() if not line.startswith("cat: ")]
    assert len(errors) == 1
    assert "full" in errors[0]


def test_ctrl_c(bundle: Path) -> None:
    """A real signal in the middle of real work."""
    image = bundle.parent / "image.png"
    command = [sys.executable, "-m", "ldm_deploy", "sample", str(bundle), "sun", "--out", str(image)]
    command += ["--steps", "1000", "--size", "2048x2048"]  # minutes, on any machine

    def heed() -> None:  # a shell lets its background jobs ignore Ctrl-C, and their children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as child:
        try:
            assert child.stderr is not None
            assert "drawing: " in child.stderr.readline()
            child.send_signal(signal.SIGINT)
            message = child.stderr.read()
            assert child.wait(60) == 130
        finally:
            child.kill()
    assert message == "interrupted; run the same command again\n"
    assert sorted(os.listdir(bundle.parent)) == ["bundle"]
