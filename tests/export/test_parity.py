"""Parity must see what a clean build hides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from ldm_deploy.errors import EngineError, ParityError
from ldm_deploy.eval.parity import (
    Arrays,
    Probe,
    check_parity,
    compare_outputs,
    explain,
    read_probes,
    relative_error,
    write_probes,
)


class Doubler:
    """y = 2 x, and what `spoil` makes of it."""

    def __init__(self, spoil: object = None) -> None:
        self.spoil = spoil

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        y = 2 * feeds["x"]
        return {"y": y if self.spoil is None else self.spoil(y)}  # type: ignore[operator]


def probes() -> list[Probe]:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((batch, 4, 6), np.float32) for batch in (1, 3)]
    return [Probe({"x": x}, {"y": 2 * x}) for x in inputs]


def swap_channels(y: np.ndarray) -> np.ndarray:
    return y[:, [1, 0, 2, 3]]


def one_nan(y: np.ndarray) -> np.ndarray:
    y = y.copy()
    y[-1, -1, -1] = np.nan
    return y


def test_relative_error_is_the_ratio_of_norms() -> None:
    reference = np.array([3.0, 4.0], np.float32)
    assert relative_error(reference, reference) == 0
    assert relative_error(reference, reference + np.float32(0.5)) == pytest.approx(math.sqrt(0.5) / 5)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.zeros(2), np.ones(2)) == math.inf
    with pytest.raises(ValueError, match=r"shapes differ: reference \(2,\), candidate \(3,\)"):
        relative_error(np.zeros(2), np.zeros(3))


def test_a_true_engine_passes_on_every_probe() -> None:
    result = check_parity(Doubler(), probes(), 1e-6, component="unet", name="unet-fp32")
    assert result.passed
    assert result.relative_error == 0
    assert len(result.errors) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swap_channels, r"unet: engine unet-int8 .* output 'y' .*x [13]x4x6 has relative error .*, limit 0.1;"),
        (lambda y: y * 1.5, r"has relative error 0\.5, limit 0\.1"),
        (one_nan, r"values that are not finite"),
        (lambda y: y[:, :3], r"output 'y' is \(1, 3, 6\), not \(1, 4, 6\)"),
    ],
)
def test_planted_faults_are_named(spoil: object, message: str) -> None:
    with pytest.raises(ParityError, match=message) as caught:
        check_parity(Doubler(spoil), probes(), 0.1, component="unet", name="unet-int8")
    assert "\n" not in str(caught.value)


def test_a_fault_in_one_probe_only_is_enough() -> None:
    spoiled = Doubler(lambda y: y if len(y) == 1 else y[::-1])
    result = compare_outputs(spoiled, probes(), 0.1)
    assert not result.passed
    assert result.errors[0] == 0
    assert result.probe == "x 3x4x6"


def test_the_worst_is_measured_by_what_its_probe_allows() -> None:
    """An error of 0.1 everywhere, of 0.15 where twice the limit is allowed."""

    class Off:
        def run(self, feeds: Arrays) -> Arrays:
            return {"y": feeds["x"] * feeds["by"]}

    def probe(by: float, allowance: float) -> Probe:
        x = np.ones((1, 4), np.float32)
        return Probe({"x": x, "by": np.float32(1 + by)}, {"y": x}, allowance)

    strict, wide = probe(0.1, 1.0), probe(0.15, 2.0)
    result = compare_outputs(Off(), [strict, wide], 0.12)
    assert result.passed
    assert result.relative_error == pytest.approx(0.1, rel=1e-5)
    assert result.errors == pytest.approx((0.1, 0.15), rel=1e-5)
    told = result.to_dict()
    assert (told["limit"], told["passed"], told["other_sizes"]["limit"]) == (0.12, True, 0.24)
    assert told["relative_error"] == pytest.approx(0.1, rel=1e-5)
    assert told["other_sizes"]["relative_error"] == pytest.approx(0.15, rel=1e-5)
    result = compare_outputs(Off(), [strict, probe(0.25, 2.0)], 0.12)
    assert not result.passed
    assert result.relative_error == pytest.approx(0.25, rel=1e-5)
    assert result.to_dict()["relative_error"] == pytest.approx(0.1, rel=1e-5)
    assert "has relative error 0.25, limit 0.24" in explain(result, "unet", "it")
    assert not compare_outputs(Off(), [probe(0.13, 1.0), wide], 0.12).passed
    assert "other_sizes" not in compare_outputs(Off(), [strict], 0.12).to_dict()


def test_not_a_number_beats_any_error_and_any_limit() -> None:
    spoiled = Doubler(lambda y: one_nan(y) if len(y) == 1 else y * 100)
    result = compare_outputs(spoiled, probes(), math.inf)
    assert not result.passed
    assert result.to_dict() == {"relative_error": None, "limit": math.inf, "passed": False}


def test_an_engine_that_cannot_run_a_probe_fails() -> None:
    def refuse(y: np.ndarray) -> np.ndarray:
        if len(y) > 1:
            raise EngineError("Got invalid dimensions for input: x")
        return y

    with pytest.raises(ParityError, match=r"on the probe x 3x4x6, it does not run: Got invalid dimensions"):
        check_parity(Doubler(refuse), probes(), 0.1, component="unet", name="unet-fp32")


def test_no_probes_is_no_pass() -> None:
    with pytest.raises(ValueError, match="one probe or more"):
        compare_outputs(Doubler(), [], 1.0)


def test_probes_survive_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    written = [*probes(), Probe({"timestep": np.array([3, 4])}, {"y": np.ones(2, np.float32)})]
    write_probes(path, written)
    found = read_probes(path)
    assert [probe.describe() for probe in found] == ["x 1x4x6", "x 3x4x6", "timestep 2"]
    for one, other in zip(written, found, strict=True):
        for name, value in (*one.inputs.items(), *one.outputs.items()):
            np.testing.assert_array_equal(value, {**other.inputs, **other.outputs}[name])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ParityError, match="export the model again"):
        read_probes(path)
