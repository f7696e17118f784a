"""A whole bundle of four toy engines, built in milliseconds with onnx alone, for every test that needs a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CONTEXT_LENGTH, WIDTH, VOCABULARY = 16, 8, 300
CAPTIONS = ("red apple", "cat face", "rocket", "sun", "a")
MODEL = {
    "kind": "latent-diffusion",
    "downsampling": 4,
    "latent_channels": 4,
    "scale_factor": 0.5,
    "default_size": [32, 32],
    "size_multiple": 16,
    "context_length": CONTEXT_LENGTH,
    "license": "Apache-2.0",
}
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_zero_terminal_snr": True,
    "timestep_spacing": "trailing",
}


def write_tiny_bundle(directory: Path, *, unet_bias: float = 0.0) -> Path:
    """Write a bundle with the variant `fp32-onnxruntime-cpu`. `unet_bias` is added to predictions (NaN allowed)."""
    from ldm_deploy.runtime.bundle import write_bundle

    directory.mkdir(parents=True)
    (directory / "engines").mkdir()
    write_tokenizer(directory / "tokenizer.json")
    engines = []
    for component, model in tiny_models(unet_bias).items():
        file = f"engines/{component}-fp32.onnx"
        (directory / file).write_bytes(model.SerializeToString())
        engines.append(
            {
                "id": f"{component}-fp32-onnxruntime-cpu",
                "component": component,
                "precision": "fp32",
                "runtime": "onnxruntime",
                "runtime_versions": ">=1.22",
                "device": "cpu",
                "built_for": None,
                "files": [file],
                "inputs": [],
                "outputs": [],
                "size_bytes": (directory / file).stat().st_size,
                "precision_found": {"fp32": 1},
                "parity": {"relative_error": 0.0, "limit": 1e-4, "passed": True},
            }
        )
    data: dict[str, Any] = {
        "format": 1,
        "name": "tiny",
        "created": "2026-01-01T00:00:00+00:00",
        "toolchain": {"ldm_deploy": "0"},
        "parents": {"reference": "sha256:" + "0" * 64},
        "model": MODEL,
        "schedule": SCHEDULE,
        "tokenizer": "tokenizer.json",
        "default_variant": "fp32-onnxruntime-cpu",
        "engines": engines,
        "variants": [
            {
                "name": "fp32-onnxruntime-cpu",
                "engines": [engine["id"] for engine in engines],
                "steps": 3,
                "guidance_scale": 2.0,
                "sampler": "ddim",
            }
        ],
        "refused": [],
    }
    write_bundle(directory, data)
    return directory


def write_tokenizer(path: Path) -> None:
    from ldm_deploy.training.tokenizer import train_tokenizer

    train_tokenizer(CAPTIONS, VOCABULARY, CONTEXT_LENGTH).save(str(path))


def tiny_models(unet_bias: float = 0.0) -> dict[str, Any]:
    """component -> `onnx.ModelProto` with the contract's names and symbolic axes."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)

    def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def build(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, np.ndarray]) -> Any:
        initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def weights(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    hidden = ["batch", "sequence", WIDTH]
    sample = ["batch", 4, "height", "width"]
    node = helper.make_node
    return {
        "text_encoder": build(
            [node("Gather", ["table", "input_ids"], ["encoder_hidden_states"])],
            [value("input_ids", ["batch", "sequence"], TensorProto.INT64)],
            [value("encoder_hidden_states", hidden)],
            {"table": weights(VOCABULARY, WIDTH)},
        ),
        # prediction = conv(sample) + mean(caption) + timestep / 1000 + bias
        "unet": build(
            [
                node("Conv", ["sample", "kernel"], ["mixed"], pads=[1, 1, 1, 1]),
                node("ReduceMean", ["encoder_hidden_states", "axes"], ["meaning"], keepdims=1),
                node("Unsqueeze", ["meaning", "last"], ["meaning4"]),
                node("Cast", ["timestep"], ["time"], to=TensorProto.FLOAT),
                node("Mul", ["time", "thousandth"], ["fraction"]),
                node("Reshape", ["fraction", "column"], ["time4"]),
                node("Add", ["mixed", "meaning4"], ["a"]),
                node("Add", ["a", "time4"], ["b"]),
                node("Add", ["b", "bias"], ["prediction"]),
            ],
            [
                value("sample", sample),
                value("timestep", ["batch"], TensorProto.INT64),
                value("encoder_hidden_states", hidden),
            ],
            [value("prediction", sample)],
            {
                "kernel": weights(4, 4, 3, 3) * 0.05,
                "axes": np.array([1, 2]),
                "last": np.array([3]),
                "thousandth": np.float32(0.001),
                "column": np.array([-1, 1, 1, 1]),
                "bias": np.float32(unet_bias),
            },
        ),
        "vae_encoder": build(
            [
                node("AveragePool", ["image"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
                node("Conv", ["pooled", "kernel"], ["latent_mean"]),
                node("Mul", ["latent_mean", "zero"], ["latent_logvar"]),
            ],
            [value("image", ["batch", 3, "H", "W"])],
            [value("latent_mean", ["batch", 4, "h", "w"]), value("latent_logvar", ["batch", 4, "h", "w"])],
            {"kernel": weights(4, 3, 1, 1), "zero": np.float32(0)},
        ),
        "vae_decoder": build(
            [
                node("Resize", ["latent", "", "scales"], ["large"], mode="nearest"),
                node("Conv", ["large", "kernel"], ["colours"]),
                node("Tanh", ["colours"], ["image"]),
            ],
            [value("latent", ["batch", 4, "h", "w"])],
            [value("image", ["batch", 3, "H", "W"])],
            {"scales": np.array([1, 1, 4, 4], dtype=np.float32), "kernel": weights(3, 4, 1, 1) * 0.5},
        ),
    }
