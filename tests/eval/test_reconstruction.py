from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

import ldm_deploy
from ldm_deploy.errors import DataError
from ldm_deploy.eval import compare, reconstruction
from ldm_deploy.eval.compare import evaluate_bundle
from ldm_deploy.eval.measure import BASELINE
from ldm_deploy.eval.quality import compare_images
from ldm_deploy.eval.reconstruction import open_originals, reconstruct_all
from ldm_deploy.eval.report import schema
from tests.eval.factories import absent_lpips
from tests.tiny_bundle import MODEL, tiny_models, write_tiny_bundle

FP32, INT8 = "fp32-onnxruntime-cpu", "int8-onnxruntime-cpu"


@pytest.fixture(autouse=True)
def _without_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "Lpips", absent_lpips)
    monkeypatch.setattr(compare, "Lpips", absent_lpips)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle")


def pictures(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in coarse]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    for index, image in enumerate(pictures(5)):
        Image.fromarray(image).save(path / f"{index}.png")
    return path


def add_variant(bundle: Path, name: str, component: str, change: Callable[[Any], None] | None) -> None:
    """A variant of the same engines, or with `component` replaced by a changed one."""
    from ldm_deploy.runtime.bundle import write_bundle

    data = json.loads((bundle / "bundle.json").read_text())
    variant = {**data["variants"][0], "name": name}
    if change is not None:
        original = next(engine for engine in data["engines"] if engine["component"] == component)
        model = tiny_models()[component]
        change(model)
        file = f"engines/{component}-{name}.onnx"
        (bundle / file).write_bytes(model.SerializeToString())
        data["engines"].append({**original, "id": f"{component}-{name}", "files": [file]})
        variant["engines"] = [
            f"{component}-{name}" if own == original["id"] else own for own in data["variants"][0]["engines"]
        ]
    data["variants"].append(variant)
    write_bundle(bundle, data)


