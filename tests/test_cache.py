"""The cache of exports: what is the same is not made again, what differs in anything is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm_deploy.cache import CONTENT, LARGE_BYTES, RECEIPT, Cache, made_with, user_cache
from ldm_deploy.errors import ArtifactError, ConfigError


class Builder:
    """Writes a directory with a small and a large file, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, out: Path) -> None:
        self.calls += 1
        out.mkdir(parents=True, exist_ok=True)
        (out / "bundle.json").write_text("{}")
        (out / "engines").mkdir(exist_ok=True)
        (out / "engines" / "unet.bin").write_bytes(bytes(LARGE_BYTES))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def entry_of(cache: Cache) -> Path:
    (entry,) = cache.entries()
    return entry.root


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """In place, as an editor or a failing disk would: the file stays the same one."""
    path.chmod(0o644)
    with open(path, "r+b") as file:
        content = change(file.read())
        file.seek(0)
        file.write(content)
        file.truncate()


def test_the_same_is_taken_from_the_cache(cache, tmp_path):
    build = Builder()
    assert not cache.fill(tmp_path / "a", "model", {"weights": "1"}, build)
    assert cache.fill(tmp_path / "b", "model", {"weights": "1"}, build)
    assert build.calls == 1
    assert (tmp_path / "b" / "bundle.json").read_text() == "{}"
    assert (tmp_path / "b" / "engines" / "unet.bin").read_bytes() == bytes(LARGE_BYTES)


def test_other_ingredients_are_built(cache, tmp_path):
    build = Builder()
    cache.fill(tmp_path / "a", "model", {"weights": "1"}, build)
    assert not cache.fill(tmp_path / "b", "model", {"weights": "2"}, build)
    assert build.calls == 2


def test_large_files_take_no_second_room_and_cannot_be_written(cache, tmp_path):
    cache.fill(tmp_path / "a", "model", {}, Builder())
    cache.fill(tmp_path / "b", "model", {}, Builder())
    first, second = (tmp_path / name / "engines" / "unet.bin" for name in "ab")
    assert first.samefile(second)
    assert not first.stat().st_mode & 0o222
    assert not (tmp_path / "a" / "bundle.json").samefile(tmp_path / "b" / "bundle.json")


def test_files_are_copied_where_they_cannot_be_linked(cache, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    build = Builder()
    cache.fill(tmp_path / "a", "model", {}, build)
    assert cache.fill(tmp_path / "b", "model", {}, build)
    assert not (tmp_path / "a" / "engines" / "unet.bin").samefile(tmp_path / "b" / "engines" / "unet.bin")


def test_external_data_is_never_linked(cache, tmp_path):
    def build(out: Path) -> None:
        out.mkdir()
        (out / "unet.onnx.data").write_bytes(bytes(LARGE_BYTES))

    cache.fill(tmp_path / "a", "model", {}, build)
    cache.fill(tmp_path / "b", "model", {}, build)
    assert {(tmp_path / name / "unet.onnx.data").stat().st_nlink for name in "ab"} == {1}


def test_a_directory_that_holds_the_entry_is_left_as_it_is(cache, tmp_path):
    build = Builder()
    cache.fill(tmp_path / "a", "model", {}, build)
    before = (tmp_path / "a" / "bundle.json").stat()
    assert cache.fill(tmp_path / "a", "model", {}, build)
    assert (tmp_path / "a" / "bundle.json").stat() == before
    (tmp_path / "a" / "bundle.json").write_text("[]")
    assert cache.fill(tmp_path / "a", "model", {}, build)
    assert (tmp_path / "a" / "bundle.json").read_text() == "{}"
    assert build.calls == 1


@pytest.mark.parametrize(
    "fault",
    [
        lambda entry: rewrite(entry / CONTENT / "engines" / "unet.bin", lambda old: old[:-1] + b"\1"),
        lambda entry: rewrite(entry / CONTENT / "bundle.json", lambda old: b"[]"),
        lambda entry: (entry / CONTENT / "bundle.json").unlink(),
        lambda entry: (entry / CONTENT / "stray").write_bytes(b""),
        lambda entry: (entry / RECEIPT).write_text("{"),
        lambda entry: (entry / RECEIPT).write_text('{"format": 1, "about": "model", "files": {"bundle.json": {}}}'),
        lambda entry: (entry / RECEIPT).unlink(),
    ],
)
def test_a_damaged_entry_is_made_anew(cache, tmp_path, fault):
    build = Builder()
    cache.fill(tmp_path / "a", "model", {}, build)
    fault(entry_of(cache))
    assert not cache.fill(tmp_path / "b", "model", {}, build)
    assert build.calls == 2
    assert cache.fill(tmp_path / "c", "model", {}, build)
    assert (tmp_path / "c" / "bundle.json").read_text() == "{}"


def test_a_bundle_written_into_spoils_no_later_one(cache, tmp_path):
    build = Builder()
    cache.fill(tmp_path / "a", "model", {}, build)
    rewrite(tmp_path / "a" / "engines" / "unet.bin", lambda old: b"\1" + old[1:])
    assert not cache.fill(tmp_path / "b", "model", {}, build)
    assert (tmp_path / "b" / "engines" / "unet.bin").read_bytes() == bytes(LARGE_BYTES)


def test_touched_files_with_the_same_bytes_are_still_good(cache, tmp_path):
    """As after a cache was restored from an archive."""
    build = Builder()
    cache.fill(tmp_path / "a", "model", {}, build)
    for path in (entry_of(cache) / CONTENT).rglob("*"):
        os.utime(path, (1, 1))
    assert cache.fill(tmp_path / "b", "model", {}, build)


def test_the_least_recently_used_goes_first(tmp_path):
    cache = Cache(tmp_path / "cache", limit_bytes=2 * LARGE_BYTES + 100)
    build = Builder()
    for age, name in enumerate(("old", "older")):
        cache.fill(tmp_path / name, name, {"name": name}, build)
        os.utime(next(e.root for e in cache.entries() if e.about == name) / RECEIPT, (1000 - age, 1000 - age))
    assert cache.fill(tmp_path / "again", "older", {"name": "older"}, build)  # used now
    cache.fill(tmp_path / "new", "new", {"name": "new"}, build)
    assert [entry.about for entry in cache.entries()] == ["new", "older"]


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path):
    cache = Cache(tmp_path / "cache", limit_bytes=LARGE_BYTES)
    cache.fill(tmp_path / "a", "model", {}, Builder())
    assert cache.entries() == []
    assert (tmp_path / "a" / "bundle.json").exists()


