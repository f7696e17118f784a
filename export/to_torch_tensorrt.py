"""A torch module to TensorRT by way of torch-tensorrt: what TensorRT does not take stays in torch.

Checked against the signatures of torch-tensorrt 2.11 and 2.14 (tests/contract/test_torch_tensorrt.py); no engine of it
has run on a GPU yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldm_deploy.errors import ExportError
from ldm_deploy.export.graph import root_cause
from ldm_deploy.export.program import count_precisions, to_program

if TYPE_CHECKING:
    from ldm_deploy.eval.parity import Arrays
    from ldm_deploy.export.to_onnx import Axes
    from ldm_deploy.export.traced import Shapes


def to_torch_tensorrt(
    module: nn.Module, inputs: Arrays, axes: Axes, shapes: Shapes, path: Path, *, component: str
) -> dict[str, Any]:
    """Write `path` (.ep), an exported program with TensorRT engines in it, for sizes within `shapes`.

    Returns `precision_found` and `built_for`. Types are those of the module (strong typing), TF32 is off. Raises
    `ExportError`, also where torch-tensorrt or a GPU is missing.
    """
    from ldm_deploy.runtime.engine_torch import torch_properties

    try:
        import torch_tensorrt
    except ImportError as error:
        raise ExportError(
            f"torch-tensorrt is not installed ({error}); on a machine with an NVIDIA GPU: pip install 'ldm-deploy[gpu]'"
        ) from None
    made_for = {**torch_properties("cuda"), "torch_tensorrt": torch_tensorrt.__version__}
    program = to_program(module, inputs, axes, device="cuda", bounds=shapes, component=component)
    given = tuple(
        torch_tensorrt.Input(
            min_shape=smallest,
            opt_shape=usual,
            max_shape=largest,
            dtype=torch.from_numpy(inputs[name]).dtype,
            name=name,
        )
        for name, (smallest, usual, largest) in shapes.items()
    )
    try:
        compiled = torch_tensorrt.dynamo.compile(
            program, arg_inputs=given, disable_tf32=True, cache_built_engines=False, reuse_cached_engines=False
        )
        torch_tensorrt.save(compiled, str(path), output_format="exported_program", arg_inputs=given, retrace=False)
    except Exception as error:
        raise ExportError(f"{component}: torch-tensorrt built nothing: {root_cause(error)}") from error
    return {"precision_found": count_precisions(program), "built_for": made_for}
