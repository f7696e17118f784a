"""The faults of benchmarks/gate_power.py change what they say and nothing else, in float and in quantized graphs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.tiny_bundle import tiny_models


@pytest.fixture(scope="module")
def faults(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted_faults", root / "benchmarks" / "planted_faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def constants(models: dict[str, Any]) -> dict[tuple[str, str], np.ndarray]:
    from onnx import numpy_helper

    return {
        (component, entry.name): np.asarray(numpy_helper.to_array(entry)).copy()
        for component, model in models.items()
        for entry in model.graph.initializer
    }


def changed(models: dict[str, Any], before: dict[tuple[str, str], np.ndarray]) -> set[tuple[str, str]]:
    after = constants(models)
    return {key for key in before if not np.array_equal(before[key], after[key])}


def quantized() -> dict[str, Any]:
    """A convolution as the quantizer leaves it: int8 weight and int32 bias, each behind a DequantizeLinear."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.integers(-127, 128, (6, 3, 3, 3)).astype(np.int8),
        "w_scale": rng.uniform(0.01, 0.02, 6).astype(np.float32),
        "w_zero": np.zeros(6, np.int8),
        "b": rng.integers(-1000, 1000, 6).astype(np.int32),
        "b_scale": rng.uniform(0.001, 0.002, 6).astype(np.float32),
        "b_zero": np.zeros(6, np.int32),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["weight"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bias"], axis=0),
        helper.make_node("Conv", ["x", "weight", "bias"], ["y"], name="conv"),
    ]
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 6, 6])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    return {"unet": helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)}


def run(model: Any, **feeds: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


X = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}


def test_a_scale_is_multiplied_in_one_layer(faults: ModuleType) -> None:
    seen = set()
    for seed in range(12):
        models = tiny_models()
        before = constants(models)
        component, _ = faults.scale_a_layer(models, np.random.default_rng(seed))
        assert changed(models, before) == {(component, "kernel")}
        kernel = constants(models)[component, "kernel"]
        np.testing.assert_allclose(kernel, 1.1 * before[component, "kernel"], rtol=1e-6)
        seen.add(component)
    assert seen == {"unet", "vae_encoder", "vae_decoder"}  # every component that has a layer


def test_of_a_quantized_layer_it_is_the_scale_of_the_weight(faults: ModuleType) -> None:
    models = quantized()
    before, bias = constants(models), run(quantized()["unet"], x=np.zeros_like(X["x"]))
    plain = run(models["unet"], **X)
    faults.scale_a_layer(models, np.random.default_rng(0))
    assert changed(models, before) == {("unet", "w_scale")}
    np.testing.assert_allclose(run(models["unet"], **X) - bias, 1.1 * (plain - bias), rtol=1e-4, atol=1e-5)


def test_two_channels_are_swapped_with_everything_that_is_theirs(faults: ModuleType) -> None:
    models = quantized()
    plain = run(models["unet"], **X)
    _, what = faults.swap_two_channels(models, np.random.default_rng(3))
    first, second = (int(word) for word in what.split() if word.isdigit())
    assert first != second
    order = list(range(6))
    order[first], order[second] = second, first
    np.testing.assert_array_equal(run(models["unet"], **X), plain[:, order])


def test_one_colour_is_half_a_grey_level_off_before_rounding(faults: ModuleType) -> None:
    """The toy's decoder ends with a tanh, so the shift is looked at where it is planted: after the convolution."""
    from onnx import helper

    def decoder() -> Any:
        model = tiny_models()["vae_decoder"]
        model.graph.node[-1].CopyFrom(helper.make_node("Identity", ["colours"], ["image"]))
        return model

    latent = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    seen = set()
    for seed in range(20):
        models = {"vae_decoder": decoder()}
        component, what = faults.shift_a_colour(models, np.random.default_rng(seed))
        shift = 127.5 * (run(models["vae_decoder"], latent=latent) - run(decoder(), latent=latent))
        colour, sign = what.split()[:2]
        expected = np.zeros((2, 3, 16, 16))
        expected[:, ["red", "green", "blue"].index(colour)] = float(sign)
        np.testing.assert_allclose(shift, expected, atol=1e-3)
        assert (component, abs(float(sign))) == ("vae_decoder", 0.5)
        seen.add((colour, sign))
    assert len(seen) == 6
