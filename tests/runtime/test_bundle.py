"""The loader: every check of the format, shown on a bundle damaged in just that way, before an engine is opened."""

from __future__ import annotations

import json
import os
import shutil

import pytest

import ldm_deploy
from ldm_deploy.errors import BundleError, EngineError
from ldm_deploy.runtime.bundle import read_bundle, verify_bundle, write_bundle
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from tests.tiny_bundle import write_tiny_bundle

UNET = "engines/unet-fp32.onnx"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def bundle(pristine, tmp_path, monkeypatch):
    """A copy to damage; opening an engine fails the test."""

    def opened(*_args, **_kwargs):
        raise AssertionError("an engine was opened before the bundle was checked")

    monkeypatch.setattr("ldm_deploy.runtime.pipeline.open_engine", opened)
    return shutil.copytree(pristine, tmp_path / "bundle")


def edit(bundle, **changes):
    file = bundle / "bundle.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refuse(bundle, message):
    with pytest.raises(BundleError, match=message) as caught:
        ldm_deploy.load(bundle)("sun")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_whole_bundle_is_read(bundle):
    checked = verify_bundle(bundle)
    assert set(checked.engines) == {
        f"{name}-fp32-onnxruntime-cpu" for name in ("text_encoder", "unet", "vae_encoder", "vae_decoder")
    }
    assert checked.variant().steps == 3


def test_no_bundle(tmp_path):
    refuse(tmp_path, r"is no bundle: there is no .*bundle\.json; give a directory")


def test_damaged_json(bundle):
    (bundle / "bundle.json").write_text("{")
    refuse(bundle, r"bundle\.json does not parse")
    (bundle / "bundle.json").write_text("[]")
    refuse(bundle, "is not a bundle's description")


def test_newer_format(bundle):
    edit(bundle, format=2)
    refuse(bundle, "has format 2; this version reads format 1: upgrade ldm_deploy")


def test_one_flipped_byte(bundle):
    content = bytearray((bundle / UNET).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / UNET).write_bytes(content)
    refuse(bundle, r"unet-fp32\.onnx was changed \(its sha256 differs\)")


def test_truncated_file(bundle):
    (bundle / UNET).write_bytes((bundle / UNET).read_bytes()[:-1])
    refuse(bundle, r"unet-fp32\.onnx has \d+ bytes instead of \d+")


def test_missing_and_unlisted_files(bundle):
    (bundle / "extra.bin").write_bytes(b"")
    refuse(bundle, r"extra\.bin is not in its list of files")
    (bundle / "extra.bin").unlink()
    (bundle / UNET).unlink()
    refuse(bundle, r"unet-fp32\.onnx is missing")


@pytest.mark.parametrize("name", ["/etc/hostname", "../outside", "engines/../../outside", "a\\..\\b"])
def test_paths_that_leave_the_bundle(bundle, name):
    data = json.loads((bundle / "bundle.json").read_text())
    edit(bundle, files={**data["files"], name: {"sha256": "0" * 64, "size": 1}})
    refuse(bundle, "a path that leaves the bundle")


def test_links_that_leave_the_bundle(bundle, tmp_path):
    (tmp_path / "outside.onnx").write_bytes((bundle / UNET).read_bytes())
    (bundle / UNET).unlink()
    os.symlink(tmp_path / "outside.onnx", bundle / UNET)
    refuse(bundle, "a path that leaves the bundle")


def test_linked_folders_are_not_followed(bundle, tmp_path):
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "folder", bundle / "more")
    refuse(bundle, "more is not in its list of files")


def test_runtime_version_out_of_range(bundle):
    data = json.loads((bundle / "bundle.json").read_text())
    edit(bundle, engines=[{**engine, "runtime_versions": "<1.0"} for engine in data["engines"]])
    refuse(bundle, r"needs onnxruntime <1\.0 and \S+ is installed; install a fitting version")


def test_unknown_variant_lists_those_there_are(bundle):
    with pytest.raises(BundleError, match="no variant 'int8'; there are: fp32-onnxruntime-cpu"):
        ldm_deploy.load(bundle, variant="int8")


def test_inconsistent_descriptions(bundle):
    data = json.loads((bundle / "bundle.json").read_text())
    edit(bundle, engines=data["engines"][1:])
    refuse(bundle, "needs engine 'text_encoder-fp32-onnxruntime-cpu', which it lacks")
    edit(bundle, engines=data["engines"], tokenizer="other.json")
    refuse(bundle, r"uses 'other\.json', which its list of files does not have")
    edit(bundle, tokenizer="tokenizer.json", model={})
    refuse(bundle, r"has no 'model\.downsampling'")
    without_id = [{key: value for key, value in engine.items() if key != "runtime"} for engine in data["engines"]]
    edit(bundle, model=data["model"], engines=without_id)
    refuse(bundle, "an engine or variant has no 'runtime'")


def test_writing_computes_the_list_of_files(bundle):
    data = json.loads((bundle / "bundle.json").read_text())
    (bundle / "report").mkdir()
    (bundle / "report" / "report.json").write_text("{}")
    written = write_bundle(bundle, data)
    assert written.data["files"]["report/report.json"]["size"] == 2
    assert read_bundle(bundle).data == written.data


def test_an_engine_for_another_runtime_is_refused_by_name(pristine, tmp_path):
    bundle = shutil.copytree(pristine, tmp_path / "bundle")
    data = json.loads((bundle / "bundle.json").read_text())
    engines = [{**e, "device": "tpu"} if e["component"] == "unet" else e for e in data["engines"]]
    edit(bundle, engines=engines)
    with pytest.raises(EngineError, match="engine unet-fp32-onnxruntime-cpu is for onnxruntime on tpu"):
        ldm_deploy.load(bundle)("sun")


def test_a_file_that_is_no_engine(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no protobuf")
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot open .*x\.onnx: .*; build the engine again"):
        OnnxRuntimeEngine(tmp_path / "x.onnx")
