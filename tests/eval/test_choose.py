"""Which variant is chosen, on made-up measurements (see conftest.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ldm_deploy.eval.measure import BASELINE
from ldm_deploy.eval.report import exit_code

FP32, INT8 = "fp32-onnxruntime-cpu", "int8-onnxruntime-cpu"


def row_of(report: Any, name: str) -> dict[str, Any]:
    return next(row for row in report["variants"] if row["name"] == name)


def gate_of(report: Any, name: str, gate: str) -> dict[str, Any]:
    return next(entry for entry in row_of(report, name)["gates"] if entry["name"] == gate)


def test_the_fastest_that_keeps_the_budget_is_chosen(case: Any) -> None:
    report = case.report()
    assert report["chosen"] == INT8
    assert report["why"].startswith(f"{INT8} keeps every required limit and is faster than {FP32}")
    assert "against fp32-torch-cpu it has 2.50 times its speed (95 % interval 2.50 to 2.50)" in report["why"]
    (comparison,) = row_of(report, INT8)["comparisons"]
    assert comparison["versus"] == FP32
    assert comparison["scope"] == "end to end"
    assert abs(comparison["median"] - 1.5) < 1e-9
    assert exit_code(report) == 0


def test_component_speed_ups_are_against_the_fp32_engine_of_the_same_runtime(case: Any) -> None:
    report = case.report()
    int8, fp32 = (row_of(report, name)["components"][0]["speedup"] for name in (INT8, FP32))
    assert (int8["versus"], round(int8["median"], 6)) == (FP32, 2.0)
    assert (fp32["versus"], round(fp32["median"], 1)) == (BASELINE, 2.0)


def test_an_int8_variant_that_is_slower_than_fp32_is_refused(case: Any) -> None:
    case.found.latency_ms[INT8] = [70 / 60 * value for value in case.found.latency_ms[FP32]]
    report = case.report()
    assert row_of(report, INT8)["refused"] == (
        f"do no harm: it is not faster than {FP32}, 0.86 times its speed (95 % interval 0.86 to 0.86)"
    )
    assert all(gate["result"] == "pass" for gate in row_of(report, INT8)["gates"] if gate["name"] != "lpips_max")
    assert report["chosen"] == FP32
    assert f"Not chosen: {INT8}, because do no harm" in report["why"]


def test_an_int8_variant_that_may_or_may_not_be_faster_is_refused_too(case: Any) -> None:
    factors = np.array([0.8, 1.3, 0.7, 1.4])
    case.found.latency_ms[INT8] = list(np.array(case.found.latency_ms[FP32]) * factors)
    report = case.report()
    assert "do no harm: it is not shown to be faster" in row_of(report, INT8)["refused"]
    assert report["chosen"] == FP32


def test_a_failed_gate_excludes_even_where_it_is_not_required(case: Any) -> None:
    case.found.memory_bytes[INT8] = 500 * 2**20
    report = case.report()
    gate = gate_of(report, INT8, "peak_memory_max")
    assert (gate["result"], gate["required"], gate["limit"]) == ("fail", False, 400 * 2**20)
    assert report["chosen"] == FP32


def test_a_slow_runtime_fails_its_gate_and_nothing_is_chosen(case: Any) -> None:
    for name in (FP32, INT8):
        case.found.latency_ms[name] = [1.5 * value for value in case.found.latency_ms[BASELINE]]
    report = case.report()
    assert gate_of(report, FP32, "speedup_min")["result"] == "fail"
    assert report["chosen"] is None
    assert report["why"].startswith("No variant keeps its budget.")
    assert exit_code(report) == 3


def test_a_required_gate_that_is_too_noisy_is_exit_4(case: Any) -> None:
    case.data["variants"].pop()
    case.found.latency_ms[FP32] = list(np.array(case.found.latency_ms[BASELINE]) * [0.8, 1.3, 0.7, 1.4])
    report = case.report()
    gate = gate_of(report, FP32, "speedup_min")
    assert gate["result"] == "not measured"
    assert "too noisy" in gate["reason"]
    assert report["chosen"] is None
    assert exit_code(report) == 4


def test_without_a_baseline_ratios_are_not_measured_and_the_reason_is_passed_on(case: Any) -> None:
    case.lose(BASELINE, "fp32-torch-cpu: its worker died by SIGKILL")
    report = case.report()
    assert gate_of(report, FP32, "psnr_db_min")["reason"] == "fp32-torch-cpu drew no images; its row says why"
    assert gate_of(report, FP32, "speedup_min")["reason"] == "fp32-torch-cpu was not timed; its row says why"
    assert "its worker died by SIGKILL" in report["baseline"]["reason"]
    assert "its worker died by SIGKILL" in report["why"]
    assert gate_of(report, FP32, "peak_memory_max")["result"] == "not measured"
    assert gate_of(report, FP32, "size_max")["result"] == "pass"
    assert report["chosen"] is None
    assert exit_code(report) == 4


def test_a_budget_without_requirements_chooses_without_a_baseline(case: Any, budget_of: Callable[[str], Any]) -> None:
    case.budget = budget_of("[default]\nspeedup_min = 1.0\nrequired = []")
    case.lose(BASELINE, "gone")
    assert case.report()["chosen"] == INT8


def test_a_variant_that_failed_is_a_row_and_not_chosen(case: Any) -> None:
    case.lose(INT8, f"{INT8}: its worker died with exit code 1")
    report = case.report()
    row = row_of(report, INT8)
    assert (row["status"], row["reason"]) == ("failed", f"{INT8}: its worker died with exit code 1")
    assert row["size_bytes"] == 400
    assert report["chosen"] == FP32
    assert exit_code(report) == 0


def test_a_single_image_has_no_interval(case: Any, budget_of: Callable[[str], Any]) -> None:
    from ldm_deploy.eval.choose import figures

    report = case.report()
    row = row_of(report, INT8)
    row["quality"]["psnr_db"]["ci95"] = None
    assert "a single sample has no interval" in str(figures(row, report["baseline"])["psnr_db_min"].reason)


def test_what_an_earlier_stage_refused_becomes_a_row(case: Any) -> None:
    case.data["refused"] = [
        {
            "name": "unet-int8-openvino-cpu", "component": "unet", "runtime": "openvino", "device": "cpu",
            "precision": "int8", "reason": "unet: relative error 0.4, limit 0.1",
            "parity": {"relative_error": 0.4, "limit": 0.1, "passed": False}, "speedup": None,
            "costly_ops": [{"op": "QLinearSoftmax", "ms": 1.5, "share": 0.4}],
        },
        {"name": INT8, "reason": "not smaller"},
    ]  # fmt: skip
    report = case.report()
    row = row_of(report, "unet-int8-openvino-cpu")
    assert (row["status"], row["refused"]) == ("failed", "unet: relative error 0.4, limit 0.1")
    assert row["gates"] == []
    assert row["components"][0]["costly_ops"][0]["op"] == "QLinearSoftmax"
    assert row_of(report, INT8)["refused"] == "not smaller"
    assert report["chosen"] == FP32
    assert "unet-int8-openvino-cpu, because unet: relative error 0.4" in report["why"]


def test_an_empty_bundle_has_nothing_to_choose(case: Any) -> None:
    case.data["variants"] = []
    report = case.report()
    assert (report["chosen"], report["why"]) == (None, "The bundle has no variants.")
    assert exit_code(report) == 3


def test_a_run_in_which_the_ratio_changed_is_not_judged(case: Any) -> None:
    """INT8 stays faster throughout, and its interval keeps the limit: but of what is it an interval?"""
    steps = np.where(np.arange(48) < 24, 2.5, 2.1)
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal((2, 48)))
    case.lose(FP32, "it is not of this test")
    case.found.latency_ms = {BASELINE: list(100 * noise[0]), INT8: list(100 * noise[1] / steps)}
    report = case.report()
    gate = gate_of(report, INT8, "speedup_min")
    assert gate["result"] == "not measured"
    assert gate["reason"].startswith("too noisy: the ratio was 2.49 in the first half of the run and 2.10 in")
    assert report["chosen"] is None
    assert exit_code(report) == 4
