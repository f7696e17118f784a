"""Many pairs of images, measured in shards: by several processes or a Ray cluster, resumable, the same to the bit.

What a shard gives depends on its images alone: shards and batches have fixed borders, and torch computes with one
thread wherever it runs. A finished shard is a file that a later run takes up.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.artifact import atomic_write_bytes, content_key, tool_versions
from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval.cluster import spread
from ldm_deploy.eval.image_files import Size, read_images
from ldm_deploy.eval.quality import Arrays, flat_each, measure_pairs

FORMAT = 1  # of a shard file
SHARD = 256  # pairs; what is lost at most when a run is killed
BATCH_PIXELS = 2**18  # read and compared at once: 64 pairs of 64x64, one of 512x512


@dataclass(frozen=True)
class Shard:
    """Some of the pairs, in order. `key` changes with everything that its numbers depend on."""

    index: int
    reference: Path
    candidate: Path
    names: tuple[str, ...]
    size: Size
    backbone: str | None  # of LPIPS; None where it is not to be had
    key: str

    @property
    def file(self) -> str:
        return f"{self.index:06d}.npz"


@dataclass(frozen=True)
class Measured:
    """`arrays` of `measure_pairs`, with `reference_flat` and `candidate_flat`; `reasons` for what is not among them."""

    arrays: Arrays
    reasons: dict[str, str]


def plan_shards(
    reference: Path, candidate: Path, names: Sequence[str], size: Size, backbone: str | None, weights: str | None
) -> list[Shard]:
    """`names` cut into shards. `weights`: the digest of the LPIPS backbone's."""
    common = [FORMAT, SHARD, BATCH_PIXELS, size, backbone, weights, tool_versions("numpy", "torch", "lpips", "pillow")]
    shards = []
    for index, start in enumerate(range(0, len(names), SHARD)):
        own = tuple(names[start : start + SHARD])
        files = [(str(folder / name), *_stamp(folder / name)) for folder in (reference, candidate) for name in own]
        key = content_key({"common": common, "files": files})
        shards.append(Shard(index, reference, candidate, own, size, backbone, key))
    return shards


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def measure_shard(shard: Shard) -> Measured:
    """Read and compare. Raises `DataError` naming the image that cannot be compared."""
    from ldm_deploy.eval.lpips_distance import Lpips

    lpips = Lpips(shard.backbone) if shard.backbone else None
    count = max(1, BATCH_PIXELS // (shard.size[0] * shard.size[1]))
    parts: list[Arrays] = []
    reasons: dict[str, str] = {}
    for start in range(0, len(shard.names), count):
        names = shard.names[start : start + count]
        reference, candidate = (
            read_images(folder, names, shard.size, shard.reference / shard.names[0])
            for folder in (shard.reference, shard.candidate)
        )
        arrays, reasons = measure_pairs(reference, candidate, lpips)
        parts.append(arrays | {"reference_flat": flat_each(reference), "candidate_flat": flat_each(candidate)})
    return Measured({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, reasons)


def write_shard(folder: Path, shard: Shard, found: Measured) -> None:
    buffer = io.BytesIO()
    content: dict[str, Any] = {**found.arrays, "key": shard.key, "reasons": json.dumps(found.reasons)}
    np.savez(buffer, **content)
    atomic_write_bytes(folder / shard.file, buffer.getvalue())


def read_shard(folder: Path, shard: Shard, names: Sequence[str] | None = None) -> Measured | None:
    """What an earlier run measured, or only the arrays `names` of it; None if it is not there or no longer true."""
    try:
        # numpy leaves a file open that it opened itself and that turns out to be damaged
        with open(folder / shard.file, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if str(stored["key"]) != shard.key:
                return None
            wanted = [name for name in stored.files if name not in ("key", "reasons")] if names is None else names
            return Measured({name: stored[name] for name in wanted}, json.loads(str(stored["reasons"])))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def measure_all(shards: Sequence[Shard], processes: int, ray_address: str | None) -> Iterator[tuple[Shard, Measured]]:
    """Every shard with what was found, in the order they are finished."""
    if ray_address:
        return spread(_measure_alone, shards, ray_address, workers=processes)
    return _in_processes(shards, processes)


def _in_processes(shards: Sequence[Shard], processes: int) -> Iterator[tuple[Shard, Measured]]:
    if not shards:
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(min(processes, len(shards)), spawn, initializer=_begin_worker)
    todo = iter(shards)
    waiting: dict[Future[Measured], Shard] = {}
    try:
        waiting |= {pool.submit(_measure_alone, shard): shard for shard in islice(todo, 2 * processes)}
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
                waiting |= {pool.submit(_measure_alone, shard): shard for shard in islice(todo, 1)}
    except BrokenProcessPool:
        raise EvaluationError(
            "a process that compares images died, probably for want of memory; "
            "run the same command again with a smaller --processes to go on where it stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Ctrl-C is the parent's to handle, and a worker must not outlive a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _measure_alone(shard: Shard) -> Measured:
    """`measure_shard` in a process of its own, with one thread, because rounding depends on their number."""
    if shard.backbone:
        import torch

        torch.set_num_threads(1)
    return measure_shard(shard)
