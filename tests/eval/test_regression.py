"""A result against a stored one: what is worse fails, what is the same passes, what cannot be known says why."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import scipy.stats

from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval.budget import AGAINST, TOLERANCES
from ldm_deploy.eval.regression import Stored, add_regression, check_comparable, compare_rows, read_stored
from ldm_deploy.eval.report import exit_code, print_table, schema, to_html, to_junit, to_markdown

FP32, INT8 = "fp32-onnxruntime-cpu", "int8-onnxruntime-cpu"
SAME = {"same_machine": True, "other_versions": {}}


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine without the backbone; its own test has rows of its own."""
    from ldm_deploy.eval import lpips_distance

    monkeypatch.setattr(lpips_distance, "_weights_file", lambda _: tmp_path / "none.pth")


@pytest.fixture
def store(tmp_path: Path) -> Callable[[Any], Path]:
    def write(report: Any) -> Path:
        path = tmp_path / "stored.json"
        path.write_text(json.dumps(dict(report)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def against(case: Any, store: Callable[[Any], Path]) -> Callable[..., Any]:
    """The case's report, compared with the one that it gave when the fixture was made, or with another."""
    many(case, 48)
    first = store(case.report())

    def compare(path: Path = first) -> Any:
        report = case.report()
        add_regression(report, read_stored(path), case.budget)
        return report

    return compare


def many(case: Any, rounds: int) -> None:
    """Timings of more rounds, with the noise of a quiet machine."""
    rng = np.random.default_rng(1)
    load = rng.uniform(1, 1.2, rounds)
    for name, milliseconds in (("fp32-torch-cpu", 100), (FP32, 60), (INT8, 40)):
        case.found.latency_ms[name] = list(milliseconds * load * rng.normal(1, 0.01, rounds))


def gates(report: Any, name: str = INT8) -> dict[str, dict[str, Any]]:
    row = next(row for row in report["variants"] if row["name"] == name)
    return {gate["name"]: gate for gate in row["gates"] if gate["name"] in AGAINST}


def worse(report: Any, name: str = INT8) -> list[str]:
    return [gate for gate, found in gates(report, name).items() if found["result"] == "fail"]


def test_the_same_again_passes_every_gate_and_changes_nothing_else(case: Any, against: Callable[..., Any]) -> None:
    before, report = case.report(), against()
    for name in (FP32, INT8):
        found = gates(report, name)
        assert tuple(found) == AGAINST
        for gate in found.values():
            if gate["name"] != "lpips_rise_max":
                assert (gate["result"], gate["reason"]) == ("pass", None)
            if gate["name"] in TOLERANCES and gate["value"] is not None:
                assert gate["value"] == 0
    assert gates(report)["speedup_drop_max"]["detail"].endswith("ms now")
    assert exit_code(report) == exit_code(before) == 0
    assert report["against"]["note"].endswith("the same machine and versions")
    assert (report["chosen"], report["why"]) == (before["chosen"], before["why"])


def plant_half_a_grey_level(case: Any) -> None:
    images = case.found.images[INT8]
    up = np.random.default_rng(2).integers(0, 2, images.shape)
    case.found.images[INT8] = np.minimum(images.astype(int) + up, 255).astype(np.uint8)


def plant_noise(case: Any) -> None:
    images = case.found.images[INT8]
    noise = np.random.default_rng(2).integers(-30, 31, images.shape)
    case.found.images[INT8] = (images.astype(int) + noise).clip(0, 255).astype(np.uint8)


def plant_one_grey_level_somewhere(case: Any) -> None:
    images = case.found.images[INT8]
    case.found.images[INT8] = np.where(np.arange(images.size).reshape(images.shape) % 100, images, images ^ 1)


def plant_slowness(case: Any) -> None:
    case.found.latency_ms[INT8] = [1.3 * value for value in case.found.latency_ms[INT8]]


def plant_a_leak(case: Any) -> None:
    case.found.memory_bytes[INT8] = int(1.3 * case.found.memory_bytes[INT8])


def plant_weight(case: Any) -> None:
    (case.folder / "unet-int8.onnx").write_bytes(bytes(350))


@pytest.mark.parametrize(
    ("plant", "caught", "reason"),
    [
        (
            plant_half_a_grey_level,
            ["psnr_db_drop_max", "colour_change_max", "image_change_max"],
            r"[12].\d+ is above the limit .* \(48.13 then, 4\d.\d+ now\)",
        ),
        (plant_noise, ["psnr_db_drop_max", "ssim_drop_max", "image_change_max"], r"48.13 then, 2\d.\d+ now"),
        (plant_one_grey_level_somewhere, ["image_change_max"], "4 of 4 images changed; if that is meant, store a new"),
        (plant_slowness, ["speedup_drop_max"], r"0.23\d* is above the limit .* \(2.5\d?x then, 1.9\d?x now; 4\d"),
        (plant_a_leak, ["peak_memory_rise_max"], r"0.3 is above the limit .* \(110 MiB then, 143 MiB now\)"),
        (plant_weight, ["size_rise_max"], "0.125 is above the limit"),
    ],
)
def test_a_planted_fault_is_caught_by_its_gates(
    case: Any, against: Callable[..., Any], plant: Callable[[Any], None], caught: list[str], reason: str
) -> None:
    import re

    plant(case)
    report = against()
    found = worse(report)
    assert found == caught
    assert re.search(reason, gates(report)[caught[0]]["reason"])
    assert worse(report, FP32) == []
    assert exit_code(report) == 3


def test_what_got_better_passes(case: Any, against: Callable[..., Any]) -> None:
    case.found.images[INT8] = case.found.images[FP32].copy()
    case.found.latency_ms[INT8] = [value / 2 for value in case.found.latency_ms[INT8]]
    report = against()
    assert worse(report) == ["image_change_max"]  # not worse, but another engine than the one that was stored
    assert gates(report)["psnr_db_drop_max"]["value"] < 0
    assert gates(report)["speedup_drop_max"]["value"] < -0.9


def test_a_noisy_run_is_not_judged_and_a_required_gate_says_so(case: Any, against: Callable[..., Any]) -> None:
    noise = np.random.default_rng(5).lognormal(0, 0.3, 48)
    case.found.latency_ms[INT8] = list(1.1 * np.array(case.found.latency_ms[INT8]) * noise)
    report = against()
    gate = gates(report)["speedup_drop_max"]
    assert gate["result"] == "not measured"
    assert "too noisy: the limit 0.12 lies inside the 99 % interval" in gate["reason"]
    assert worse(report) == []
    assert exit_code(report) == 4


def test_a_failed_gate_goes_before_one_that_was_not_measured(case: Any, against: Callable[..., Any]) -> None:
    noise = np.random.default_rng(5).lognormal(0, 0.3, 48)
    case.found.latency_ms[INT8] = list(np.array(case.found.latency_ms[INT8]) * noise)
    plant_noise(case)
    assert exit_code(against()) == 3


def edited(report: Any, change: Callable[[Any], None]) -> Any:
    report = copy.deepcopy(dict(report))
    change(report)
    return report


def elsewhere(report: Any) -> None:
    report["machine"] |= {"fingerprint": "sha256:" + "1" * 64, "cpu": "Abacus 3000"}


def more_threads(report: Any) -> None:
    report["protocol"]["threads"] += 2


def other_runtime(report: Any) -> None:
    report["machine"]["versions"] = {**report["machine"]["versions"], "onnxruntime": "1.0"}


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (elsewhere, "another machine (Abacus 3000, 2 threads): ratios are compared, not milliseconds"),
        (more_threads, "4 threads): ratios are compared, not milliseconds"),
        (other_runtime, "the same machine with other versions (onnxruntime 1.0, now "),
    ],
)
def test_elsewhere_ratios_are_compared_and_neither_milliseconds_nor_bits(
    case: Any, against: Callable[..., Any], store: Callable[[Any], Path], change: Callable[[Any], None], note: str
) -> None:
    path = store(edited(case.report(), change))
    plant_one_grey_level_somewhere(case)
    case.found.latency_ms = {name: [3 * value for value in times] for name, times in case.found.latency_ms.items()}
    report = against(path)
    found = gates(report)
    assert note in report["against"]["note"]
    assert found["image_change_max"]["result"] == "not measured"
    assert "the images differ by 0.093 grey levels" in found["image_change_max"]["reason"]
    assert found["speedup_drop_max"]["result"] == "pass"  # a machine three times slower
    assert " ms " not in found["speedup_drop_max"]["detail"]
    assert found["psnr_db_drop_max"]["result"] == "pass"
    assert exit_code(report) == 0


