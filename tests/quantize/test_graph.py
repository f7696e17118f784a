"""What the recipe does to a graph: which nodes, which scales, and that axes stay free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from ldm_deploy.errors import QuantizationError
from ldm_deploy.onnx_graph import count_precisions, load_model, optimized_model, precision_found, read_signature
from ldm_deploy.quantize.cpu import has_vnni
from ldm_deploy.quantize.observe import observe
from ldm_deploy.quantize.onnxruntime_cpu import RECIPES, observe_graph, quantize_graph
from ldm_deploy.quantize.scheme import RANGE_METHODS, Recipe

Feeds = dict[str, np.ndarray]
# As `ldm-deploy quantize` does: without VNNI products of eight bits saturate.
RECIPE = replace(RECIPES["conv+matmul"], reduce_range=has_vnni() is False)


def run(path: Path, feeds: Feeds) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, feeds)[0]
    return output


def error(path: Path, other: Path, feeds: Feeds) -> float:
    expected, found = run(path, feeds), run(other, feeds)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def quantized(denoiser: Path, samples: list[Feeds], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "unet-int8.onnx"
    result = quantize_graph(denoiser, path, samples, RECIPE, threads=1)
    assert result.nodes == {"Conv": 1, "MatMul": 3}
    return path


def test_it_computes_what_the_float_graph_does_at_every_size(
    denoiser: Path, quantized: Path, samples: list[Feeds]
) -> None:
    assert read_signature(load_model(quantized)) == read_signature(load_model(denoiser))
    onnx.checker.check_model(str(quantized))
    for sizes in ((1, 8, 12, 5), (3, 4, 20, 2), (2, 16, 6, 9)):
        batch, height, width, sequence = sizes
        feeds = {name: np.repeat(value, batch, 0) for name, value in samples[0].items()}
        feeds["sample"] = np.resize(feeds["sample"], (batch, 4, height, width))
        feeds["encoder_hidden_states"] = np.resize(feeds["encoder_hidden_states"], (batch, sequence, 8))
        assert 0 < error(denoiser, quantized, feeds) < 0.05


def test_no_attention_product_is_quantized(quantized: Path) -> None:
    model = load_model(quantized)
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    products = {node.name: node for node in model.graph.node if node.op_type == "MatMul"}
    for name in ("scores", "attend"):
        assert not dequantized & set(products[name].input)
    for name in ("to_q", "to_k", "to_v"):
        assert set(products[name].input) <= dequantized
    names = [node.op_type for node in optimized_model(quantized).graph.node]
    assert "QLinearSoftmax" not in names
    assert "QLinearConv" in names


def test_weights_have_one_scale_per_output_channel(quantized: Path) -> None:
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in load_model(quantized).graph.initializer}
    axes = {"middle.weight": 0, "q.weight": 1, "k.weight": 1, "v.weight": 1}
    for name, axis in axes.items():
        stored = constants[f"{name}_dequantized_{axis}_quantized"]
        scale = constants[f"{name}_dequantized_{axis}_scale"]
        assert stored.dtype == np.int8
        assert scale.shape == (stored.shape[axis],)
        assert name not in constants  # the float copy is gone
    assert "first.weight" in constants  # few channels: float


def test_what_onnx_runtime_runs_is_read_back(denoiser: Path, quantized: Path) -> None:
    assert precision_found(denoiser) == {"fp32": 9}
    assert precision_found(quantized) == {"fp32": 5, "int8": 4}
    # The file itself says Conv and MatMul: only the optimized graph tells what runs.
    assert count_precisions(load_model(quantized)) == {"fp32": 9}


def test_a_tensor_read_by_many_is_quantized_once(quantized: Path) -> None:
    names = [node.name for node in load_model(quantized).graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(names) == sorted(set(names))
    assert sum(name.startswith("encoder_hidden_states") for name in names) == 1


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_every_range_method_gives_a_usable_graph(
    denoiser: Path, samples: list[Feeds], tmp_path: Path, method: str
) -> None:
    recipe = replace(RECIPE, range_method=method)
    quantize_graph(denoiser, tmp_path / "model.onnx", samples, recipe, threads=1)
    # Entropy clips what a few thousand values seldom reach.
    assert error(denoiser, tmp_path / "model.onnx", samples[3]) < (0.15 if method == "entropy" else 0.05)


def test_an_output_with_channels_of_different_size_is_rounded_by_channel(
    denoiser: Path, samples: list[Feeds], tmp_path: Path
) -> None:
    """`middle` has weights from 0.05 to 5, and still runs as QLinearConv."""
    recipe = replace(RECIPE, op_types=("Conv",), by_channel=True)
    quantize_graph(denoiser, tmp_path / "channels.onnx", samples, recipe, threads=1)
    constants = {t.name: numpy_helper.to_array(t) for t in load_model(tmp_path / "channels.onnx").graph.initializer}
    assert constants["h3_scale"].shape == constants["h3_zero_point"].shape == (16,)
    assert constants["h3_scale"].max() > 20 * constants["h3_scale"].min()
    assert precision_found(tmp_path / "channels.onnx")["int8"] == 1
    quantize_graph(denoiser, tmp_path / "single.onnx", samples, replace(recipe, by_channel=False), threads=1)
    assert error(denoiser, tmp_path / "channels.onnx", samples[3]) < error(
        denoiser, tmp_path / "single.onnx", samples[3]
    )

    def channel_errors(path: Path) -> np.ndarray:
        """Of what `middle` gives, relative to each channel's own size."""
        found = [run(with_output(model, tmp_path / "inner.onnx", "h3"), samples[3]) for model in (denoiser, path)]
        difference, size = (np.sqrt((value**2).sum((0, 2, 3))) for value in (found[1] - found[0], found[0]))
        return difference / size

    before, after = channel_errors(tmp_path / "single.onnx"), channel_errors(tmp_path / "channels.onnx")
    assert after.max() < 0.03 < 0.06 < before.max()


