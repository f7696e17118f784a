"""What larger batches bring: rows per second of an engine, images per second of a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm_deploy.eval.latency import Worker, interleaved, summary
from ldm_deploy.eval.stands import Feeds, time_component

BATCHED = ("unet", "vae_decoder")  # where the time goes
BATCHES = (1, 2, 4, 8)
ROUNDS, SECONDS = 6, 1.5  # per batch, all engines together
IMAGES = 4  # at once
IMAGE_SECONDS = 6.0  # no new round after
PATIENCE_S = 15.0  # what is expected to take longer is not measured


def with_batch(feeds: Feeds, batch: int) -> dict[str, np.ndarray]:
    """The rows of `feeds`, repeated or cut to `batch`. What has another first axis than most is left as it is."""
    rows = max(value.shape[0] if value.ndim else 0 for value in feeds.values())
    chosen = np.arange(batch) % max(rows, 1)
    return {
        name: np.ascontiguousarray(value[chosen]) if value.ndim and value.shape[0] == rows else value
        for name, value in feeds.items()
    }


def time_batches(
    component: str, feeds: Feeds, engines: Mapping[str, Worker], *, seed: int = 0
) -> dict[int, dict[str, list[float]]]:
    """Rows in a call -> engine -> milliseconds; none for a batch that would take longer than `PATIENCE_S`."""
    found: dict[int, dict[str, list[float]]] = {}
    expected_s = 0.0
    for batch in BATCHES:
        within = expected_s <= PATIENCE_S
        found[batch] = (
            time_component(component, with_batch(feeds, batch), engines, rounds=ROUNDS, seconds=SECONDS, seed=seed)
            if within
            else {}
        )
        if within:  # the next batch is twice as large, and warm-up and the fewest rounds are eight calls
            expected_s = 2 * 8 * sum(float(np.median(times)) for times in found[batch].values()) / 1000
    return found


def time_images(
    workers: Sequence[Worker],
    pairs: Sequence[tuple[str, int]],
    latency_ms: Mapping[str, Sequence[float]],
    steps: int | None,
    *,
    seed: int = 0,
) -> dict[int, dict[str, list[float]]]:
    """Images in a call -> variant -> milliseconds. One by one, which `latency_ms` has, and `IMAGES` at once."""
    found: dict[int, dict[str, list[float]]] = {
        1: {name: list(times) for name, times in latency_ms.items()},
        IMAGES: {},
    }
    if IMAGES * sum(float(np.median(times)) for times in latency_ms.values()) / 1000 <= PATIENCE_S:
        prompts, seeds = (list(values) for values in zip(*(pairs[i % len(pairs)] for i in range(IMAGES)), strict=True))
        found[IMAGES], _ = interleaved(
            [Together(worker) for worker in workers],
            lambda turn, _: turn.worker.image(prompts, seeds, steps=steps)[0],
            ROUNDS,
            seed=seed,
            time_limit_s=IMAGE_SECONDS,
        )
    return found


class Together:
    """A worker whose failure to draw several images at once costs it this figure only."""

    def __init__(self, worker: Worker) -> None:
        self.name, self.worker = worker.name, worker

    def stop(self) -> None:
        """It stays."""


def throughput(samples_ms: Mapping[int, Mapping[str, Sequence[float]]], name: str) -> list[dict[str, Any]]:
    """report.json's `throughput` of an engine or variant: one entry per batch; `per_s` is rows or images per second."""
    rows: list[dict[str, Any]] = []
    for batch, by_name in sorted(samples_ms.items()):
        row: dict[str, Any] = {"batch": batch, "latency_ms": None, "per_s": None, "reason": None}
        if by_name.get(name):
            latency = summary(by_name[name])
            row |= {"latency_ms": latency, "per_s": 1000 * batch / latency["median"]}
        elif by_name:
            row["reason"] = f"it does not run with a batch of {batch}"
        else:
            row["reason"] = f"a batch of {batch} takes longer than is waited for"
        rows.append(row)
    return rows
