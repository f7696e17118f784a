from __future__ import annotations

from pathlib import Path

import pytest

from ldm_deploy.errors import BudgetError
from ldm_deploy.eval.budget import LIMITS, TOLERANCES, Limits, Measured, check_limits, judge, load_budget


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "budget.toml"
    path.write_text(text)
    return path


def test_the_shipped_budget_has_every_limit_and_a_reason_for_each(root: Path) -> None:
    budget = load_budget()
    limits = budget.limits_for("int8-onnxruntime-cpu")
    assert tuple(limits.limits) == LIMITS
    assert limits.limits["size_max"] == "0.6x"
    assert budget.limits_for("fp32-onnxruntime-cpu").limits["size_max"] == "1.1x"
    assert limits.required == ("psnr_db_min", "ssim_min", "speedup_min")
    assert budget.parity_limit("fp32") == 1e-4
    lines = (root / "eval" / "budgets.toml").read_text().splitlines()
    for index, line in enumerate(lines):
        if "=" in line and not line.startswith(("#", "format")):
            assert "#" in line or lines[index - 1].startswith("#"), f"no reason beside {line!r}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "format = 1\n[default]\nspeedup_mim = 1.0",
            r"\[default\]: unknown key 'speedup_mim'; did you mean 'speedup_min'\?",
        ),
        ("format = 1\n[defaults]\n", "unknown key 'defaults'; did you mean 'default'"),
        (
            'format = 1\n[variant."int8-*"]\npsnr_min = 3',
            r'\[variant."int8-\*"\]: unknown key \'psnr_min\'; did you mean \'psnr_db_min\'',
        ),
        ("format = 1\n[parity]\nint4 = 0.1", r"\[parity\]: unknown key 'int4'; did you mean 'int8'"),
        ("format = 1\n[parity.unet]\nfp31 = 0.1", r"\[parity.unet\]: unknown key 'fp31'; did you mean 'fp32'"),
        ('format = 1\n[default]\nrequired = ["ssim"]', "required: unknown key 'ssim'; did you mean 'ssim_min'"),
        ("format = 2", "has format 2; this version reads `format = 1`"),
        ("[default]", "has format None"),
        ("format = 1\n[default]\nsize_max = '0,6x'", "size_max is '0,6x'; give bytes, or a multiple of the baseline"),
        ("format = 1\n[default]\nsize_max = '60%'", "size_max is '60%'"),
        ("format = 1\n[default]\nlpips_max = '1.0x'", "lpips_max is '1.0x'; give a number of 0 or more"),
        ("format = 1\n[default]\npsnr_db_min = true", "psnr_db_min is True; give a number"),
        ("format = 1\n[default]\nlpips_max = nan", "lpips_max is nan; give a number"),
        ("format = 1\n[default]\nlpips_backbone = 'resnet'", "lpips_backbone is 'resnet'; allowed: squeeze, alex, vgg"),
        ("format = 1\n[default]\nrequired = 'ssim_min'", "required is 'ssim_min'; give a list"),
        ("format = 1\n[parity]\nint8 = 0", "int8 is 0; give the largest relative error, a number above 0"),
        ("format = 1\ndefault = 3", r"\[default\] is 3; it must be a table"),
        ("format = 1\nvariant = 3", "`variant` is 3"),
        (
            "format = 1\n[regression]\npsnr_drop_max = 1",
            r"\[regression\]: unknown key 'psnr_drop_max'; did you mean 'psnr_db_drop_max'\?",
        ),
        (
            'format = 1\n[variant."int8-*".regression]\nspeedup_drop = 1',
            r'\[variant."int8-\*".regression\]: unknown key \'speedup_drop\'; did you mean \'speedup_drop_max\'',
        ),
        ("format = 1\n[regression]\nsize_rise_max = '2x'", "size_rise_max is '2x'; give a number of 0 or more"),
        ("format = 1\n[regression]\nrequired = ['ssim_min']", r"\[regression\]: required: unknown key 'ssim_min'"),
        ("format = 1\nregression = 3", r"\[regression\] is 3; it must be a table"),
        ("format = 1\nvariant.x.regression = 3", r'\[variant."x".regression\] is 3'),
        ("format = ", "is no valid TOML"),
    ],
)
def test_a_budget_that_cannot_be_used_says_why_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message) as error:
        load_budget(write(tmp_path, text))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_missing_file_and_a_directory_are_budget_errors(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="cannot be read: No such file"):
        load_budget(tmp_path / "none.toml")
    with pytest.raises(BudgetError, match="cannot be read: Is a directory"):
        load_budget(tmp_path)


def test_patterns_are_laid_over_the_default_in_order(tmp_path: Path) -> None:
    text = """format = 1
[default]
psnr_db_min = 30
required = ["psnr_db_min"]
[variant."int8-*"]
psnr_db_min = 28
[variant."*-openvino-cpu"]
ssim_min = 0.9
lpips_backbone = "vgg"
"""
    budget = load_budget(write(tmp_path, text))
    assert budget.limits_for("fp32-onnxruntime-cpu").limits == {"psnr_db_min": 30}
    both = budget.limits_for("int8-openvino-cpu")
    assert both.limits == {"psnr_db_min": 28, "ssim_min": 0.9}
    assert both.lpips_backbone == "vgg"