def test_a_bias_that_is_computed_stays_as_it_is(denoiser: Path, samples: list[Feeds], tmp_path: Path) -> None:
    model = load_model(denoiser)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "middle.bias")
    bias.name = "middle.half"
    model.graph.node.insert(0, onnx.helper.make_node("Add", ["middle.half", "middle.half"], ["middle.bias"], "double"))
    onnx.save(model, tmp_path / "model.onnx")
    recipe = replace(RECIPE, op_types=("Conv",), by_channel=True)
    quantize_graph(tmp_path / "model.onnx", tmp_path / "q.onnx", samples, recipe, threads=1)
    assert error(tmp_path / "model.onnx", tmp_path / "q.onnx", samples[3]) < 0.1


@pytest.mark.parametrize("reader", ["Sigmoid", "LeakyRelu", "GlobalAveragePool", "Add"])
def test_an_output_that_a_fused_kernel_reads_has_one_scale(
    denoiser: Path, samples: list[Feeds], tmp_path: Path, reader: str
) -> None:
    """Between quantized convolutions ONNX Runtime makes one INT8 kernel of these, which knows scalar scales only."""
    model = load_model(denoiser)
    last = next(node for node in model.graph.node if node.name == "last")
    inputs = ["h3", "h3"] if reader == "Add" else ["h3"]
    made = onnx.helper.make_node(reader, inputs, ["read"], "read")
    weight = np.random.default_rng(0).standard_normal((16, 16, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "after.weight"))
    after = onnx.helper.make_node("Conv", ["read", "after.weight"], ["after"], "after")
    add = onnx.helper.make_node("Add", ["h8", "after"], ["sum"], "sum")
    last.input[0] = "sum"
    nodes = list(model.graph.node)
    nodes[-1:-1] = [made, after, add]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "model.onnx")
    quantize_graph(
        tmp_path / "model.onnx",
        tmp_path / "q.onnx",
        samples,
        replace(RECIPE, op_types=("Conv",), by_channel=True),
        threads=1,
    )
    constants = {t.name: numpy_helper.to_array(t) for t in load_model(tmp_path / "q.onnx").graph.initializer}
    assert constants["h3_scale"].shape == ((16,) if reader == "Add" else ())
    assert error(tmp_path / "model.onnx", tmp_path / "q.onnx", samples[3]) < 0.1


@pytest.mark.parametrize("read", ["by the addition alone", "by two", "outside", "by no constant"])
def test_a_product_takes_the_bias_behind_it(
    denoiser: Path, samples: list[Feeds], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    model = load_model(denoiser)
    bias = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(bias, "q.bias"))
    nodes = list(model.graph.node)
    place = next(index for index, node in enumerate(nodes) if node.name == "to_q")
    nodes[place].output[0] = "product"
    added = [onnx.helper.make_node("Add", ["q.bias", "product"], ["q"], "bias")]
    if read == "by two":
        added = [*added, onnx.helper.make_node("Identity", ["product"], ["again"], "again")]
        model.graph.output.append(onnx.helper.make_tensor_value_info("again", onnx.TensorProto.FLOAT, None))
    if read == "outside":
        model.graph.output.append(onnx.helper.make_tensor_value_info("product", onnx.TensorProto.FLOAT, None))
    if read == "by no constant":
        added = [onnx.helper.make_node("Add", ["h5", "product"], ["q"], "bias")]
    nodes[place + 1 : place + 1] = added
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "model.onnx")
    quantize_graph(tmp_path / "model.onnx", tmp_path / "q.onnx", samples, RECIPE, threads=1)
    made = load_model(tmp_path / "q.onnx")
    assert any(node.name == "bias" for node in made.graph.node) == (read != "by the addition alone")
    assert {node.op_type: node.name for node in made.graph.node}.get("MatMulIntegerToFloat") == (
        "to_q" if read == "by the addition alone" else None
    )
    assert precision_found(tmp_path / "q.onnx")["int8"] == 4
    read_by = {name for node in made.graph.node for name in node.input} | {value.name for value in made.graph.output}
    assert all(set(node.output) & read_by for node in made.graph.node)
    # To the last bit what ONNX Runtime makes of Q/DQ pairs with the addition behind them.
    monkeypatch.setattr("ldm_deploy.quantize.qdq._Inserter._bias_additions", lambda self: {})
    quantize_graph(tmp_path / "model.onnx", tmp_path / "pairs.onnx", samples, RECIPE, threads=1)
    np.testing.assert_array_equal(run(tmp_path / "q.onnx", samples[3]), run(tmp_path / "pairs.onnx", samples[3]))


