"""Files and directories are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from ldm_deploy.artifact import (
    atomic_write_bytes,
    atomic_write_json,
    content_key,
    file_digest,
    read_manifest,
    staged_directory,
    verify_manifest,
    write_manifest,
)
from ldm_deploy.errors import ArtifactError


def test_digest_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert file_digest(tmp_path / "abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_content_key_ignores_order_and_sees_every_value():
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    file = tmp_path / "f"
    atomic_write_bytes(file, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="the disk is full while writing .*f; .* free some space"):
        atomic_write_bytes(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(tmp_path / "j", {"x": float("nan")})
    assert not (tmp_path / "j").exists()


def test_staged_directory_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_directory(out) as staging:
        (staging / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    with pytest.raises(ZeroDivisionError), staged_directory(out) as staging:
        (staging / "b").write_text("2")
        1 / 0  # noqa: B018
    assert os.listdir(out) == ["a"]
    with staged_directory(out) as staging:
        (staging / "c").write_text("3")
    assert os.listdir(out) == ["c"]
    assert os.listdir(out.parent) == ["out"]


def test_a_full_disk_while_staging_is_explained(tmp_path):
    with (
        pytest.raises(ArtifactError, match=r"the disk is full while writing .*out; .* run the same command again"),
        staged_directory(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_killed_writer_leaves_the_old_directory_and_the_next_one_sweeps(tmp_path):
    out = tmp_path / "out"
    with staged_directory(out) as staging:
        (staging / "a").write_text("old")
    script = (
        "import sys, time; from pathlib import Path; from ldm_deploy.artifact import staged_directory\n"
        "with staged_directory(Path(sys.argv[1])) as staging:\n"
        "    (staging / 'a').write_text('new'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (out / "a").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2  # the dead writer's staging directory is still there
    with staged_directory(out) as staging:
        (staging / "a").write_text("newer")
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "a").read_text() == "newer"


def test_death_between_the_two_renames_brings_the_old_directory_back(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    old = tmp_path / f".out.old-{process.pid}"
    old.mkdir()
    (old / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), staged_directory(tmp_path / "out"):
        1 / 0  # noqa: B018
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_manifest_names_what_changed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w").write_bytes(b"weights")
    write_manifest(tmp_path, "reference", "sha256:k", {"data": "sha256:d"})
    assert verify_manifest(tmp_path)["parents"] == {"data": "sha256:d"}
    (tmp_path / "sub" / "w").write_bytes(b"Weights")
    with pytest.raises(ArtifactError, match="sub/w is not what was written"):
        verify_manifest(tmp_path)
    (tmp_path / "sub" / "w").unlink()
    with pytest.raises(ArtifactError, match="sub/w is missing"):
        verify_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 9}')
    with pytest.raises(ArtifactError, match="not of format 1"):
        read_manifest(tmp_path)
