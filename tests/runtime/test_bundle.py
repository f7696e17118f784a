"""The loader: every check of the format, shown on a bundle damaged in just that way, before an engine is opened."""

from __future__ import annotations

import json
import os
import shutil

import pytest

import ldm_deploy
from ldm_deploy.errors import BundleError, ConfigError, EngineError
from ldm_deploy.runtime.bundle import read_bundle, verify_bundle, write_bundle
from ldm_deploy.runtime.checks import check_description
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


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../outside", "engines/../../outside", "a\\..\\b", "engines//x", "./x", "a\0b", ""]
)
def test_paths_that_leave_the_bundle(bundle, name):
    data = json.loads((bundle / "bundle.json").read_text())
    edit(bundle, files={**data["files"], name: {"sha256": "0" * 64, "size": 1}})
    refuse(bundle, "a path that leaves the bundle")


def test_links_that_leave_the_bundle(bundle, tmp_path):
    (tmp_path / "outside.onnx").write_bytes((bundle / UNET).read_bytes())
    (bundle / UNET).unlink()
    os.symlink(tmp_path / "outside.onnx", bundle / UNET)
    refuse(bundle, r"names 'engines/unet-fp32\.onnx', a link that leaves the bundle")
    (bundle / UNET).unlink()
    os.symlink("unet-fp32.onnx", bundle / UNET)
    refuse(bundle, r"names 'engines/unet-fp32\.onnx', a link that leaves the bundle")  # to itself: nowhere
    (bundle / UNET).unlink()
    os.symlink("gone", bundle / UNET)
    refuse(bundle, r"unet-fp32\.onnx cannot be read \(No such file or directory\)")


def test_a_linked_description_is_refused_and_a_linked_bundle_is_not(bundle, tmp_path):
    os.symlink(bundle, tmp_path / "link")
    assert read_bundle(tmp_path / "link").variant().steps == 3
    os.replace(bundle / "bundle.json", tmp_path / "elsewhere.json")
    os.symlink(tmp_path / "elsewhere.json", bundle / "bundle.json")
    refuse(bundle, r"names 'bundle\.json', a link that leaves the bundle")


def test_a_pipe_in_place_of_a_file_does_not_block(bundle):
    (bundle / UNET).unlink()
    os.mkfifo(bundle / UNET)
    refuse(bundle, r"unet-fp32\.onnx is no regular file")


def test_weights_outside_the_bundle_are_refused_by_the_runtime(tmp_path):
    """A path inside an ONNX file is out of the loader's sight; ONNX Runtime must refuse it."""
    import numpy as np
    from onnx import TensorProto, helper

    (tmp_path / "inside").mkdir()
    np.ones(4, np.float32).tofile(tmp_path / "outside.bin")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "../outside.bin"), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "inside" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match=r"cannot open .*m\.onnx: .*; build the engine again"):
        OnnxRuntimeEngine(tmp_path / "inside" / "m.onnx")


def test_linked_folders_are_not_followed(bundle, tmp_path):
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "folder", bundle / "more")
    refuse(bundle, "more is not in its list of files")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime_versions": "<1.0"}, r"needs onnxruntime <1\.0 and \S+ is installed; install a fitting version, or"),
        ({"runtime_versions": "new"}, "needs onnxruntime new, which is no range of versions; copy the bundle again"),
    ],
)
def test_runtime_version_out_of_range(bundle, change, message):
    data = json.loads((bundle / "bundle.json").read_text())
    edit(bundle, engines=[{**engine, **change} for engine in data["engines"]])
    refuse(bundle, message)
    with pytest.raises(BundleError, match=message):
        verify_bundle(bundle)


def test_runtime_that_is_not_installed(bundle, monkeypatch):
    from importlib import metadata

    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    refuse(bundle, r"needs onnxruntime >=1\.22 and none is installed; install a fitting version")
    versions = {"onnxruntime-gpu": "1.30.0"}
    monkeypatch.setattr(metadata, "version", lambda name: versions[name] if name in versions else nothing(name))
    verify_bundle(bundle)  # the GPU build brings the same module


