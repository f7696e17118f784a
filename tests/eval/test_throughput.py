from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from ldm_deploy.eval import throughput as module
from ldm_deploy.eval.latency import WorkerError
from ldm_deploy.eval.throughput import BATCHES, IMAGES, throughput, time_batches, time_images, with_batch

FEEDS = {
    "sample": np.arange(8.0).reshape(2, 4),
    "timestep": np.array([3, 5]),
    "scale": np.float32(2.0),  # no rows
    "table": np.zeros((1, 7)),  # shared by all rows
}


class Holder:
    """A worker that tells how many rows a call had, at so many milliseconds each, and takes at most `most` of them."""

    def __init__(self, name: str, per_row_ms: float, most: int = 100) -> None:
        self.name, self.per_row_ms, self.most, self.largest = name, per_row_ms, most, 0
        self.feeds: list[Mapping[str, np.ndarray]] = []

    def put(self, feeds: Mapping[str, np.ndarray]) -> str:
        self.feeds.append(feeds)
        return str(len(self.feeds) - 1)

    def run(self, key: str, *, component: str) -> list[float]:
        return [self._time(len(self.feeds[int(key)]["sample"]))]

    def image(self, prompts: list[str], seeds: list[int], *, steps: int | None) -> tuple[float, None]:
        assert len(prompts) == len(seeds) == len(set(zip(prompts, seeds, strict=True)))
        return self._time(len(prompts)), None

    def _time(self, rows: int) -> float:
        if rows > self.most:
            raise WorkerError("too many rows")
        self.largest = max(self.largest, rows)
        return rows * self.per_row_ms

    def stop(self) -> None:
        raise AssertionError("a worker serves on after a batch that it refused")


def test_rows_are_repeated_or_cut_and_the_rest_is_left() -> None:
    larger = with_batch(FEEDS, 5)
    np.testing.assert_array_equal(larger["sample"], FEEDS["sample"][[0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(larger["timestep"], [3, 5, 3, 5, 3])
    assert larger["scale"] == 2.0
    assert larger["table"].shape == (1, 7)
    assert with_batch(FEEDS, 1)["sample"].shape == (1, 4)


def test_every_batch_is_timed_for_every_engine_that_takes_it() -> None:
    engines: dict[str, Any] = {"whole": Holder("whole", 2.0), "fixed": Holder("fixed", 1.0, most=2)}
    found = time_batches("unet", FEEDS, engines)
    assert list(found) == list(BATCHES)
    assert throughput(found, "whole") == [
        {
            "batch": batch,
            "latency_ms": {"median": 2.0 * batch, "p5": 2.0 * batch, "p95": 2.0 * batch, "samples": module.ROUNDS},
            "per_s": 500.0,
            "reason": None,
        }
        for batch in BATCHES
    ]
    fixed = throughput(found, "fixed")
    assert [row["per_s"] for row in fixed] == [1000.0, 1000.0, None, None]
    assert fixed[-1]["reason"] == "it does not run with a batch of 8"


def test_what_would_take_too_long_is_not_begun() -> None:
    slow: Any = Holder("slow", 400.0)  # a batch of 8: 3.2 s a call, eight calls and more
    found = time_batches("unet", FEEDS, {"slow": slow})
    assert slow.largest == 4
    assert throughput(found, "slow")[-1] == {
        "batch": 8, "latency_ms": None, "per_s": None, "reason": "a batch of 8 takes longer than is waited for",
    }  # fmt: skip


@pytest.mark.parametrize(("image_ms", "measured"), [(100.0, True), (9000.0, False)])
def test_images_one_by_one_and_several_at_once(image_ms: float, measured: bool) -> None:
    workers: list[Any] = [Holder("fp32", image_ms), Holder("alone", image_ms / 2, most=1)]
    pairs = [("sun", seed) for seed in range(6)]
    alone = {"fp32": [image_ms] * 6, "alone": [image_ms / 2] * 6}
    found = time_images(workers, pairs, alone, None)
    one, several = throughput(found, "fp32")
    assert (one["batch"], one["per_s"]) == (1, 1000 / image_ms)
    assert several["batch"] == IMAGES
    assert (several["per_s"] is not None) == measured
    assert throughput(found, "alone")[1]["per_s"] is None
