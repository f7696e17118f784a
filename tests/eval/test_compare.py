"""A whole evaluation of toy bundles, with faults planted in engines."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ldm_deploy.errors import ArtifactError, BundleError
from ldm_deploy.eval import compare
from ldm_deploy.eval.compare import Evaluation, evaluate_bundle, find_reference
from ldm_deploy.eval.measure import BASELINE, Measured
from ldm_deploy.eval.report import exit_code

PROMPTS = ["red apple", "sun"]
FP32, INT8 = "fp32-onnxruntime-cpu", "int8-onnxruntime-cpu"


@pytest.fixture(scope="module")
def tiny(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_bundle", root / "tests" / "tiny_bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_variant(tiny: ModuleType, directory: Path, component: str, change: Callable[[Any], None]) -> None:
    """Add the variant `int8-onnxruntime-cpu`, in which one engine was changed."""
    from ldm_deploy.runtime.bundle import write_bundle

    data = json.loads((directory / "bundle.json").read_text())
    original = next(engine for engine in data["engines"] if engine["component"] == component)
    model = tiny.tiny_models()[component]
    change(model)
    file = f"engines/{component}-int8.onnx"
    (directory / file).write_bytes(model.SerializeToString())
    engine = {**original, "id": f"{component}-int8-onnxruntime-cpu", "precision": "int8", "files": [file]}
    data["engines"].append(engine)
    variant = dict(data["variants"][0])
    swap = {original["id"]: engine["id"]}
    variant |= {"name": INT8, "engines": [swap.get(name, name) for name in variant["engines"]]}
    data["variants"].append(variant)
    write_bundle(directory, data)


def set_constant(model: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    from onnx import numpy_helper

    for initializer in model.graph.initializer:
        if initializer.name == name:
            value = np.asarray(change(numpy_helper.to_array(initializer)))
            initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


@pytest.fixture
def bundle(tiny: ModuleType, tmp_path: Path) -> Path:
    path: Path = tiny.write_tiny_bundle(tmp_path / "bundle")
    return path


@pytest.fixture
def evaluate(bundle: Path, stand_in_baseline: Callable[[Path], None]) -> Callable[..., Evaluation]:
    """`evaluate_bundle` with a copy of the toy bundle as its baseline."""
    stand_in_baseline(bundle)
    return lambda **options: evaluate_bundle(bundle, prompts=PROMPTS, seeds=[0, 1], threads=1, **options)


def gates(report: Evaluation, name: str) -> dict[str, str]:
    row = next(row for row in report["variants"] if row["name"] == name)
    return {gate["name"]: gate["result"] for gate in row["gates"]}


def test_equal_engines_draw_equal_images_and_the_row_says_so(evaluate: Callable[..., Evaluation]) -> None:
    report = evaluate()
    (row,) = report["variants"]
    assert row["status"] == "ok"
    assert row["quality"]["psnr_db"] == {
        "mean": 100.0, "worst": 100.0, "worst_image": {"prompt": "red apple", "seed": 0}, "ci95": [100.0, 100.0],
        "n": 4, "reason": None, "peak": 255, "identical": 4, "pooled": {"value": 100.0, "ci95": [100.0, 100.0]},
    }  # fmt: skip
    assert row["quality"]["colour_shift"]["mean"] == [0, 0, 0]
    assert row["quality"]["ssim"]["mean"] == pytest.approx(1)
    assert row["latency_ms"]["samples"] == report["baseline"]["latency_ms"]["samples"] == 4
    assert row["speedup"]["versus"] == BASELINE
    assert row["peak_memory_bytes"] > 2**20
    assert row["size_bytes"] == sum(part["size_bytes"] for part in row["components"])
    assert report["baseline"]["size_bytes"] == 1200
    assert report["baseline"]["stored_bytes"] < 1200
    assert [image["prompt"] for image in row["images"]] == ["red apple", "red apple", "sun", "sun"]
    assert gates(report, FP32)["psnr_db_min"] == "pass"
    assert report.images[FP32].shape == (4, 32, 32, 3)


def test_a_swapped_channel_fails_its_gates_and_is_not_chosen(
    tiny: ModuleType, bundle: Path, evaluate: Callable[..., Evaluation]
) -> None:
    add_variant(tiny, bundle, "vae_decoder", lambda model: set_constant(model, "kernel", lambda kernel: kernel[::-1]))
    report = evaluate()
    found = gates(report, INT8)
    assert found["psnr_db_min"] == found["ssim_min"] == "fail"
    assert report["chosen"] != INT8
    assert f"Not chosen: {INT8}, because" in report["why"]


def test_an_engine_that_returns_nan_is_a_failed_row_that_names_it(
    tiny: ModuleType, bundle: Path, evaluate: Callable[..., Evaluation]
) -> None:
    add_variant(tiny, bundle, "unet", lambda model: set_constant(model, "bias", lambda _: np.float32(np.nan)))
    report = evaluate()
    row = next(row for row in report["variants"] if row["name"] == INT8)
    assert row["status"] == "failed"
    assert "not finite at step 1" in row["reason"]
    assert row["latency_ms"] is None
    assert row["quality"]["psnr_db"]["mean"] is None
    assert row["quality"]["psnr_db"]["reason"] == f"{INT8} drew no images; its row says why"
    assert gates(report, INT8)["psnr_db_min"] == "not measured"
    assert gates(report, FP32)["psnr_db_min"] == "pass"


def test_a_decoder_that_returns_nan_is_a_failed_row_that_names_it(
    tiny: ModuleType, bundle: Path, evaluate: Callable[..., Evaluation]
) -> None:
    broken = lambda model: set_constant(model, "kernel", lambda kernel: kernel * np.nan)  # noqa: E731
    add_variant(tiny, bundle, "vae_decoder", broken)
    row = next(row for row in evaluate()["variants"] if row["name"] == INT8)
    assert row["status"] == "failed"
    assert "vae_decoder returned values that are not finite" in row["reason"]


def test_flat_images_are_named(tiny: ModuleType, bundle: Path, evaluate: Callable[..., Evaluation]) -> None:
    add_variant(tiny, bundle, "vae_decoder", lambda model: set_constant(model, "kernel", lambda kernel: kernel * 0))
    row = next(row for row in evaluate()["variants"] if row["name"] == INT8)
    assert row["status"] == "failed"
    assert row["reason"] == (
        "the image of 'red apple', seed 0 and 3 more is constant (one flat colour); the baseline's is not"
    )
    assert row["quality"]["psnr_db"]["mean"] is not None


def test_without_its_reference_nothing_is_judged_and_the_exit_code_says_so(bundle: Path) -> None:
    report = evaluate_bundle(bundle, prompts=PROMPTS, seeds=[0, 1], threads=1)
    assert report["baseline"]["status"] == "not measured"
    assert "give" in report["baseline"]["reason"]
    assert "--reference" in report["baseline"]["reason"]
    assert report["chosen"] is None
    assert gates(report, FP32)["speedup_min"] == "not measured"
    assert report["variants"][0]["latency_ms"]["samples"] == 4
    assert exit_code(report) == 4


def test_a_reference_that_was_given_and_is_wrong_is_an_error(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no model"):
        evaluate_bundle(bundle, reference=tmp_path)


def test_a_reference_of_another_model_is_no_baseline(tmp_path: Path) -> None:
    from ldm_deploy.models.reference import MODEL_FILES

    for name in MODEL_FILES:
        (tmp_path / name).write_text(name)
    path, reason = find_reference("sha256:" + "1" * 64, tmp_path)
    assert path is None
    assert f"the bundle was made from sha256:{'1' * 64}, the reference {tmp_path} is sha256:" in str(reason)


def test_a_damaged_bundle_is_not_measured(bundle: Path) -> None:
    file = next((bundle / "engines").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(BundleError, match=file.name):
        evaluate_bundle(bundle, threads=1)


def add_study(bundle: Path, content: dict[str, Any]) -> None:
    from ldm_deploy.runtime.bundle import write_bundle

    (bundle / "sensitivity.json").write_text(json.dumps(content))
    write_bundle(bundle, json.loads((bundle / "bundle.json").read_text()))


def test_a_study_in_the_bundle_reaches_the_page(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_deploy.eval.page import to_html
    from tests.eval.studies import sensitivity

    nothing = Measured()
    nothing.failed[FP32] = "nothing is drawn in this test"
    monkeypatch.setattr(compare, "measure", lambda *_, **__: nothing)
    add_study(bundle, sensitivity())
    report = evaluate_bundle(bundle, threads=1)
    assert report.studies == {"sensitivity": sensitivity()}
    assert "mid.attention" in to_html(report)


def test_a_damaged_study_is_refused_before_anything_is_measured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_deploy.errors import EvaluationError

    add_study(bundle, {"format": 2})
    monkeypatch.setattr(compare, "measure", lambda *_, **__: pytest.fail("it was measured"))
    with pytest.raises(EvaluationError, match=r"sensitivity.json: \$"):
        evaluate_bundle(bundle, threads=1)
