"""OpenVINO computes in what was asked for, says so, and fails in one line."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_deploy.errors import EngineError, ExportError
from ldm_deploy.eval.parity import relative_error
from ldm_deploy.export.to_openvino import to_openvino
from ldm_deploy.runtime.engine_openvino import OpenVinoEngine
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from tests.tiny_bundle import tiny_models

openvino = pytest.importorskip("openvino")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openvino") / "vae_decoder.onnx"
    path.write_bytes(tiny_models()["vae_decoder"].SerializeToString())
    assert [file.suffix for file in to_openvino(path, path.with_suffix(".xml"), component="unet")] == [".xml", ".bin"]
    return path


def feeds(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"latent": np.random.default_rng(seed).standard_normal((batch, 4, 6, 8), np.float32)}


def test_fp32_is_fp32_and_any_batch_runs(decoder: Path) -> None:
    engine = OpenVinoEngine(decoder.with_suffix(".xml"), threads=1)
    other = OnnxRuntimeEngine(decoder, threads=1)
    for batch in (1, 3):
        assert relative_error(other.run(feeds(batch))["image"], engine.run(feeds(batch))["image"]) < 1e-5
    assert set(engine.precision_found()) == {"fp32"}


def test_the_first_shapes_get_graphs_of_their_own(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...] | None] = []
    compile_it = OpenVinoEngine._compile

    def compiled(self: OpenVinoEngine, shapes: Any) -> Any:
        asked.append(dict(shapes)["latent"] if shapes else None)
        graph = compile_it(self, shapes)
        assert graph.inputs[0].partial_shape.is_static == bool(shapes)
        return graph

    monkeypatch.setattr(OpenVinoEngine, "_compile", compiled)
    engine, other = OpenVinoEngine(decoder.with_suffix(".xml"), threads=1), OnnxRuntimeEngine(decoder, threads=1)
    for batch in (1, 2, 3, 1, 4, 5, 6, 5, 2):
        assert relative_error(other.run(feeds(batch))["image"], engine.run(feeds(batch))["image"]) < 1e-5
    # Opened with free axes; four of their own; and free axes once more, for all others.
    assert [shape and shape[0] for shape in asked] == [None, 1, 2, 3, 4, None]
    assert len(engine._local.requests) == 5


def test_what_was_compiled_is_kept(decoder: Path, tmp_path: Path) -> None:
    def opened() -> OpenVinoEngine:
        return OpenVinoEngine(decoder.with_suffix(".xml"), threads=1, compiled=tmp_path)

    first, second = opened(), opened()
    assert (first.from_cache, second.from_cache) == (False, True)
    np.testing.assert_array_equal(first.run(feeds(2))["image"], second.run(feeds(2))["image"])
    assert second.precision_found() == first.precision_found()
    assert len(list(tmp_path.iterdir())) == 2  # with free axes, and for this batch
    for kept in tmp_path.iterdir():
        kept.chmod(0o644)
        kept.write_bytes(kept.read_bytes()[:-1000])  # a process that died while it wrote
    assert not opened().from_cache


def test_a_graph_with_quantized_nodes_is_int8_where_it_says_so(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    # Seven bits: on a CPU without VNNI eight-bit products saturate.
    tensors = {
        "weight": rng.integers(-63, 64, (8, 4, 3, 3)).astype(np.int8), "scale": np.float32(0.02),
        "zero": np.int8(0), "second": rng.standard_normal((4, 8, 3, 3), np.float32) / 8,
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["latent", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        node("DequantizeLinear", ["weight", "scale", "zero"], ["w"]),
        node("Conv", ["x", "w"], ["hidden"], pads=[1] * 4),
        node("Conv", ["hidden", "second"], ["image"], pads=[1] * 4),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("latent", TensorProto.FLOAT, ["n", 4, "h", "w_"])],
        [value("image", TensorProto.FLOAT, ["n", 4, "h", "w_"])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )  # fmt: skip
    path = tmp_path / "decoder.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    to_openvino(path, path.with_suffix(".xml"), component="unet")
    engine = OpenVinoEngine(path.with_suffix(".xml"), precision="int8", threads=1)
    assert engine.precision_found() == {"fp32": 1, "int8": 1}
    expected = OnnxRuntimeEngine(path, threads=1).run(feeds(2))["image"]
    assert relative_error(expected, engine.run(feeds(2))["image"]) < 2e-2


@pytest.mark.skipif(not BF16, reason="this CPU has no bf16")
def test_bf16_is_coarser_and_read_back(decoder: Path) -> None:
    engine = OpenVinoEngine(decoder.with_suffix(".xml"), precision="bf16", threads=1)
    assert set(engine.precision_found()) == {"bf16"}
    error = relative_error(OnnxRuntimeEngine(decoder, threads=1).run(feeds(2))["image"], engine.run(feeds(2))["image"])
    assert 1e-5 < error < 3e-2


def test_results_of_two_threads_do_not_mix(decoder: Path) -> None:
    engine = OpenVinoEngine(decoder.with_suffix(".xml"), threads=1)
    expected = {seed: engine.run(feeds(2, seed))["image"] for seed in range(4)}
    wrong = []

    def work(seed: int) -> None:
        for _ in range(20):
            if not np.array_equal(engine.run(feeds(2, seed))["image"], expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_is_wrong_is_one_line(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OpenVinoEngine(decoder.with_suffix(".xml"), threads=1)
    with pytest.raises(EngineError, match=r"vae_decoder.xml failed: .*; it was given latent float32 \(2, 5, 6, 8\)"):
        engine.run({"latent": np.zeros((2, 5, 6, 8), np.float32)})
    (tmp_path / "x.xml").write_text("no graph")
    with pytest.raises(EngineError, match=r"OpenVINO cannot open .*x\.xml: .*; build the engine again"):
        OpenVinoEngine(tmp_path / "x.xml")
    (tmp_path / "x.onnx").write_text("no graph")
    with pytest.raises(ExportError, match="x: OpenVINO cannot read the graph"):
        to_openvino(tmp_path / "x.onnx", tmp_path / "y.xml", component="unet")
    monkeypatch.setattr(openvino.Core, "get_property", lambda self, device, name: ["FP32", "INT8"])
    with pytest.raises(EngineError, match=r"computes in bf16, which this CPU does not have \(it has FP32, INT8\)"):
        OpenVinoEngine(decoder.with_suffix(".xml"), precision="bf16")
