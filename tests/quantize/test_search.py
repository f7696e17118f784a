"""The search on a planted model: one fragile layer, one that is slow in INT8, the rest worth quantizing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm_deploy.quantize.search import Found, Measured, greedy_order, search
from ldm_deploy.quantize.sensitivity import LayerStudy

LAYERS = [f"layer{index:02}" for index in range(24)]
FRAGILE, SLOW = "layer05", "layer11"
FLOAT_MS, BF16_MS = 24.0, 18.0  # best single precision in float: 1.33 times fp32
LIMIT_DB = 35.0


def error(layer: str) -> float:
    """Squared error of the images, in units of 255² dB."""
    return 255**2 * 10 ** -(2.5 if layer == FRAGILE else 5.2)


def won(layer: str) -> float:
    return -3.0 if layer == SLOW else 0.4


def milliseconds(layers: Sequence[str]) -> float:
    """Two layers that are both quantized save what lies between them: times do not add up exactly."""
    return BF16_MS - sum(won(layer) for layer in layers) - 0.01 * len(layers) ** 1.2


class Planted:
    """Measures an assignment; counts how often."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, layers: Sequence[str]) -> Measured:
        self.calls.append(tuple(layers))
        psnr = min(100.0, 10 * np.log10(255**2 / max(sum(map(error, layers)), 1e-9)))
        speedup = BF16_MS / milliseconds(layers)
        return Measured(tuple(layers), float(psnr), speedup, (0.995 * speedup, 1.005 * speedup))


def studies() -> list[LayerStudy]:
    return [
        LayerStudy(
            layer,
            "Conv",
            {"mean": float(10 * np.log10(255**2 / error(layer))), "worst": 0.0, "ci95": None, "n": 4},
            {"median": won(layer), "ci95": None},
        )
        for layer in LAYERS
    ]


def test_it_beats_all_int8_and_the_best_single_precision_where_a_fixed_list_fails() -> None:
    measure = Planted()
    found = search(studies(), measure, psnr_db_min=LIMIT_DB, builds=20, start=[LAYERS])
    assert found.best is not None
    everything = measure(LAYERS)
    assert not everything.keeps(LIMIT_DB)  # the fragile layer alone costs 10 dB
    assert found.best.keeps(LIMIT_DB)
    assert found.best.speedup > 1.5  # times the best single precision, which is the float engine
    assert found.best.speedup > everything.speedup
    assert FRAGILE not in found.best.layers
    assert SLOW not in found.best.layers
    assert set(found.best.layers) == set(LAYERS) - {FRAGILE, SLOW}
    # First and last in float, as a fixed list has it: wrong, and slower.
    fixed = measure(LAYERS[1:-1])
    assert not fixed.keeps(LIMIT_DB)
    assert fixed.speedup < found.best.speedup


def test_the_fewest_worst_layers_are_given_back() -> None:
    """What layers win together cannot be told from each alone: none seems to win anything here."""

    def together(layers: Sequence[str]) -> Measured:
        found = Planted()(layers)
        return replace(found, speedup=1 + len(layers) / 24, ci95=(1 + len(layers) / 24 - 0.005, 1 + len(layers) / 24))

    alone = [replace(layer, time_won_ms={"median": -0.1, "ci95": None}) for layer in studies()]
    found = search(alone, together, psnr_db_min=38.3, builds=12, start=[LAYERS])
    assert found.best is not None
    # All but the fragile one: 52 - 10 log10(23) = 38.4 dB.
    assert set(found.best.layers) == set(LAYERS) - {FRAGILE}
    assert len(found.measured) == 2
    found = search(alone, together, psnr_db_min=40.0, builds=12, start=[LAYERS])
    assert found.best is not None
    assert len(found.best.layers) == 15  # 52 - 10 log10(15) = 40.2
    assert len(found.measured) < 12