def test_a_cache_that_cannot_be_written_costs_the_reuse_only(tmp_path):
    (tmp_path / "cache").write_text("a file")
    build = Builder()
    assert not Cache(tmp_path / "cache").fill(tmp_path / "a", "model", {}, build)
    assert (tmp_path / "a" / "bundle.json").exists()


def test_somebody_elses_directory_is_not_replaced(cache, tmp_path):
    build = Builder()
    cache.fill(tmp_path / "a", "model", {}, build)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ArtifactError, match=r"would be replaced and was not written by ldm-deploy"):
        cache.fill(tmp_path / "mine", "model", {}, build)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_clear_removes_entries_and_nothing_else(cache, tmp_path):
    cache.fill(tmp_path / "a", "model", {}, Builder())
    (cache.root / "notes.txt").write_text("mine")
    assert cache.clear() == LARGE_BYTES + 2
    assert [path.name for path in cache.root.iterdir()] == ["notes.txt"]
    assert (tmp_path / "a" / "engines" / "unet.bin").read_bytes() == bytes(LARGE_BYTES)


def test_key_covers_tools_code_machine_and_threads(monkeypatch):
    before = made_with(2, "sha256:machine")
    assert made_with(2, "sha256:machine") == before
    assert {"torch", "onnxruntime", "openvino", "tensorrt"} <= set(before["versions"])
    assert made_with(1, "sha256:machine") != before
    assert made_with(2, "sha256:other") != before
    monkeypatch.setattr("ldm_deploy.cache.tool_versions", lambda *names: dict.fromkeys(names, "9.9"))
    assert made_with(2, "sha256:machine") != before


def test_the_environment_says_where_and_how_much(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path))
    monkeypatch.setenv("LDM_DEPLOY_CACHE_LIMIT", "1.5GB")
    assert user_cache() == Cache(tmp_path, 1_500_000_000)
    monkeypatch.delenv("LDM_DEPLOY_CACHE")
    monkeypatch.delenv("LDM_DEPLOY_CACHE_LIMIT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == Cache(tmp_path / "xdg" / "ldm-deploy")
    monkeypatch.setenv("LDM_DEPLOY_CACHE_LIMIT", "much")
    with pytest.raises(ConfigError, match=r"LDM_DEPLOY_CACHE_LIMIT is 'much'; give a number of bytes, as 5GB"):
        user_cache()


def test_command_shows_and_clears(ldm_deploy_cli, monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_DEPLOY_CACHE", str(tmp_path / "cache"))
    user_cache().fill(tmp_path / "a", "reference fp32-onnxruntime-cpu", {}, Builder())
    ran = ldm_deploy_cli("cache", "--json", tmp_path / "shown.json")
    assert ran.code == 0
    assert "1.00 MB" in ran.out
    assert "reference fp32-onnxruntime-cpu" in ran.out
    shown = json.loads((tmp_path / "shown.json").read_text())
    assert shown["size_bytes"] == LARGE_BYTES + 2
    assert shown["limit_bytes"] == 20 * 10**9
    ran = ldm_deploy_cli("cache", "--clear")
    assert "freed 1.00 MB" in ran.out
    assert "0 exports" in ran.out


def test_what_runtimes_compile_is_kept_within_a_quarter_of_the_limit(tmp_path):
    cache = Cache(tmp_path / "cache", limit_bytes=400)
    folder = cache.compiled("openvino")
    assert folder is not None
    for age, name in enumerate(["newest", "newer", "oldest"]):
        (folder / name).write_bytes(bytes(45))
        os.utime(folder / name, (1000 - age, 1000 - age))
    assert cache.compiled("openvino") == folder
    assert sorted(path.name for path in folder.iterdir()) == ["newer", "newest"]
    assert cache.compiled_bytes() == 90
    assert cache.clear() == 90
    assert not folder.exists()
    assert Cache(tmp_path / "cache", limit_bytes=0).compiled("openvino") is None


def test_a_place_that_cannot_be_written_costs_the_reuse_only(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert Cache(tmp_path / "cache").compiled("openvino") is None