def scale_kernel(factor: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        from onnx import numpy_helper

        for initializer in model.graph.initializer:
            if initializer.name == "kernel":
                value = numpy_helper.to_array(initializer) * np.float32(factor)
                initializer.CopyFrom(numpy_helper.from_array(value, "kernel"))

    return change


def measured(bundle: Path, folder: Path) -> dict[str, Any]:
    data = json.loads((bundle / "bundle.json").read_text())
    return reconstruct_all(bundle, data, None, open_originals(folder, MODEL), threads=1)


def test_it_is_what_encoding_and_decoding_give(bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "BATCH_PIXELS", 2 * 32 * 48)  # three batches
    record = measured(bundle, folder)[FP32]
    pipeline = ldm_deploy.load(bundle, threads=1)
    originals = pictures(5)
    rebuilt = np.concatenate([pipeline.decode(pipeline.encode(image)) for image in originals])
    expected, _ = compare_images(originals, rebuilt, [(f"{index}.png", 0) for index in range(5)], absent_lpips())
    assert (record["images"], record["size"], record["reason"]) == (5, [32, 48], None)
    for name in ("psnr_db", "ssim", "ms_ssim", "delta_e2000", "tile_psnr_db"):
        assert record["quality"][name]["mean"] == pytest.approx(expected[name]["mean"], rel=1e-6)
        assert record["quality"][name]["n"] == 5
    worst = expected["psnr_db"]["worst_image"]["prompt"]
    assert record["quality"]["psnr_db"]["worst_image"] == {"file": worst}


def test_a_decoder_that_is_off_shows_in_its_variant_alone(bundle: Path, folder: Path) -> None:
    add_variant(bundle, "dim", "vae_decoder", scale_kernel(0.0))
    found = measured(bundle, folder)
    grey, whole = (found[name]["quality"]["psnr_db"]["mean"] for name in ("dim", FP32))
    assert abs(grey - whole) > 1
    dim = found["dim"]["quality"]["colour_shift"]["mean"]
    assert dim == pytest.approx([128 - pictures(5)[..., channel].mean() for channel in range(3)])


def test_a_decoder_that_returns_nan_is_named(bundle: Path, folder: Path) -> None:
    add_variant(bundle, "broken", "vae_decoder", scale_kernel(np.nan))
    record = measured(bundle, folder)["broken"]
    assert record["quality"] is None
    assert "vae_decoder returned values that are not finite" in record["reason"]
    assert "not measured: vae_decoder" in reconstruction.describe("broken", record)[0]


def test_variants_of_the_same_autoencoder_are_measured_once(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_variant(bundle, "same", "unet", None)
    add_variant(bundle, "other unet", "unet", scale_kernel(2.0))
    loaded = []
    load = ldm_deploy.load
    monkeypatch.setattr(ldm_deploy, "load", lambda *a, **k: loaded.append(k["variant"]) or load(*a, **k))
    found = measured(bundle, folder)
    assert loaded == [FP32]
    assert found["same"] is found["other unet"] is found[FP32]


def test_the_report_holds_it_for_every_variant_and_the_baseline(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, tmp_path / "original")
    monkeypatch.setattr(
        reconstruction, "_reference_pipeline", lambda *_: ldm_deploy.load(tmp_path / "original", threads=1)
    )
    monkeypatch.setattr(compare, "reconstruct_all", lambda bundle, data, source, *a, **k: reconstruct_all(
        bundle, data, tmp_path / "original", *a, **k
    ))  # fmt: skip
    report = evaluate_bundle(bundle, prompts=["sun"], seeds=[0, 1], threads=1, images=folder)
    jsonschema.Draft202012Validator(schema()).validate(json.loads(json.dumps(report)))
    assert report["baseline"]["name"] == BASELINE
    assert report["baseline"]["reconstruction"] == report["variants"][0]["reconstruction"]
    assert report["variants"][0]["reconstruction"]["images"] == 5


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("size", r"0\.png does not fit this model: height is 30; it must be a multiple of 16, as 16 or 32; cut the"),
        ("unequal", r"3\.png is 32x32, .*0\.png is 32x48"),
        ("grey", r"0\.png is grey"),
        ("empty", "holds no images"),
    ],
)
def test_images_that_cannot_be_used_are_refused_before_anything_is_measured(
    bundle: Path, folder: Path, fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    if fault != "unequal":  # only reading all images shows that one
        monkeypatch.setattr(compare, "measure", never)
    if fault == "size":
        Image.fromarray(pictures(1, 30)[0]).save(folder / "0.png")
    elif fault == "unequal":
        Image.fromarray(pictures(1, 32, 32)[0]).save(folder / "3.png")
    elif fault == "grey":
        Image.fromarray(pictures(1)[0]).convert("L").save(folder / "0.png")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    with pytest.raises(DataError, match=message):
        evaluate_bundle(bundle, prompts=["sun"], seeds=[0], threads=1, images=folder)


def test_of_a_training_set_the_held_out_images_are_taken(tmp_path: Path) -> None:
    from ldm_deploy.training.data import is_held_out

    names = [f"picture-{index}.png" for index in range(90)]
    for name, image in zip(names, pictures(90, 32, 32), strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},dot\n" for name in names))
    held_out = [name for name in names if is_held_out(name)]
    assert 0 < len(held_out) < 10
    originals = open_originals(tmp_path, MODEL)
    assert originals.names == held_out
    assert originals.read(0, 1).shape == (1, 32, 32, 3)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{n},dot\n" for n in names if n not in held_out)
    )
    with pytest.raises(DataError, match="holds no held-out image; give a folder of images without metadata"):
        open_originals(tmp_path, MODEL)


def test_a_reference_takes_a_plain_folder(ldm_deploy_cli: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    """The shipped reference, on a smooth picture that it should reproduce well."""
    for index, image in enumerate(pictures(2, 64, 64)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    result = tmp_path / "result.json"
    shipped = root / "ldm_deploy" / "assets" / "reference"
    done = ldm_deploy_cli("eval", shipped, "--data", tmp_path, "--json", result)
    assert done.code == 0, done.err
    assert "reference: reconstruction of 2 images of 64x64" in done.out
    assert json.loads(result.read_text())["reconstruction"]["quality"]["psnr_db"]["mean"] > 20