def test_unknown_variant_lists_those_there_are(bundle):
    with pytest.raises(ConfigError, match="no variant 'int8'; there are: fp32-onnxruntime-cpu") as caught:
        ldm_deploy.load(bundle, variant="int8")
    assert caught.value.exit_code == 2
    edit(bundle, default_variant="int8")
    refuse(bundle, "no variant 'int8'; there are: fp32-onnxruntime-cpu: name one of them")
    edit(bundle, default_variant=None)
    refuse(bundle, "no variant None; there are: fp32-onnxruntime-cpu: name one of them")


def test_inconsistent_descriptions(bundle):
    data = json.loads((bundle / "bundle.json").read_text())
    engines, variants = data["engines"], data["variants"]
    edit(bundle, engines=engines[1:])
    refuse(bundle, "needs engine 'text_encoder-fp32-onnxruntime-cpu', which it lacks")
    edit(bundle, engines=[*engines, engines[0]])
    refuse(bundle, "engines has 'text_encoder-fp32-onnxruntime-cpu' twice")
    second = {**engines[0], "id": "second"}
    edit(bundle, engines=[*engines, second], variants=[{**variants[0], "engines": [*variants[0]["engines"], "second"]}])
    refuse(bundle, "variant fp32-onnxruntime-cpu has two engines for text_encoder")
    edit(bundle, engines=engines, variants=variants, tokenizer="other.json")
    refuse(bundle, r"uses 'other\.json', which its list of files does not have")
    edit(bundle, tokenizer="tokenizer.json", schedule={**data["schedule"], "beta_scale": 2})
    refuse(bundle, "schedule: unknown key 'beta_scale'; .*; upgrade ldm_deploy, or copy the bundle again")


def keys_of(value, path=()):
    """Every place in a JSON value, as the keys that lead to it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from keys_of(inner, (*path, key))


# Nothing that draws an image depends on these.
FREE = {"created", "toolchain", "parents", "refused", "kind", "license"}
FREE_IN_ENGINES = {"built_for", "inputs", "outputs", "size_bytes", "precision_found", "parity"}


def test_every_value_of_a_wrong_type_is_refused(pristine):
    """Every value of bundle.json in turn is removed, and replaced by one of every JSON type."""
    text = (pristine / "bundle.json").read_text()
    places = [path for path in keys_of(json.loads(text)) if path[:1] != ("engines",) or path[1:2] in ((), (0,))]
    assert len(places) > 60
    for path in places:
        if set(path) & FREE or (path[0] == "engines" and set(path) & FREE_IN_ENGINES):
            continue
        wrongly_read = []
        for wrong in ("remove", None, True, -1, 0.5, float("inf"), "", "x", [], [1], {}, {"x": 1}):
            data = json.loads(text)
            holder = data
            for key in path[:-1]:
                holder = holder[key]
            if wrong == "remove":
                del holder[path[-1]]
            else:
                holder[path[-1]] = wrong
            try:
                check_description(pristine, data)
                wrongly_read.append(wrong)
            except BundleError as error:
                assert "\n" not in str(error)  # noqa: PT017
        # What is left fits: another text for a name, another number, null for a default, one entry fewer.
        assert len(wrongly_read) <= 3, (path, wrongly_read)


def test_a_sampler_of_another_version_is_refused_when_loaded(bundle):
    data = json.loads((bundle / "bundle.json").read_text())
    edit(bundle, variants=[{**data["variants"][0], "sampler": "unipc"}])
    refuse(bundle, "variant fp32-onnxruntime-cpu is drawn with the sampler 'unipc'; this version has: ddim, ddpm")


def test_writing_computes_the_list_of_files(bundle):
    data = json.loads((bundle / "bundle.json").read_text())
    (bundle / "report").mkdir()
    (bundle / "report" / "report.json").write_text("{}")
    written = write_bundle(bundle, data)
    assert written.data["files"]["report/report.json"]["size"] == 2
    assert read_bundle(bundle).data == written.data


def test_writing_refuses_what_reading_would(bundle):
    before = (bundle / "bundle.json").read_bytes()
    data = json.loads(before)
    with pytest.raises(BundleError, match=r"variants\[0\]\.steps is 0, not an integer of 1 or more"):
        write_bundle(bundle, {**data, "variants": [{**data["variants"][0], "steps": 0}]})
    assert (bundle / "bundle.json").read_bytes() == before


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
