"""An ONNX file to OpenVINO's intermediate representation, weights as they are."""

from __future__ import annotations

from pathlib import Path

from ldm_deploy.errors import ExportError
from ldm_deploy.export.passes.norm_by_channel import norm_by_channel

# Components that work on maps as large as the image, where moving pixels costs more than a few operations more.
LARGE_MAPS = ("vae_decoder", "vae_encoder")


def to_openvino(onnx: Path, xml: Path, *, component: str) -> list[Path]:
    """Write `xml` and the weights beside it, `<name>.bin`; returns both.

    Norms of an autoencoder are rewritten as its kernels want them. Weights keep their type: OpenVINO would store them
    as fp16 if not told otherwise. Raises `ExportError`.
    """
    import onnx_ir
    import openvino

    rewritten = onnx.with_name(f"{onnx.stem}-for-openvino.onnx")
    try:
        if component in LARGE_MAPS:
            graph = onnx_ir.load(onnx)
            norm_by_channel(graph)
            onnx_ir.save(graph, rewritten)  # beside the file: external weights are named relative to it
        model = openvino.Core().read_model(rewritten if component in LARGE_MAPS else onnx)
        openvino.save_model(model, xml, compress_to_fp16=False)
    except RuntimeError as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise ExportError(f"{onnx.stem}: OpenVINO cannot read the graph: {reason}") from None
    finally:
        rewritten.unlink(missing_ok=True)
    return [xml, xml.with_suffix(".bin")]
