"""Engines that take turns inside workers which hold whole variants."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ldm_deploy.eval.latency import LEAST_ROUNDS, Worker, WorkerError, interleaved, warm_up
from ldm_deploy.eval.speedup import narrow

ROUNDS = 200
SECONDS = 4.0  # per component, all engines together; most stop earlier, when every ratio is known to 4 %
Feeds = Mapping[str, np.ndarray]


class Stand:
    """One engine inside a worker that holds a whole pipeline."""

    def __init__(self, name: str, worker: Worker, component: str, feeds: Feeds) -> None:
        self.name, self.worker, self.component = name, worker, component
        self.key = worker.put(feeds)

    def run(self) -> float:
        return self.worker.run(self.key, component=self.component)[0]

    def warm(self) -> bool:
        try:
            warm_up(self.run)
        except WorkerError:
            return False
        return True

    def stop(self) -> None:
        """The worker serves other components; it stays."""


def time_component(
    component: str,
    feeds: Feeds,
    engines: Mapping[str, Worker],
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Name of an engine -> milliseconds per round. `engines`: each with the worker that holds it, the first of them
    being what the others are compared with. One that fails is left out.
    """
    stands = [Stand(name, worker, component, feeds) for name, worker in engines.items()]
    stands = [stand for stand in stands if stand.warm()]
    samples, _ = interleaved(
        stands, lambda stand, _: stand.run(), rounds,
        seed=seed, time_limit_s=seconds, least=LEAST_ROUNDS, enough=narrow,
    )  # fmt: skip
    return samples
