"""An ONNX file as ONNX Runtime's CPU runs it fastest."""

from __future__ import annotations

import shutil
from pathlib import Path

from ldm_deploy.export.passes.fused_attention import fuse_attention


def to_onnxruntime(onnx: Path, folder: Path) -> list[Path]:
    """Write the file into `folder` under its own name, with the passes that pay off there.

    Weights that lie beside it, in `<file>.data`, are copied as they are.
    """
    import onnx_ir

    model, path = onnx_ir.load(onnx), folder / onnx.name
    fuse_attention(model)
    onnx_ir.save(model, path)
    data = onnx.with_name(f"{onnx.name}.data")
    if not data.exists():
        return [path]
    shutil.copyfile(data, folder / data.name)  # no link: onnx takes one for an attack
    return [path, folder / data.name]
