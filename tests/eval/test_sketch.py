from __future__ import annotations

import base64
import struct

import numpy as np
import pytest

from ldm_deploy.eval.sketch import NUMBERS, sketch_images, sketched_mse


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_the_definition_spelled_out_number_by_number() -> None:
    """Signs are the bits of PCG64's raw stream, lowest first; sums of signed values, over the root of their count."""
    image = noise((5, 7, 3))
    words = -(-image.size // 64)
    stream = np.random.PCG64(0).random_raw(NUMBERS * words).tolist()
    expected = []
    for number in range(NUMBERS):
        total = 0
        for index, value in enumerate(image.ravel().tolist()):
            bit = stream[number * words + index // 64] >> (index % 64) & 1
            total += value if bit else -value
        expected.append(total / image.size**0.5)
    (text,) = sketch_images(image[None])
    np.testing.assert_allclose(struct.unpack(f"<{NUMBERS}f", base64.b64decode(text)), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["noise", "one colour", "one pixel", "stripes", "half a grey level"])
def test_the_error_is_estimated_within_its_spread(kind: str) -> None:
    """Four standard deviations of 25 %, whatever the difference looks like."""
    first = noise((20, 32, 32, 3)) // 2 + 60
    second = first.copy()
    if kind == "noise":
        second = first ^ 3
    elif kind == "one colour":
        second[..., 1] += 5
    elif kind == "one pixel":
        second[:, 9, 9, 0] += 40
    elif kind == "stripes":
        second[:, ::2] += 7
    else:
        second += noise(first.shape, 1) % 2
    true = ((first.astype(float) - second) ** 2).mean(axis=(1, 2, 3))
    found = sketched_mse(sketch_images(first), sketch_images(second))
    assert (found > 0).all()
    np.testing.assert_allclose(found, true, rtol=4 * (2 / NUMBERS) ** 0.5)


def test_the_estimate_has_no_bias() -> None:
    first, second = noise((400, 16, 16, 3)), noise((400, 16, 16, 3), 1)
    true = ((first.astype(float) - second) ** 2).mean(axis=(1, 2, 3))
    ratio = sketched_mse(sketch_images(first), sketch_images(second)) / true
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 400**0.5
    assert ratio.std() == pytest.approx((2 / NUMBERS) ** 0.5, rel=0.15)


def test_equal_images_have_equal_sketches() -> None:
    images = noise((3, 16, 16, 3))
    assert sketched_mse(sketch_images(images), sketch_images(images.copy())).tolist() == [0, 0, 0]
    assert sketch_images(images)[1:2] == sketch_images(images[1:2])  # alone or in a batch


@pytest.mark.parametrize("text", ["", "!", base64.b64encode(bytes(4)).decode(), "////" * 43])
def test_what_is_no_sketch_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        sketched_mse([text], [text])


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a sketch needs uint8 images \(n, H, W, C\); got float64"):
        sketch_images(np.zeros((1, 4, 4, 3)))
