"""Stages of `optimize`: reused only when nothing changed, built again after a kill."""

from __future__ import annotations

import pytest

from ldm_deploy.errors import StageMissingError
from ldm_deploy.optimize import _stage, optimize


class Builder:
    """Writes a directory and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, directory):
        self.calls += 1
        directory.mkdir(exist_ok=True)
        (directory / "engine.bin").write_bytes(b"engine")


def test_stage_is_reused_when_nothing_changed(tmp_path):
    build = Builder()
    first = _stage(tmp_path / "onnx", {"model": "a"}, build)
    assert _stage(tmp_path / "onnx", {"model": "a"}, build) == first
    assert build.calls == 1


def test_stage_is_built_again_for_other_ingredients_or_a_changed_byte(tmp_path):
    build = Builder()
    first = _stage(tmp_path / "onnx", {"model": "a"}, build)
    assert _stage(tmp_path / "onnx", {"model": "b"}, build) != first
    assert build.calls == 2
    (tmp_path / "onnx" / "engine.bin").write_bytes(b"Engine")
    _stage(tmp_path / "onnx", {"model": "b"}, build)
    assert build.calls == 3
    (tmp_path / "onnx" / "stray").write_bytes(b"")
    _stage(tmp_path / "onnx", {"model": "b"}, build)
    assert build.calls == 4


def test_stage_killed_while_building_is_built_again(tmp_path):
    build = Builder()

    def killed(directory):
        build(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _stage(tmp_path / "onnx", {"model": "a"}, killed)
    _stage(tmp_path / "onnx", {"model": "a"}, build)
    assert build.calls == 2


def test_old_receipt_does_not_cover_a_killed_rebuild(tmp_path):
    build = Builder()
    _stage(tmp_path / "onnx", {"model": "a"}, build)

    def killed(directory):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _stage(tmp_path / "onnx", {"model": "b"}, killed)
    _stage(tmp_path / "onnx", {"model": "a"}, build)
    assert build.calls == 2


def test_unbuilt_target_is_refused(tmp_path):
    with pytest.raises(StageMissingError, match="target 'tensorrt-cuda' is not built yet; there is: onnxruntime-cpu"):
        optimize("reference", tmp_path / "out", targets=["tensorrt-cuda"])
