"""A torch module goes in, an ONNX file comes out: free axes named, nothing of this machine in it."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ldm_deploy.models.components import Signature

Axes = Mapping[str, Mapping[int, str]]  # input or output name -> {dimension: its symbol}

OPSET = 20  # the first with Gelu; what the dynamo exporter writes without a conversion
EXTERNAL_DATA_BYTES = 2**31 - 2**24  # a protobuf holds less than 2 GiB; the graph itself needs some of it


def component_axes(component: str, downsampling: int, signature: Signature) -> tuple[Axes, Axes]:
    """The symbolic axes of a component's inputs and outputs, as CONTRACTS.md names them."""
    image = {0: "batch", 2: "H", 3: "W"}
    latent = {0: "batch", 2: f"H/{downsampling}", 3: f"W/{downsampling}"}
    sample = {0: "batch", 2: "height", 3: "width"}
    tokens = {0: "batch", 1: "sequence"}
    table: Axes = {
        "input_ids": tokens,
        "encoder_hidden_states": tokens,
        "text_embeds": {0: "batch"},
        "sample": sample,
        "timestep": {0: "batch"},
        "guidance_scale": {0: "batch"},
        "prediction": sample,
        "image": image,
        "latent_mean": latent,
        "latent_logvar": latent,
        "latent": latent,
    }
    inputs, outputs = signature
    return {name: table[name] for name in inputs}, {name: table[name] for name in outputs}


def export_module(
    module: nn.Module,
    inputs: Mapping[str, np.ndarray],
    input_axes: Axes,
    output_axes: Axes,
    path: Path,
    *,
    component: str,
) -> None:
    """Write `module` as ONNX.

    `inputs`: example arrays by the names of `module.forward`'s parameters, or in their order; every symbolic axis must
    be 2 or longer in them, because torch treats lengths of 0 and 1 as constants. `input_axes` names the symbolic axes;
    one that the trace fixed, or tied to another one, raises `ExportError`. `output_axes`: all outputs by name, with the
    names of their axes; an axis without one gets what follows from the inputs, as "8*height". Weights beyond 2 GiB go
    to `<file>.data`.
    """
    import onnx_ir
    import torch

    from ldm_deploy.export.attention import written_out
    from ldm_deploy.export.graph import bind, root_cause
    from ldm_deploy.export.passes.split_linear import split_linear

    for name, axes in input_axes.items():
        for axis, symbol in axes.items():
            if inputs[name].shape[axis] < 2:
                raise ExportError(
                    f"{component}: example input {name!r} has length {inputs[name].shape[axis]} on axis {axis} "
                    f"({symbol}); give 2 or more, shorter ones are traced as constants"
                )
    args, kwargs, dynamic = bind(module, inputs, input_axes)
    try:
        with _quiet_exporter(), written_out():
            program = torch.onnx.export(
                module,
                args,
                kwargs=kwargs,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(output_axes),
                dynamic_shapes=dynamic,
            )
    except Exception as error:
        raise ExportError(
            f"{component}: torch.onnx.export failed: {root_cause(error)}; "
            "rewrite the part of forward() that depends on tensor values or uses an operator without ONNX form"
        ) from error
    assert program is not None
    model = program.model
    symbols = _name_inputs(model.graph.inputs, input_axes, component)
    _name_outputs(model.graph.outputs, output_axes, symbols, component)
    split_linear(model)  # while shapes are known
    _remove_traces(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None)
    for value in model.graph.initializers.values():
        value.const_value = None  # onnxscript's rewriter remembers the last graph it met, and its weights with it


def _name_inputs(values: Sequence[Any], axes: Axes, component: str) -> dict[str, str]:
    """Give symbolic axes their names; returns torch's names for them with ours.

    Raises `ExportError` for one that is fixed or tied to another.
    """
    symbols: dict[str, str] = {}
    for value in values:
        shape = list(value.shape)
        for axis, symbol in axes.get(value.name, {}).items():
            _check_free(shape[axis], value.name, axis, symbol, "input", component)
            other = symbols.setdefault(str(shape[axis]), symbol)
            if other != symbol:
                raise ExportError(
                    f"{component}: axis {axis} ({symbol}) of input {value.name!r} was tied to {other!r} by the "
                    "export; forward() only works where the two are equal"
                )
        value.shape = type(value.shape)([axes.get(value.name, {}).get(axis, size) for axis, size in enumerate(shape)])
    return symbols


def _name_outputs(values: Sequence[Any], axes: Axes, symbols: Mapping[str, str], component: str) -> None:
    """The same for outputs; an axis without a name of its own is written in those of the inputs."""
    for value in values:
        named = axes.get(value.name, {})
        shape: list[int | str] = []
        for axis, found in enumerate(value.shape):
            if axis in named:
                _check_free(found, value.name, axis, named[axis], "output", component)
                shape.append(named[axis])
            elif isinstance(found, int):
                shape.append(found)
            else:
                shape.append(re.sub(r"[A-Za-z_]\w*", lambda match: symbols.get(match[0], match[0]), str(found)))
        value.shape = type(value.shape)(shape)


def _check_free(found: Any, name: str, axis: int, symbol: str, kind: str, component: str) -> None:
    if isinstance(found, int):
        raise ExportError(
            f"{component}: axis {axis} ({symbol}) of {kind} {name!r} was fixed to {found} by the export; "
            "forward() must not turn this size into a Python number"
        )


def _remove_traces(model: Any) -> None:
    """Drop what the exporter notes about this machine (file paths, stack traces) and shapes in torch's own symbols."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch and onnxscript warn about their own innards; what matters is checked on the result."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
