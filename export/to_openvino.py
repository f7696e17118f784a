"""An ONNX file to OpenVINO's intermediate representation, weights as they are."""

from __future__ import annotations

from pathlib import Path

from ldm_deploy.errors import ExportError


def to_openvino(onnx: Path, xml: Path) -> list[Path]:
    """Write `xml` and the weights beside it, `<name>.bin`; returns both.

    Weights keep their type: OpenVINO would store them as fp16 if not told otherwise. Raises `ExportError`.
    """
    import openvino

    try:
        model = openvino.Core().read_model(onnx)
        openvino.save_model(model, xml, compress_to_fp16=False)
    except RuntimeError as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise ExportError(f"{onnx.stem}: OpenVINO cannot read the graph: {reason}") from None
    return [xml, xml.with_suffix(".bin")]
