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


def test_the_plan_adds_up_what_will_be_run(ldm_deploy_cli, tmp_path):
    from ldm_deploy.plan import Unit, plan

    unit = Unit(0.004, 0.01, 7_000_000, {"unet": 100, "vae_decoder": 20}, 50, 4)
    targets = {"onnxruntime-cpu": ("fp32",), "openvino-cpu": ("fp32", "bf16")}
    steps = {step.stage: step for step in plan(unit, targets)}
    assert list(steps) == ["export", "calibrate", "quantize onnxruntime-cpu", "quantize openvino-cpu", "evaluate"]
    assert steps["export"].what.startswith("12 engines")
    assert steps["evaluate"].seconds > 6 * 48 * (2 * 50 * 0.004 + 0.01)  # every image from every variant
    searched = {step.stage: step for step in plan(unit, targets, builds=10)}
    assert "about 120 layers" in searched["study openvino-cpu"].what
    assert searched["search openvino-cpu"].seconds > 20 * 8
    ran = ldm_deploy_cli(
        "optimize", "reference", "--target", "openvino-cpu", "--dry-run", "--builds", 5, "--out", tmp_path / "out"
    )
    assert ran.code == 0, ran.err
    assert "search openvino-cpu" in ran.out
    assert "in all" in ran.out
    assert list(tmp_path.iterdir()) == []
