"""Gaussian noise that depends on an image's seed alone and can be drawn in any language.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC11) and Box-Muller (1958).
The exact definition and test vectors are in docs/bundle.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, as 32-bit fractions
ROUNDS = 10
MASK = np.uint64(0xFFFFFFFF)
LARGEST_SEED = 2**64 - 1


def philox4x32(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """counters uint32 (n, 4) and a key of two 32-bit words -> uint32 (n, 4)."""
    c0, c1, c2, c3 = (counters[:, column].astype(np.uint64) for column in range(4))
    k0, k1 = key
    shift = np.uint64(32)
    for _ in range(ROUNDS):
        product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & MASK,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & MASK,
        )
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & 0xFFFFFFFF, (k1 + KEY_INCREMENTS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def gaussian_noise(seeds: Sequence[int], shape: Sequence[int], stream: int = 0) -> np.ndarray:
    """Standard normal noise, float32 (len(seeds), *shape), each image from its own seed (0 to 2^64 - 1).

    `stream` 0 is the starting noise; an ancestral sampler draws the noise of its step i (from 0) from stream i + 1.
    Counter block j of stream s is (j, s, 0, 0); its four words give two Box-Muller pairs.
    """
    count = int(np.prod(shape))
    blocks = -(-count // 4)
    counters = np.zeros((blocks, 4), dtype=np.uint32)
    counters[:, 0] = np.arange(blocks, dtype=np.uint32)
    counters[:, 1] = stream
    images = []
    for seed in seeds:
        words = philox4x32(counters, (seed & 0xFFFFFFFF, seed >> 32))
        uniforms = (words.astype(np.float64) + 0.5) * 2.0**-32  # strictly inside (0, 1)
        first, second = uniforms[:, 0::2], uniforms[:, 1::2]
        radius, angle = np.sqrt(-2.0 * np.log(first)), 2.0 * np.pi * second
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
        images.append(pairs.reshape(-1)[:count].reshape(tuple(shape)))
    return np.stack(images).astype(np.float32)
