"""Stand-ins that a worker process loads by file and function name: pipelines and engines, some with a planted fault."""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_deploy.eval.lpips_distance import Lpips

SIZE = 32


def absent_lpips(backbone: str = "squeeze") -> Lpips:
    """As if there were no weights, without loading torch to find this out."""
    lpips = Lpips.__new__(Lpips)
    lpips.backbone, lpips.weights_sha256, lpips.reason = backbone, None, "no weights"
    return lpips


class Pipeline:
    """Draws a blurred pattern that depends on prompt and seed alone."""

    def __init__(self, seconds: float = 0.0, fault: str | None = None) -> None:
        self.seconds = seconds
        self.fault = fault
        self.components = {"unet": Engine(seconds, fault)}

    def __call__(self, prompt: str, seed: int = 0, steps: int | None = None) -> np.ndarray:
        time.sleep(self.seconds)
        print("libraries print to stdout")  # must not disturb the protocol
        if self.fault == "dies" and seed == 1:
            print("Fatal: no more memory", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hangs":
            time.sleep(600)
        if self.fault == "raises":
            raise RuntimeError("first line\nsecond line")
        rng = np.random.default_rng([zlib.crc32(prompt.encode()), seed])
        image = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((SIZE // 4, SIZE // 4, 1))).astype(np.uint8)
        if self.fault == "swapped":
            image = image[..., ::-1]
        if self.fault == "flat":
            image[:] = 128
        return image[None]


class Engine:
    def __init__(self, seconds: float = 0.0, fault: str | None = None) -> None:
        self.seconds = seconds
        self.fault = fault

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        time.sleep(self.seconds)
        value = feeds["sample"].astype(np.float32)
        return {"prediction": value * np.float32(np.nan) if self.fault == "nan" else value}


def fast() -> Pipeline:
    return Pipeline(0.002)


def slow() -> Pipeline:
    return Pipeline(0.02)


def swapped() -> Pipeline:
    return Pipeline(0.002, "swapped")


def flat() -> Pipeline:
    return Pipeline(0.002, "flat")


def dies() -> Pipeline:
    return Pipeline(fault="dies")


def hangs() -> Pipeline:
    return Pipeline(fault="hangs")


def raises() -> Pipeline:
    return Pipeline(fault="raises")


def does_not_load() -> Pipeline:
    raise FileNotFoundError("there is no model")


def exits() -> Pipeline:
    print("cannot allocate", file=sys.stderr)
    sys.exit(7)


def fast_engine() -> Engine:
    return Engine(0.001)


def slow_engine() -> Engine:
    return Engine(0.01)


def nan_engine() -> Engine:
    return Engine(fault="nan")


class ErraticEngine:
    """Up to thirty times slower, by chance: ratios of its calls have no value that many share."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        time.sleep(0.001 * 30 ** self.rng.random())
        return {"prediction": feeds["sample"]}


def erratic_engine() -> ErraticEngine:
    return ErraticEngine()


class PoolEngine:
    """Computes in two threads, and has one more that does not."""

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.idle = ThreadPoolExecutor(1)
        self.idle.submit(int).result()
        self.pool = ThreadPoolExecutor(1)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        other = self.pool.submit(self.compute)
        self.compute()
        other.result()
        return {"prediction": feeds["sample"]}

    def compute(self) -> None:
        np.sort(np.random.default_rng(0).random(200_000))  # without the lock, and in this thread alone


def pool_engine() -> PoolEngine:
    return PoolEngine()


class HeavyEngine:
    """Holds 64 MiB from loading on, and 128 MiB more during a call."""

    def __init__(self, mebibytes: int = 64) -> None:
        self.weights = np.ones(mebibytes * 2**20, np.uint8)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        work = np.ones(2 * self.weights.size, np.uint8)
        return {"prediction": feeds["sample"] + np.float32(work[-1])}


def heavy_engine(mebibytes: int = 64) -> HeavyEngine:
    return HeavyEngine(mebibytes)