def test_tolerances_are_the_shipped_ones_unless_a_file_has_its_own(tmp_path: Path) -> None:
    shipped = load_budget().tolerances_for("int8-onnxruntime-cpu")
    assert tuple(shipped.limits) == TOLERANCES
    with_none = load_budget(write(tmp_path, 'format = 1\n[variant."int8-*".regression]\nssim_drop_max = 0.5'))
    assert with_none.tolerances_for("fp32-onnxruntime-cpu") == load_budget().tolerances_for("fp32-onnxruntime-cpu")
    assert with_none.tolerances_for("int8-onnxruntime-cpu").limits == {**shipped.limits, "ssim_drop_max": 0.5}
    own = load_budget(write(tmp_path, "format = 1\n[regression]\nssim_drop_max = 0.1"))
    assert own.tolerances_for("int8-onnxruntime-cpu").limits == {"ssim_drop_max": 0.1}
    assert own.tolerances_for("int8-onnxruntime-cpu").required == ()


def test_requiring_a_limit_that_is_not_set_is_an_error(tmp_path: Path) -> None:
    budget = load_budget(write(tmp_path, 'format = 1\n[default]\nrequired = ["ssim_min"]'))
    with pytest.raises(BudgetError, match="requires 'ssim_min' and has no such limit"):
        budget.limits_for("int8-onnxruntime-cpu")


def test_parity_by_component_goes_before_precision_and_falls_back_to_the_shipped_table(tmp_path: Path) -> None:
    budget = load_budget(write(tmp_path, "format = 1\n[parity]\nint8 = 0.2\n[parity.unet]\nint8 = 0.05"))
    assert budget.parity_limit("int8", "unet") == 0.05
    assert budget.parity_limit("int8", "vae_decoder") == 0.2
    assert budget.parity_limit("fp32", "unet") == load_budget().parity_limit("fp32")
    with pytest.raises(BudgetError, match="no parity limit for precision 'mixed'"):
        budget.parity_limit("mixed")


def test_the_digest_changes_with_the_file(tmp_path: Path) -> None:
    first = load_budget(write(tmp_path, "format = 1")).digest
    assert first != load_budget(write(tmp_path, "format = 1\n[default]\nssim_min = 0.9")).digest
    assert first != load_budget().digest


@pytest.mark.parametrize(
    ("low", "high", "minimum", "result"),
    [
        (1.1, 1.2, True, "pass"),
        (1.0, 1.2, True, "pass"),
        (0.8, 0.9, True, "fail"),
        (0.9, 1.1, True, "not measured"),
        (0.8, 0.9, False, "pass"),
        (1.1, 1.2, False, "fail"),
        (0.9, 1.1, False, "not measured"),
    ],
)
def test_an_interval_passes_fails_or_is_too_noisy(low: float, high: float, minimum: bool, result: str) -> None:
    assert judge(low, high, 1.0, minimum=minimum) == result


def gate(name: str, limit: float | str, found: Measured, required: bool = False) -> dict[str, object]:
    limits = Limits({name: limit}, (name,) if required else ())
    return check_limits(limits, {name: found})[0].to_dict()


def test_gates_say_what_they_found() -> None:
    assert gate("psnr_db_min", 28.0, Measured(33.0, (32.0, 34.0)))["result"] == "pass"
    failed = gate("lpips_max", 0.05, Measured(0.2, (0.1, 0.3)), required=True)
    assert failed["result"] == "fail"
    assert failed["reason"] == "0.2 is above the limit 0.05"
    assert failed["required"] is True
    noisy = gate("speedup_min", 1.0, Measured(1.05, (0.9, 1.2)))
    assert noisy["result"] == "not measured"
    assert "too noisy: the limit 1 lies inside the 95 % interval 0.9 to 1.2" in str(noisy["reason"])
    absent = gate("lpips_max", 0.05, Measured(None, reason="no weights"))
    assert (absent["result"], absent["reason"]) == ("not measured", "no weights")


def test_multiples_are_of_the_baseline() -> None:
    kept = gate("size_max", "0.6x", Measured(50.0, baseline=100.0))
    assert (kept["result"], kept["limit"], kept["limit_text"]) == ("pass", 60.0, "0.6x")
    assert gate("size_max", "0.4x", Measured(50.0, baseline=100.0))["result"] == "fail"
    assert gate("size_max", 40, Measured(50.0))["result"] == "fail"
    unknown = gate("peak_memory_max", "1.0x", Measured(50.0))
    assert unknown["result"] == "not measured"
    assert unknown["reason"] == "the limit is 1.0x of the baseline, which was not measured"


def test_a_figure_nobody_took_is_not_measured() -> None:
    (found,) = check_limits(Limits({"ssim_min": 0.9}, ()), {})
    assert found.result == "not measured"
