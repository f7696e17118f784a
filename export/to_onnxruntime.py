"""An ONNX file as ONNX Runtime's CPU runs it fastest."""

from __future__ import annotations

from pathlib import Path

from ldm_deploy.export.passes.fused_attention import fuse_attention


def to_onnxruntime(onnx: Path, path: Path) -> list[Path]:
    """Write `path`, with the passes that pay off there; weights that lie beside `onnx` go to `<file>.data`."""
    import onnx_ir

    data = onnx.with_name(f"{onnx.name}.data").exists()
    model = onnx_ir.load(onnx)
    fuse_attention(model)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if data else None)
    return [path, *([path.with_name(f"{path.name}.data")] if data else [])]
