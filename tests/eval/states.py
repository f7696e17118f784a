"""The reports that a reader can meet."""

from __future__ import annotations

from typing import Any

from ldm_deploy.eval.measure import BASELINE
from tests.eval.studies import search, sensitivity, timestep_error

INT8 = "int8-onnxruntime-cpu"
REFUSED = {
    "name": "unet-int8-openvino-cpu", "component": "unet", "runtime": "openvino", "device": "cpu", "precision": "int8",
    "reason": "not faster", "parity": {"relative_error": None, "limit": 0.1, "passed": False}, "speedup": None,
    "costly_ops": [{"op": "QLinearSoftmax", "ms": 1.5, "share": 0.4}],
}  # fmt: skip


def prepare(case: Any, state: str) -> Any:
    """The report in one of the states a reader can meet."""
    if state == "refused":
        case.data["refused"] = [REFUSED]
    elif state == "variant failed":
        case.lose(INT8, "its worker died")
    elif state == "baseline failed":
        case.lose(BASELINE, "its worker died")
    elif state == "empty":
        case.data["variants"] = []
    result = case.report()
    if state == "studies":
        result.studies = {"sensitivity": sensitivity(), "timestep_error": timestep_error(), "search": search()}
    return result


STATES = ["all well", "studies", "refused", "variant failed", "baseline failed", "empty"]
