"""A bundle of one component has the same report as a whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval import single
from ldm_deploy.eval.compare import evaluate_bundle
from ldm_deploy.eval.parity import Probe
from ldm_deploy.eval.report import exit_code, schema, write_report
from ldm_deploy.eval.single import evaluate_single, output_psnr_db
from ldm_deploy.runtime.bundle import write_bundle
from tests.quantize.conftest import denoiser  # noqa: F401  (a fixture)
from tests.quantize.test_component import write_component


def add_engine(directory: Path, precision: str, offset: float) -> None:
    """A copy of the fp32 engine whose outputs are `offset` of their weights off."""
    data = json.loads((directory / "bundle.json").read_text())
    first = data["engines"][0]
    path = directory / "engines" / f"vae_decoder-{precision}.onnx"
    path.parent.mkdir(exist_ok=True)
    model = onnx.load(str(directory / first["files"][0]))
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim > 1:
            tensor.CopyFrom(numpy_helper.from_array(value * np.float32(1 + offset), tensor.name))
    onnx.save(model, str(path))
    added = {"id": f"vae_decoder-{precision}-onnxruntime-cpu", "precision": precision}
    files = [path.relative_to(directory).as_posix()]
    data["engines"].append({**first, **added, "files": files, "size_bytes": path.stat().st_size})
    write_bundle(directory, data)


@pytest.fixture
def directory(denoiser: Path, tmp_path: Path) -> Path:  # noqa: F811
    made = write_component(tmp_path / "own", denoiser, "onnxruntime")
    data = json.loads((made / "bundle.json").read_text())
    data["engines"][0]["size_bytes"] = (made / data["engines"][0]["files"][0]).stat().st_size
    write_bundle(made, data)
    add_engine(made, "int8", 1e-3)
    return made


def test_the_report_is_that_of_a_whole_model(directory: Path, tmp_path: Path) -> None:
    report = evaluate_bundle(directory, threads=1)
    jsonschema.validate(dict(report), schema())
    assert [row["name"] for row in report["variants"]] == ["fp32-onnxruntime-cpu", "int8-onnxruntime-cpu"]
    assert report["baseline"]["name"] == "fp32-onnxruntime-cpu"
    assert report["baseline"]["latency_ms"]["samples"] > 8
    own, worse = report["variants"]
    assert own["quality"]["psnr_db"]["mean"] == 100  # the probes are its own outputs
    assert own["speedup"]["median"] == 1
    assert 20 < worse["quality"]["psnr_db"]["mean"] < 80
    assert worse["speedup"]["versus"] == "fp32-onnxruntime-cpu"
    assert worse["peak_memory_bytes"] > 1e6
    assert worse["quality"]["ssim"]["reason"] == "a component draws no images"
    required = {gate["name"] for gate in worse["gates"] if gate["required"]}
    assert required == {"psnr_db_min", "speedup_min"}
    assert all(gate["result"] != "not measured" for gate in worse["gates"] if gate["name"] != "speedup_min")
    assert report["chosen"] is not None
    assert exit_code(report) == 0
    write_report(report, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "a component draws no images" in page
    assert "vae_decoder, 2 recorded inputs" in page
    assert "ms per call" in page
    assert "ms per image" not in page
    assert "against fp32-onnxruntime-cpu it has 1.00" not in report["why"]
    assert "vae_decoder alone, batch 1, 2 recorded inputs" in (tmp_path / "report" / "report.md").read_text("utf-8")


def test_a_wrong_engine_and_one_that_was_refused_are_not_chosen(directory: Path) -> None:
    add_engine(directory, "w8", 0.5)
    data = json.loads((directory / "bundle.json").read_text())
    refused = {
        "name": "vae_decoder-int8-onnxruntime-cpu (conv)", "component": "vae_decoder", "reason": "it is slow",
        "runtime": "onnxruntime", "device": "cpu", "precision": "int8", "parity": None, "speedup": None,
    }  # fmt: skip
    write_bundle(directory, {**data, "refused": [refused]})
    report = evaluate_single(directory, threads=1)
    rows = {row["name"]: row for row in report["variants"]}
    wrong = next(gate for gate in rows["w8-onnxruntime-cpu"]["gates"] if gate["name"] == "psnr_db_min")
    assert wrong["result"] == "fail"
    assert wrong["value"] < 20
    assert rows["vae_decoder-int8-onnxruntime-cpu (conv)"]["refused"] == "it is slow"
    assert report["chosen"] in ("fp32-onnxruntime-cpu", "int8-onnxruntime-cpu")


def test_an_engine_that_cannot_be_opened_is_a_row(directory: Path) -> None:
    (directory / "engines" / "vae_decoder-int8.onnx").write_bytes(b"no graph")
    write_bundle(directory, json.loads((directory / "bundle.json").read_text()))
    report = evaluate_single(directory, threads=1)
    row = report["variants"][1]
    assert row["status"] == "failed"
    assert "int8" in row["reason"]
    assert report["chosen"] == "fp32-onnxruntime-cpu"


def test_an_engine_that_gives_nan_is_a_row_that_failed(directory: Path) -> None:
    add_engine(directory, "w8", np.nan)
    report = evaluate_single(directory, threads=1)
    row = report["variants"][2]
    assert (row["status"], row["quality"]["psnr_db"]["mean"]) == ("failed", None)
    assert "NaN" in row["reason"]
    assert report["chosen"] not in (None, "w8-onnxruntime-cpu")


def test_nan_on_another_input_than_the_timed_one_is_seen(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "output_psnr_db", lambda *rest: np.array([50.0, np.nan]))
    row = evaluate_single(directory, threads=1)["variants"][1]
    assert row["status"] == "failed"
    assert row["reason"] == "int8-onnxruntime-cpu gives what is not finite on a recorded input"


def test_psnr_of_outputs_by_hand() -> None:
    class Engine:
        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            return {"a": feeds["x"] + 0.1, "b": feeds["x"]}

    x = np.linspace(0, 2, 5, dtype=np.float32)
    far, equal = Probe({"x": x}, {"a": x, "b": x}), Probe({"x": x}, {"a": x + 0.1, "b": x})
    assert output_psnr_db(Engine(), [far, equal]) == pytest.approx([20 * np.log10(2 / 0.1), 100], rel=1e-5)


def test_what_cannot_be_judged_is_said(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"holds a component and draws nothing; --reference, --data"):
        evaluate_bundle(directory, reference=tmp_path)
    data = json.loads((directory / "bundle.json").read_text())
    other = shutil.copytree(directory, tmp_path / "two")
    write_bundle(other, {**data, "engines": [data["engines"][0], {**data["engines"][1], "component": "unet"}]})
    with pytest.raises(EvaluationError, match=r"holds unet, vae_decoder and no whole model; .*export each"):
        evaluate_single(other)
    write_bundle(directory, {**data, "engines": data["engines"][1:]})
    with pytest.raises(EvaluationError, match=r"has no fp32 engine to compare with; export it in fp32"):
        evaluate_single(directory)