def test_python_and_lpips_do_not_make_other_versions(case: Any, against: Any, store: Callable[[Any], Path]) -> None:
    def change(report: Any) -> None:
        report["machine"]["versions"] = {**report["machine"]["versions"], "python": "3.0", "lpips": "0"}

    assert gates(against(store(edited(case.report(), change))))["image_change_max"]["result"] == "pass"


def test_float_noise_far_above_what_shows_is_no_loss(case: Any, against: Any, store: Callable[[Any], Path]) -> None:
    """One grey level in one value of an image is 83 dB at this size; equal images count as 100 dB."""
    path = store(edited(case.report(), elsewhere))
    case.found.images[FP32][:, 3, 3, 0] ^= 1
    report = against(path)
    gate = gates(report, FP32)["psnr_db_drop_max"]
    assert (gate["result"], gate["value"]) == ("pass", 0)
    assert gate["detail"] == "100 then, 83.01 now"


def test_a_variant_that_is_gone_fails(case: Any, against: Callable[..., Any]) -> None:
    case.data["variants"].pop()
    report = against()
    (gate,) = [gate for gate in gates(report).values() if gate["name"] == "still_runs"]
    assert gate["result"] == "fail"
    assert "it is not in this bundle; if that is meant, store a new result" in gate["reason"]
    assert exit_code(report) == 3
    assert report["chosen"] == FP32
    jsonschema.Draft202012Validator(schema()).validate(json.loads(json.dumps(dict(report))))


