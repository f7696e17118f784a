"""A sketch of an image: 32 numbers that tell how far it is from another image, in a result that keeps no images.

Every number is the sum of all values of the image under random signs, over the root of their count N. Signs are
independent, so the square of such a sum over a difference of images has the expectation ‖difference‖² / N, which is
their mean squared error (Achlioptas 2003, "Database-friendly random projections", theorem 1.1). The mean over 32 of
them has a relative standard deviation of at most sqrt(2 / 32) = 25 %, the root mean square error half of that; equal
images have equal sketches.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

NUMBERS = 32
DTYPE = np.dtype("<f4")


def sketch_images(images: np.ndarray) -> list[str]:
    """The sketch of each of uint8 (n, H, W, C), as base64 of 32 little-endian float32."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"a sketch needs uint8 images (n, H, W, C); got {images.dtype} {images.shape}")
    values = images.reshape(len(images), -1)
    size = values.shape[1]
    totals = values.sum(axis=1, dtype=np.int64)
    # The raw stream of PCG64 is the same in every numpy (NEP 19). Bit i of row k: the sign of value i in number k.
    generator = np.random.PCG64(0)
    numbers = np.empty((len(images), NUMBERS), DTYPE)
    for row in range(NUMBERS):
        words = generator.random_raw((size + 63) // 64).astype("<u8")
        plus = np.unpackbits(words.view(np.uint8), count=size, bitorder="little").astype(bool)
        # In integers, so that neither order nor threads matter.
        numbers[:, row] = (2 * values[:, plus].sum(axis=1, dtype=np.int64) - totals) / np.sqrt(size)
    return [base64.b64encode(entry.tobytes()).decode() for entry in numbers]


def sketched_mse(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Estimated mean squared error of each pair of sketched images of one size: float64 (n,), squared grey levels.

    Raises `ValueError` for what is not a sketch.
    """
    difference = _numbers(first) - _numbers(second)
    return np.asarray((difference * difference).mean(axis=1))


def _numbers(sketches: Sequence[str]) -> np.ndarray:
    rows = [np.frombuffer(base64.b64decode(text, validate=True), DTYPE) for text in sketches]
    if any(row.size != NUMBERS or not np.isfinite(row).all() for row in rows):
        raise ValueError(f"a sketch has {NUMBERS} finite numbers")
    return np.array(rows, np.float64).reshape(-1, NUMBERS)
