from __future__ import annotations

import numpy as np
import pytest

from ldm_deploy.eval.metrics import mse_each
from ldm_deploy.eval.tiles import TILE, worst_tile_each


def test_an_artefact_of_a_few_pixels_is_found_with_its_place() -> None:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 200, (3, 64, 96, 3), dtype=np.uint8)
    candidate = reference.copy()
    candidate[1, 33:37, 81:85] += 50  # inside one tile
    error, place = worst_tile_each(reference, candidate)
    assert place.tolist() == [[0, 0], [32, 80], [0, 0]]
    assert error.tolist() == [0, pytest.approx(50**2 * 16 / TILE**2), 0]
    assert error[1] == pytest.approx(24 * mse_each(reference, candidate)[1])  # one of 24 tiles


def test_every_tile_is_what_a_loop_finds_and_edges_count_by_their_own_pixels() -> None:
    rng = np.random.default_rng(1)
    reference, candidate = rng.integers(0, 256, (2, 4, 40, 50, 3), dtype=np.uint8)
    error, place = worst_tile_each(reference, candidate)
    for a, b, found, (top, left) in zip(reference, candidate, error, place, strict=True):
        tiles = {
            (y, x): np.mean((a[y : y + 16, x : x + 16].astype(float) - b[y : y + 16, x : x + 16]) ** 2)
            for y in range(0, 40, 16)
            for x in range(0, 50, 16)
        }
        assert found == pytest.approx(max(tiles.values()))
        assert tiles[top, left] == max(tiles.values())


def test_what_does_not_compare_is_refused() -> None:
    image = np.zeros((2, 20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="shapes differ"):
        worst_tile_each(image, image[:, :16])
    with pytest.raises(ValueError, match=r"images \(n, H, W, C\); got \(20, 20, 3\)"):
        worst_tile_each(image[0], image[0])