def test_a_variant_that_broke_fails(case: Any, against: Callable[..., Any]) -> None:
    case.lose(INT8, "its worker died")
    report = against()
    found = gates(report)
    assert (found["still_runs"]["result"], found["still_runs"]["reason"]) == (
        "fail",
        "it drew when the result was stored: its worker died",
    )
    assert found["psnr_db_drop_max"]["result"] == "not measured"
    assert "this run has no psnr_db of every image" in found["psnr_db_drop_max"]["reason"]
    assert found["peak_memory_rise_max"]["reason"] == "this run has no peak_memory_bytes; its row says why"


def test_a_new_variant_is_named_and_not_judged(case: Any, against: Any, store: Callable[[Any], Path]) -> None:
    path = store(edited(case.report(), lambda report: report["variants"].pop()))
    report = against(path)
    assert gates(report) == {}
    assert report["against"]["new"] == [INT8]
    assert exit_code(report) == 0


def test_without_a_baseline_bytes_and_images_are_still_compared(case: Any, against: Callable[..., Any]) -> None:
    case.lose("fp32-torch-cpu", "torch is not installed")
    plant_half_a_grey_level(case)
    report = against()
    found = gates(report)
    assert found["image_change_max"]["result"] == "fail"
    assert found["size_rise_max"]["result"] == "pass"
    assert found["speedup_drop_max"]["reason"] == "this run has no speed-up with an interval; its row says why"
    assert "fp32-torch-cpu drew no images" in found["ssim_drop_max"]["reason"]


def test_lpips_may_not_rise_and_is_not_compared_with_another_backbone() -> None:
    def row(level: float, weights: str) -> dict[str, Any]:
        images = [{"prompt": str(index), "seed": 0, "lpips": level + index / 1000} for index in range(4)]
        quality = {"lpips": {"backbone": "squeeze", "weights_sha256": weights}}
        return {"speedup": None, "quality": quality, "images": images, "peak_memory_bytes": 1, "size_bytes": 1}

    found = compare_rows(row(0.01, "a"), row(0.04, "a"), SAME)["lpips_rise_max"]
    assert found.value == pytest.approx(0.03)
    assert found.interval == pytest.approx((0.03, 0.03))
    reason = str(compare_rows(row(0.01, "a"), row(0.04, "b"), SAME)["lpips_rise_max"].reason)
    assert "LPIPS was stored with ('squeeze', 'a'), and is now taken with ('squeeze', 'b')" in reason


