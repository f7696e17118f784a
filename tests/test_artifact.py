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
    check_replaceable,
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


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    file = tmp_path / "f"
    atomic_write_bytes(file, b"old")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(ArtifactError) as caught:
            patch.setattr(os, call, full)
            atomic_write_bytes(file, b"new!")
        assert str(caught.value) == (
            f"the disk is full while writing {file} (4 bytes needed); nothing there was changed: "
            "free some space and run the same command again"
        )
        assert file.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["f"]


def test_places_that_cannot_be_written_are_explained(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="is a directory; give the name of a file"):
        atomic_write_bytes(tmp_path, b"")
    with pytest.raises(ArtifactError, match=r"a part of .*file/x is a file, not a directory; choose another place"):
        atomic_write_bytes(tmp_path / "file" / "x", b"")
    with (
        pytest.raises(ArtifactError, match="file is a file and a directory is to be written; choose another place"),
        staged_directory(tmp_path / "file"),
    ):
        pass

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/where")

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(ArtifactError, match=r"/some/where cannot be used \(Permission denied\); choose another place"):
        atomic_write_bytes(tmp_path / "g", b"")
    monkeypatch.setattr(os, "fsync", busy)
    mount_point = "out cannot be replaced, as a mount point cannot; choose a directory inside it"
    with pytest.raises(ArtifactError, match=mount_point), staged_directory(tmp_path / "out"):
        pass


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    os.symlink("/dev/null", tmp_path / "sink")
    atomic_write_bytes(tmp_path / "sink", b"gone")
    assert os.listdir(tmp_path) == ["sink"]
    assert os.path.samefile(tmp_path / "sink", "/dev/null")
    os.symlink("/dev/full", tmp_path / "overflowing")
    with pytest.raises(ArtifactError, match=r"the disk is full while writing .*overflowing \(4 bytes needed\)"):
        atomic_write_bytes(tmp_path / "overflowing", b"gone")


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(tmp_path / "j", {"x": float("nan")})
    assert not (tmp_path / "j").exists()


def test_staged_directory_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_directory(out) as staging:
        (staging / "manifest.json").write_text("1")
        assert not out.exists()
    assert (out / "manifest.json").read_text() == "1"
    with pytest.raises(ZeroDivisionError), staged_directory(out) as staging:
        (staging / "b").write_text("2")
        1 / 0  # noqa: B018
    assert os.listdir(out) == ["manifest.json"]
    with staged_directory(out) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "c").write_text("3")
        (staging / "link").symlink_to("sub/c")
    assert sorted(os.listdir(out)) == ["link", "sub"]
    assert os.listdir(out.parent) == ["out"]


def test_somebody_elses_directory_is_never_replaced(tmp_path):
    """`--out ~` must not cost a home directory; neither may a name that means something to `glob`."""
    (tmp_path / "thesis.tex").write_text("years")
    foreign = r"was not written by ldm-deploy \(it holds 'thesis\.tex'\); choose a new or empty directory"
    with pytest.raises(ArtifactError, match=foreign), staged_directory(tmp_path):
        raise AssertionError("the block must not start")
    with pytest.raises(ArtifactError, match="not written by ldm-deploy"):
        check_replaceable(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years"
    (tmp_path / "[a]").mkdir()
    with staged_directory(tmp_path / "[a]") as staging:
        (staging / "bundle.json").touch()
    assert sorted(os.listdir(tmp_path)) == ["[a]", "thesis.tex"]


def test_a_linked_directory_stays_a_link(tmp_path):
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "out").symlink_to("big-disk")
    for _ in range(2):
        with staged_directory(tmp_path / "out") as staging:
            (staging / "bundle.json").touch()
    assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "big-disk") == ["bundle.json"]
    assert sorted(os.listdir(tmp_path)) == ["big-disk", "out"]


def test_a_failed_swap_puts_the_old_directory_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with staged_directory(out) as staging:
        (staging / "bundle.json").write_text("old")
    replace = os.replace

    def second_fails(source, target):
        if target == out and "staging" in str(source):
            full()
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(ArtifactError, match="the disk is full"), staged_directory(out) as staging:
        (staging / "bundle.json").write_text("new")
    assert (out / "bundle.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("1000 requested and 10 written"),  # numpy's tofile
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_a_full_disk_is_known_by_every_librarys_words(tmp_path, error):
    message = r"the disk is full while writing .*out; .* run the same command again"
    with pytest.raises(ArtifactError, match=message), staged_directory(tmp_path / "out"):
        raise error
    assert os.listdir(tmp_path) == []


def killed_when_ready(script, *arguments):
    """Start a process, wait until it prints a line, and kill it without a chance to clean up."""
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return process.pid


def test_killed_writer_leaves_the_old_directory_and_the_next_one_sweeps(tmp_path):
    out = tmp_path / "out"
    with staged_directory(out) as staging:
        (staging / "bundle.json").write_text("old")
    script = (
        "import sys, time; from pathlib import Path; from ldm_deploy.artifact import staged_directory\n"
        "with staged_directory(Path(sys.argv[1])) as staging:\n"
        "    (staging / 'bundle.json').write_text('new'); print('ready', flush=True); time.sleep(60)\n"
    )
    killed_when_ready(script, out)
    assert (out / "bundle.json").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2  # the dead writer's staging directory is still there
    with staged_directory(out) as staging:
        (staging / "bundle.json").write_text("newer")
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "bundle.json").read_text() == "newer"


def test_killed_writer_leaves_the_old_file_and_the_next_one_sweeps(tmp_path):
    file = tmp_path / "f"
    atomic_write_bytes(file, b"old")
    script = (
        "import os, sys, time; from pathlib import Path; from ldm_deploy.artifact import atomic_write_bytes\n"
        "def stop(*_):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
        "os.replace = stop\n"
        "atomic_write_bytes(Path(sys.argv[1]), b'new')\n"
    )
    killed_when_ready(script, file)
    assert file.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    living = tmp_path / f".f.part-{os.getppid()}-1"
    living.touch()
    atomic_write_bytes(file, b"newer")
    assert file.read_bytes() == b"newer"
    assert sorted(os.listdir(tmp_path)) == [living.name, "f"]  # what a living process is writing is left alone


def test_death_between_the_two_renames_brings_the_old_directory_back(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    old = tmp_path / f".out.old-{process.pid}"
    old.mkdir()
    (old / "bundle.json").write_text("old")
    with pytest.raises(ZeroDivisionError), staged_directory(tmp_path / "out"):
        1 / 0  # noqa: B018
    assert (tmp_path / "out" / "bundle.json").read_text() == "old"


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
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ArtifactError, match="has no list of files"):
        read_manifest(tmp_path)


def test_two_processes_do_not_write_one_directory(tmp_path):
    """The second is refused before it does any work; the first is not disturbed, and a dead one is no hindrance."""
    writer = (
        "import sys; from pathlib import Path; from ldm_deploy.artifact import staged_directory\n"
        "with staged_directory(Path(sys.argv[1])) as staging:\n"
        "    (staging / 'bundle.json').write_text('first')\n"
        "    print('writing', flush=True); sys.stdin.readline()\n"
    )
    arguments = [sys.executable, "-c", writer, str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "writing\n"
        with (
            pytest.raises(ArtifactError, match=rf"out is being written by process {other.pid}; wait for it, or choose"),
            staged_directory(tmp_path / "out"),
        ):
            pytest.fail("two at once")
        other.communicate("\n")
    assert other.returncode == 0
    assert (tmp_path / "out" / "bundle.json").read_text() == "first"
    with staged_directory(tmp_path / "out") as staging:
        (staging / "bundle.json").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