def test_the_number_of_builds_is_bounded_and_every_one_is_shown() -> None:
    for builds in (1, 3, 7):
        measure, shown = Planted(), []
        found = search(studies(), measure, psnr_db_min=60, builds=builds, advance=lambda: shown.append(1))  # noqa: B023
        assert len(measure.calls) == len(found.measured) == len(shown) <= builds


def test_a_limit_between_prefixes_is_found_by_bisection() -> None:
    """Errors and times of all good layers are equal, so the number that fits is known: 10^((52 - limit) / 10)."""
    found = search(studies(), Planted(), psnr_db_min=42.0, builds=30)
    assert found.best is not None
    assert len(found.best.layers) == 10
    assert len(found.measured) < 15


def test_nothing_keeps_the_budget_and_the_closest_are_listed() -> None:
    found = search(studies(), Planted(), psnr_db_min=70.0, builds=12)
    assert found.best is None
    closest = found.closest(2)
    assert closest[0].psnr_db == pytest.approx(52.0)
    assert len(closest[0].layers) == 1


def test_what_is_refused_or_not_surely_faster_is_not_chosen() -> None:
    def wrong(layers: Sequence[str]) -> Measured:
        return Measured(tuple(layers), 100.0, 9.0, (8.9, 9.1), refused="it differs from the reference")

    assert search(studies(), wrong, psnr_db_min=30, builds=5).best is None

    def unsure(layers: Sequence[str]) -> Measured:
        return Measured(tuple(layers), 100.0, 1.05, (0.97, 1.1))

    assert search(studies(), unsure, psnr_db_min=30, builds=5).best is None


def test_the_same_search_gives_the_same_and_a_killed_one_goes_on(tmp_path: Path) -> None:
    whole = search(studies(), Planted(), psnr_db_min=40, builds=14)

    class Killed(Planted):
        def __call__(self, layers: Sequence[str]) -> Measured:
            if len(self.calls) == 4:
                raise KeyboardInterrupt
            return super().__call__(layers)

    journal = tmp_path / "search.json"
    killed, resumed, again = Killed(), Planted(), Planted()
    with pytest.raises(KeyboardInterrupt):
        search(studies(), killed, psnr_db_min=40, builds=14, journal=journal)
    after = search(studies(), resumed, psnr_db_min=40, builds=14, journal=journal)
    assert after == whole
    assert len(resumed.calls) == len(whole.measured) - 4
    assert search(studies(), again, psnr_db_min=40, builds=14, journal=journal) == whole
    assert again.calls == []
    # For another limit what was kept is void.
    other = Planted()
    search(studies(), other, psnr_db_min=45, builds=14, journal=journal)
    assert other.calls


def test_a_damaged_journal_is_begun_anew(tmp_path: Path) -> None:
    journal = tmp_path / "search.json"
    journal.write_text('{"key": "x", "measured')
    measure = Planted()
    assert search(studies(), measure, psnr_db_min=40, builds=3, journal=journal).measured
    assert json.loads(journal.read_text())["measured"]


def test_the_order_leaves_out_what_wins_nothing_or_was_not_measured() -> None:
    unknown = LayerStudy("unknown", "Conv", None, None, None, "it does not build")
    by_output = LayerStudy("alone", "Conv", None, {"median": 1.0, "ci95": None}, 1e-4)
    order = greedy_order([*studies(), unknown, by_output])
    assert SLOW not in order
    assert "unknown" not in order
    assert order[0] == "alone"
    assert order[-1] == FRAGILE


def test_pareto_keeps_what_no_other_beats() -> None:
    def one(name: str, psnr: float, speed: float, refused: str | None = None) -> Measured:
        return Measured((name,), psnr, speed, (speed, speed), refused)

    found = Found(
        None, [one("a", 30, 2), one("b", 40, 1.5), one("c", 35, 1.4), one("d", 50, 3, "wrong"), one("e", 41, 1)]
    )
    assert [m.layers[0] for m in found.pareto()] == ["a", "b", "e"]
    assert [entry["pareto"] for entry in found.to_list()] == [True, True, False, False, True]
