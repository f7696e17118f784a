"""The whole way from token ids and noise to an image as one ONNX graph: an application then needs one call.

Text encoder, sampler loop (ONNX Loop around the U-Net, whose weights lie outside and are stored once), guidance and
decoder. The empty prompt's ids, the timesteps and the sampler's coefficients are constants inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.diffusion.samplers import step_coefficients
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.export.to_onnx import EXTERNAL_DATA_BYTES

PARTS = ("text_encoder", "unet", "vae_decoder")


def to_single_graph(
    parts: Mapping[str, Path],
    path: Path,
    *,
    model: Mapping[str, Any],
    schedule: Schedule,
    sampler: str,
    steps: int,
    empty_ids: Sequence[int],
) -> None:
    """Write `path` from the ONNX files of `PARTS`.

    Inputs: `input_ids` int64 (batch, len(empty_ids)), `noise` float (batch, z, H/f, W/f), `guidance_scale` float ().
    Output: `image` uint8 (batch, H, W, 3). Computes what `runtime.pipeline.Pipeline` computes with `steps` steps of
    `sampler`, always with both halves of guidance. Raises `ConfigError` for a sampler that draws noise on the way.
    """
    import onnx
    from onnx import TensorProto, helper

    graphs = {name: onnx.compose.add_prefix(onnx.load(str(parts[name])), f"{name}/").graph for name in PARTS}
    opset = max(_opset(parts[name]) for name in PARTS)
    text, unet, decoder = (graphs[name] for name in PARTS)
    constants = _Constants()
    timesteps, coefficients = step_coefficients(sampler, schedule, steps)
    node = helper.make_node

    before = [
        node("Shape", ["input_ids"], ["ids_shape"]),
        node("Expand", [constants("empty_ids", np.array([empty_ids], np.int64)), "ids_shape"], ["empty"]),
        node("Concat", ["empty", "input_ids"], ["text_encoder/input_ids"], axis=0),
        *text.node,
        node("Mul", ["noise", constants("zero", np.float32(0))], ["no_original"]),
        node("Loop", [constants("steps", np.int64(steps)), "", "noise", "no_original"], ["latents", "last_original"],
             body=_body(unet, text, constants, timesteps, coefficients)),
    ]  # fmt: skip
    after = [
        node("Div", ["latents", constants("scale_factor", np.float32(model["scale_factor"]))], ["vae_decoder/latent"]),
        *decoder.node,
        node("Add", ["vae_decoder/image", constants("one", np.float32(1))], ["from_zero"]),
        node("Mul", ["from_zero", constants("half_range", np.float32(127.5))], ["levels"]),
        node("Clip", ["levels", "zero", constants("white", np.float32(255))], ["clipped"]),
        # Half up, as floor(x + 1/2): the same as on the host.
        node("Add", ["clipped", constants("half", np.float32(0.5))], ["shifted"]),
        node("Floor", ["shifted"], ["whole"]),
        node("Cast", ["whole"], ["pixels"], to=TensorProto.UINT8),
        node("Transpose", ["pixels"], ["image"], perm=[0, 2, 3, 1]),
    ]
    f = model["downsampling"]
    value = helper.make_tensor_value_info
    latent = ["batch", model["latent_channels"], f"H/{f}", f"W/{f}"]
    graph = helper.make_graph(
        [*before, *after],
        "pipeline",
        [
            value("input_ids", TensorProto.INT64, ["batch", len(empty_ids)]),
            value("noise", TensorProto.FLOAT, latent),
            value("guidance_scale", TensorProto.FLOAT, []),
        ],
        [value("image", TensorProto.UINT8, ["batch", "H", "W", 3])],
        [*constants.tensors, *(tensor for part in (text, unet, decoder) for tensor in part.initializer)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    external = made.ByteSize() > EXTERNAL_DATA_BYTES
    onnx.save_model(
        made, str(path), save_as_external_data=external, location=f"{path.name}.data", size_threshold=1024
    )  # fmt: skip


def _body(unet: Any, text: Any, constants: _Constants, timesteps: np.ndarray, coefficients: np.ndarray) -> Any:
    """One step: prediction for both halves, guidance, then the sampler, which is linear in what it is given."""
    from onnx import TensorProto, helper

    node = helper.make_node
    # What the text encoder gives goes to the U-Net by name, whatever there is.
    given = [output.name.removeprefix("text_encoder/") for output in text.output]
    rows = dict(zip(("sample", "prediction", "earlier", "original_sample", "original_prediction"), coefficients.T,
                    strict=True))  # fmt: skip
    nodes = [
        *(node("Identity", [f"text_encoder/{name}"], [f"unet/{name}"]) for name in given),
        node("Concat", ["x", "x"], ["unet/sample"], axis=0),
        node("Shape", ["unet/sample"], ["both"], start=0, end=1),
        node("Gather", [constants("timesteps", timesteps), "index"], ["timestep"], axis=0),
        node("Expand", ["timestep", "both"], ["unet/timestep"]),
        *unet.node,
        node("Split", ["unet/prediction"], ["unconditional", "conditional"], axis=0, num_outputs=2),
        node("Sub", ["conditional", "unconditional"], ["direction"]),
        node("Mul", ["direction", "guidance_scale"], ["guidance"]),
        node("Add", ["unconditional", "guidance"], ["prediction"]),
    ]
    for name, column in rows.items():
        table = constants(f"of_{name}", column.astype(np.float32))
        nodes.append(node("Gather", [table, "index"], [f"c_{name}"], axis=0))
    nodes += [
        node("Mul", ["x", "c_original_sample"], ["original_1"]),
        node("Mul", ["prediction", "c_original_prediction"], ["original_2"]),
        node("Add", ["original_1", "original_2"], ["original"]),
        node("Mul", ["x", "c_sample"], ["next_1"]),
        node("Mul", ["prediction", "c_prediction"], ["next_2"]),
        node("Mul", ["earlier", "c_earlier"], ["next_3"]),
        node("Add", ["next_1", "next_2"], ["next_12"]),
        node("Add", ["next_12", "next_3"], ["next"]),
        node("Identity", ["go_on"], ["still"]),
    ]
    value = helper.make_tensor_value_info
    latent = value("x", TensorProto.FLOAT, [None] * 4)
    return helper.make_graph(
        nodes,
        "step",
        [value("index", TensorProto.INT64, []), value("go_on", TensorProto.BOOL, []), latent,
         value("earlier", TensorProto.FLOAT, [None] * 4)],
        [value("still", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, [None] * 4),
         value("original", TensorProto.FLOAT, [None] * 4)],
    )  # fmt: skip


class _Constants:
    """Initializers of the main graph, which the loop's body sees, too."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []

    def __call__(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _opset(path: Path) -> int:
    from ldm_deploy.onnx_graph import load_model, read_opset

    return read_opset(load_model(path, weights=False))
