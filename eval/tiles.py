"""The worst place of an image: an artefact of a few pixels vanishes in the mean over all."""

from __future__ import annotations

import numpy as np

from ldm_deploy.eval.metrics import check_pair

TILE = 16  # pixels: what one latent pixel of a decoder with downsampling 4 to 8 reaches


def worst_tile_each(reference: np.ndarray, candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 16x16 tile with the largest mean squared error in each image of two batches (n, H, W, C).

    Returns its mean squared error, float64 (n,), and its top and left pixel, int64 (n, 2). Tiles start at the top left;
    those at the right and bottom edge may be smaller. Of equally bad ones the first in reading order. Raises
    `ValueError` for unequal shapes or dtypes.
    """
    check_pair(reference, candidate)
    if reference.ndim != 4:
        raise ValueError(f"tiles need images (n, H, W, C); got {reference.shape}")
    tops, lefts = (np.arange(0, length, TILE) for length in reference.shape[1:3])
    area = np.outer(_lengths(tops, reference.shape[1]), _lengths(lefts, reference.shape[2]))
    errors, places = [], []
    for a, b in zip(reference, candidate, strict=True):
        squared = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=-1)
        error = np.add.reduceat(np.add.reduceat(squared, tops, axis=0), lefts, axis=1) / area
        row, column = np.unravel_index(error.argmax(), error.shape)
        errors.append(error[row, column])
        places.append((tops[row], lefts[column]))
    return np.array(errors), np.array(places, np.int64).reshape(-1, 2)


def _lengths(starts: np.ndarray, end: int) -> np.ndarray:
    return np.diff(np.append(starts, end))