def test_a_result_of_an_older_version_without_figures_per_image(case: Any, against: Any, store: Any) -> None:
    def change(report: Any) -> None:
        for row in report["variants"]:
            for image in row["images"]:
                del image["sketch"], image["colour_shift"]

    found = gates(against(store(edited(case.report(), change))))
    for name in ("image_change_max", "colour_change_max"):
        assert found[name]["result"] == "not measured"
        assert "the stored result has no " in found[name]["reason"]
    assert found["psnr_db_drop_max"]["result"] == "pass"


def test_tolerances_and_what_is_required_can_be_set_per_variant(case: Any, against: Any, budget_of: Any) -> None:
    case.budget = budget_of(
        "[default]\nrequired = []\n[regression]\nspeedup_drop_max = 0.05\n"
        '[variant."int8-*".regression]\nspeedup_drop_max = 0.4\nlpips_rise_max = 0.0\nrequired = ["lpips_rise_max"]'
    )
    plant_slowness(case)
    for row in case.report()["variants"]:
        assert row["gates"] == []
    report = against()
    assert list(gates(report, FP32)) == ["still_runs", "speedup_drop_max"]
    assert list(gates(report)) == ["still_runs", "speedup_drop_max", "lpips_rise_max"]
    assert gates(report)["speedup_drop_max"]["result"] == "pass"
    assert gates(report)["lpips_rise_max"]["required"] is True


