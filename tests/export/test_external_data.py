"""Weights beyond what one protobuf holds lie in one file beside the graph, which the bundle's digests cover."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from ldm_deploy.cache import Cache
from ldm_deploy.errors import BundleError
from ldm_deploy.export.export import export_source
from ldm_deploy.runtime.bundle import Bundle, read_bundle, verify_bundle
from ldm_deploy.runtime.engines import open_engine


@pytest.fixture(scope="module")
def cached(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Bundle]:
    """A thousand bytes are too much for a graph."""
    cache = Cache(tmp_path_factory.mktemp("cache"))

    def export(out: Path) -> Bundle:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ldm_deploy.export.to_onnx.EXTERNAL_DATA_BYTES", 1000)
            return export_source(reference, out, components=["unet"], threads=1, cache=cache)

    return export


@pytest.fixture
def exported(cached: Callable[[Path], Bundle], tmp_path: Path) -> Bundle:
    cached(tmp_path / "first")
    return cached(tmp_path / "out")


def test_one_file_named_relative_to_the_graph(exported: Bundle) -> None:
    (engine,) = exported.data["engines"]
    assert engine["files"] == ["engines/unet-fp32.onnx", "engines/unet-fp32.onnx.data"]
    model = onnx.load(str(exported.root / engine["files"][0]), load_external_data=False)
    places = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert places == {"unet-fp32.onnx.data"}
    assert engine["size_bytes"] == sum((exported.root / file).stat().st_size for file in engine["files"])


def test_every_reader_takes_it_from_the_cache(exported: Bundle) -> None:
    """onnx refuses links."""
    (engine,) = exported.data["engines"]
    path = exported.root / engine["files"][0]
    onnx.checker.check_model(str(path))
    onnx.load(str(path))
    opened = open_engine(exported.engines[engine["id"]], exported.root, threads=1)
    assert opened.inputs


def test_one_changed_byte_of_it_is_found(exported: Bundle) -> None:
    data = exported.root / "engines/unet-fp32.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.unlink()
    data.write_bytes(content)
    with pytest.raises(BundleError, match=r"unet-fp32.onnx.data was changed \(its sha256 differs\)"):
        read_bundle(exported.root)


def test_the_bundle_can_be_moved(exported: Bundle, tmp_path: Path) -> None:
    moved: Any = exported.root.rename(tmp_path / "elsewhere")
    bundle = verify_bundle(moved)
    (record,) = bundle.engines.values()
    assert open_engine(record, moved, threads=1).outputs