def with_output(path: Path, out: Path, name: str) -> Path:
    """The graph with the tensor `name` as its first output."""
    model = load_model(path)
    model.graph.output.insert(0, onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    onnx.save(model, out)
    return out


def test_gemm_can_be_asked_for_and_unknown_ranges_are_refused(
    denoiser: Path, samples: list[Feeds], tmp_path: Path
) -> None:
    recipe = Recipe(op_types=("Gemm",))
    quantize_graph(denoiser, tmp_path / "model.onnx", samples, recipe, threads=1)
    assert precision_found(tmp_path / "model.onnx")["int8"] == 1
    assert error(denoiser, tmp_path / "model.onnx", samples[0]) < 0.05
    with pytest.raises(QuantizationError, match=r"activation 't1' of unet-fp32.onnx was not observed"):
        quantize_graph(denoiser, tmp_path / "other.onnx", (), recipe, histograms={})
    with pytest.raises(QuantizationError, match="no ConvTranspose with constant weights to quantize"):
        quantize_graph(denoiser, tmp_path / "other.onnx", samples, Recipe(op_types=("ConvTranspose",)))


def test_all_recipes_share_one_observation(denoiser: Path, samples: list[Feeds], tmp_path: Path) -> None:
    histograms = observe_graph(denoiser, samples, threads=1)
    for name, recipe in RECIPES.items():
        quantize_graph(denoiser, tmp_path / f"{name}.onnx", (), recipe, histograms=histograms)


def test_observed_ranges_are_those_of_the_activations(denoiser: Path, samples: list[Feeds], tmp_path: Path) -> None:
    found = observe(denoiser, ["h2", "encoder_hidden_states"], samples, threads=1)
    context = np.concatenate([sample["encoder_hidden_states"].ravel() for sample in samples])
    assert found["encoder_hidden_states"].range("minmax") == (context.min(), context.max())
    assert found["encoder_hidden_states"].counts.sum() == context.size
    assert found["h2"].range("minmax")[0] == 0  # a ReLU
    assert found["h2"].channels is None
    told = observe(denoiser, ["h2", "h3"], samples, channels={"h3": 4}, threads=1)["h3"]
    values = np.concatenate([run(with_output(denoiser, tmp_path / "h3.onnx", "h3"), sample) for sample in samples])
    assert told.channels is not None
    np.testing.assert_allclose(told.channels[0], values.min(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(told.channels[1], values.max(axis=(0, 2, 3)), rtol=1e-6)
    assert told.range("minmax") == (told.channels[0].min(), told.channels[1].max())
    assert found["h2"].counts.sum() == len(samples) * 16 * 8 * 12


def test_a_sample_that_overflows_is_named(denoiser: Path, samples: list[Feeds]) -> None:
    bad = {**samples[1], "sample": samples[1]["sample"] * np.float32(np.inf)}
    with pytest.raises(
        QuantizationError, match=r"activation 'h2' is not finite on calibration sample 1, timestep \[\d+\]"
    ):
        observe(denoiser, ["h2"], [samples[0], bad], threads=1)
    with pytest.raises(QuantizationError, match="no samples"):
        observe(denoiser, ["h2"], [], threads=1)


def test_activations_are_fetched_in_bounded_pieces(
    denoiser: Path, samples: list[Feeds], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = observe(denoiser, ["h0", "h2", "h3"], samples, threads=1)
    monkeypatch.setattr("ldm_deploy.quantize.observe.CHUNK_BYTES", 1)
    pieces = observe(denoiser, ["h0", "h2", "h3"], samples, threads=1)
    for name, histogram in whole.items():
        np.testing.assert_array_equal(histogram.counts, pieces[name].counts)