def test_the_interval_of_the_ratio_of_ratios_is_that_of_a_joint_bootstrap_over_processes_too() -> None:
    rng = np.random.default_rng(0)
    rows, ratios = [], []
    for median in (2.5, 2.3):
        values = median * rng.lognormal(0, 0.05, 60)
        ratios.append(values)
        drawn = np.median(values[rng.integers(60, size=(4000, 60))], axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        speed = {"median": float(np.median(values)), "ci95_low": low, "ci95_high": high, "versus": "x"}
        rows.append({"speedup": speed, "latency_ms": {"median": 1.0}, "quality": None, "images": []})
    for row in rows:
        row |= {"peak_memory_bytes": 1, "size_bytes": 1}
    found = compare_rows(rows[0], rows[1], SAME)["speedup_drop_max"]
    # Two processes a run, each with a speed of its own that differs by 1.2 %.
    then, now = (
        np.median(values[rng.integers(60, size=(20000, 60))], axis=1)
        * np.exp(rng.normal(0, 0.012, (2, 20000)).sum(axis=0))
        for values in ratios
    )
    low, high = np.percentile(1 - now / then, [0.5, 99.5])
    assert found.interval is not None
    assert found.value == pytest.approx(1 - np.median(ratios[1]) / np.median(ratios[0]))
    np.testing.assert_allclose(found.interval, (low, high), atol=0.15 * (high - low))


def test_losses_are_paired_per_image_as_scipy_has_it(case: Any) -> None:
    """Images differ by far more than the loss does; only the paired interval is narrow."""
    rng = np.random.default_rng(3)
    rows = []
    level = rng.uniform(20, 40, 48)
    for loss in (0.0, 0.8):
        images = [
            {"prompt": str(i), "seed": 0, "psnr_db": level[i] - loss + rng.normal(0, 0.2), "ssim": 1.0}
            for i in range(48)
        ]
        quality = {"lpips": {"reason": "x"}}
        rows.append({"speedup": None, "quality": quality, "images": images, "peak_memory_bytes": 1, "size_bytes": 1})
    found = compare_rows(rows[0], rows[1], SAME)["psnr_db_drop_max"]
    lost = np.array([a["psnr_db"] - b["psnr_db"] for a, b in zip(rows[0]["images"], rows[1]["images"], strict=True)])
    expected = scipy.stats.bootstrap(
        (lost,), np.mean, confidence_level=0.99, n_resamples=20000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.interval is not None
    assert found.value == pytest.approx(lost.mean())
    np.testing.assert_allclose(found.interval, expected, atol=0.02)
    assert found.interval[0] > 0.5


# What is shown


def test_every_output_names_the_gate_that_failed(
    case: Any, against: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # no name is to be cut in two
    plant_slowness(case)
    report = against()
    stored = json.loads(json.dumps(dict(report)))
    jsonschema.Draft202012Validator(schema()).validate(stored)
    reason = gates(report)["speedup_drop_max"]["reason"]
    suite = next(suite for suite in ElementTree.fromstring(to_junit(report)) if suite.get("name") == INT8)
    (failure,) = suite.iter("failure")
    assert failure.get("message") == reason
    for text in (to_markdown(report), to_html(report)):
        assert reason in text.replace("&#39;", "'")
        assert report["against"]["note"] in text
    print_table(report)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{INT8}: speedup_drop_max fail: {reason}" in shown
    assert "worse than stored: speedup_drop_max" in shown
    assert report["against"]["note"] in shown


# Stored results that cannot be used


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.update(format=2), "has format 2; this version reads format 1: store a new result"),
        (lambda report: report.update(format=True), "has format True"),
        (lambda report: report.pop("variants"), "is no result of `ldm-deploy eval`"),
        (lambda report: report.pop("machine"), r"is damaged \(KeyError\('machine'\)\); restore it"),
        (lambda report: report["variants"][0].pop("speedup"), r"is damaged \(KeyError\('speedup'\)\)"),
        (lambda report: report["variants"][0].update(images=[1]), "is damaged"),
        (lambda report: report["variants"][0]["images"][0].update(psnr_db="high"), "is damaged"),
        (lambda report: report["variants"][0]["images"][0].update(sketch="AAAA"), "is damaged"),
        (lambda report: report["variants"][0]["images"][0].update(colour_shift=[1, 2]), "is damaged"),
        (lambda report: report["variants"][0]["speedup"].update(median=0), "is damaged"),
        (lambda report: report.update(variants=7), "is damaged"),
    ],
)
def test_a_damaged_stored_result_is_refused_in_one_line(
    case: Any, store: Callable[[Any], Path], change: Callable[[Any], Any], message: str
) -> None:
    path = store(edited(case.report(), change))
    with pytest.raises(EvaluationError, match=message) as error:
        read_stored(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is no result"),
        ('{"format": NaN, "variants": []}', "NaN is no number"),
        ("\udcff", "is damaged"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "stored.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EvaluationError, match=message):
        read_stored(tmp_path / "stored.json")


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(EvaluationError, match=r"cannot be read: .*; give a report\.json"):
            read_stored(path)


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("source", "digest", "sha256:" + "2" * 64, "is of another model"),
        ("source", "name", "other", "is of another model"),
        ("protocol", "prompts_sha256", "0" * 64, "was drawn with prompts_sha256 [0-9a-f]{64}, and this run with 0000"),
        ("protocol", "seeds", [5], r"was drawn with seeds \[0, 1\], and this run with \[5\]"),
        ("protocol", "sampler", "euler", "was drawn with sampler ddim, and this run with euler; store a new result"),
        ("protocol", "steps", 20, "with steps 50, and this run with 20"),
        ("protocol", "size", [64, 64], r"with size \[32, 32\]"),
        ("protocol", "guidance_scale", 1.0, "with guidance_scale 5.0"),
    ],
)
def test_another_model_or_protocol_is_refused(
    case: Any, store: Callable[[Any], Path], table: str, key: str, value: Any, message: str
) -> None:
    report = case.report()
    stored = read_stored(store(report))
    check_comparable(stored, report["source"], report["protocol"])
    now = {"source": dict(report["source"]), "protocol": dict(report["protocol"])}
    now[table][key] = value
    with pytest.raises(EvaluationError, match=message):
        check_comparable(stored, now["source"], now["protocol"])


def test_a_stored_result_is_a_plain_value() -> None:
    assert Stored(Path("x"), "sha256:0", {}, {}) == Stored(Path("x"), "sha256:0", {}, {})
