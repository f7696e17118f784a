"""The noise: published vectors of its generator, normality, and images that do not depend on their batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ldm_deploy.runtime.noise import gaussian_noise, philox4x32

# Known answers of philox4x32-10 published with Random123 (Salmon et al. 2011), file kat_vectors.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_answers(counter, key, expected):
    np.testing.assert_array_equal(philox4x32(np.array([counter], dtype=np.uint32), key), [expected])


def test_noise_equals_a_plain_scalar_implementation():
    """The definition of docs/bundle.md, written once more without numpy."""
    import math

    seed = 2**40 + 5
    words = philox4x32(np.array([[j, 0, 0, 0] for j in range(3)], dtype=np.uint32), (5, 256)).ravel().tolist()
    expected = []
    for first, second in zip(words[0::2], words[1::2], strict=True):
        u1, u2 = (first + 0.5) / 2**32, (second + 0.5) / 2**32
        radius = math.sqrt(-2 * math.log(u1))
        expected += [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]
    noise = gaussian_noise([seed], (1, 2, 5))
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise.ravel(), np.float32(expected[:10]), rtol=1e-6)


def documented_rows(columns):
    """Rows of the tables in docs/bundle.md's section on noise, split into words."""
    text = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.partition("## Noise")[2].splitlines() if line[:1] == "|"]
    return [[cell.split() for cell in row] for row in rows if len(row) == columns and row[0].strip()[:1].isalnum()]


def test_noise_vectors_of_the_documentation():
    """An implementation in another language compares with these."""
    rows = [row for row in documented_rows(5) if row[0] != ["seed"]]
    assert len(rows) == 6
    for (seed,), (stream,), (which, count), values, bits in rows:
        noise = gaussian_noise([int(seed)], (4, 16, 16), int(stream))[0].ravel()
        drawn = noise[: int(count)] if which == "first" else noise[-int(count) :]
        assert [f"{value:.7f}" for value in drawn] == values
        assert [f"{word:08X}" for word in drawn.view(np.uint32)] == bits


def test_generator_vectors_of_the_documentation():
    rows = [row for row in documented_rows(3) if row[0] != ["counter"]]
    written = [tuple(tuple(int(word, 16) for word in cell) for cell in row) for row in rows]
    assert written == VECTORS


def test_noise_is_standard_normal():
    noise = gaussian_noise(range(20), (4, 64, 64)).astype(np.float64).ravel()
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.06
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.01


def test_an_image_depends_on_its_seed_alone():
    together = gaussian_noise([7, 2**64 - 1, 7], (4, 8, 8))
    np.testing.assert_array_equal(together[1:2], gaussian_noise([2**64 - 1], (4, 8, 8)))
    np.testing.assert_array_equal(together[0], together[2])
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(gaussian_noise([7], (4, 8, 8), stream=1)[0], together[0])
