from __future__ import annotations

import numpy as np
import pytest

from ldm_deploy.eval.colour import colour_shift_each, delta_e2000, delta_e2000_each, srgb_to_lab

# Sharma, Wu and Dalal 2005, table 1: two colours L*, a*, b* and their difference, to four digits. The pairs of the
# published test data that lie on either side of a discontinuity of the formula, and of large differences.
PUBLISHED = [
    ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
    ((50.0, -1.3802, -84.2814), (50.0, 0.0, -82.7485), 1.0000),
    ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
    ((50.0, -1.0, 2.0), (50.0, 0.0, 0.0), 2.3669),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0009), 7.1792),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0010), 7.1792),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0011), 7.2195),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0012), 7.2195),
    ((50.0, -0.0010, 2.4900), (50.0, 0.0009, -2.4900), 4.8045),
    ((50.0, -0.0010, 2.4900), (50.0, 0.0011, -2.4900), 4.7461),
    ((50.0, 2.5000, 0.0), (50.0, 0.0, -2.5000), 4.3065),
    ((50.0, 2.5000, 0.0), (73.0, 25.0, -18.0), 27.1492),
    ((50.0, 2.5000, 0.0), (61.0, -5.0, 29.0), 22.8977),
    ((50.0, 2.5000, 0.0), (56.0, -27.0, -3.0), 31.9030),
    ((50.0, 2.5000, 0.0), (58.0, 24.0, 15.0), 19.4535),
    ((50.0, 2.5000, 0.0), (50.0, 3.1736, 0.5854), 1.0000),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441),
    ((6.7747, -0.2908, -2.4247), (5.8714, -0.0985, -2.2286), 0.6377),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]


def images(seed: int = 0, count: int = 3, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_the_published_pairs() -> None:
    first, second, expected = (np.array(column) for column in zip(*PUBLISHED, strict=True))
    np.testing.assert_allclose(delta_e2000(first, second), expected, atol=5e-5)
    np.testing.assert_allclose(delta_e2000(second, first), expected, atol=5e-5)


def test_it_is_scikit_images() -> None:
    from skimage.color import deltaE_ciede2000, rgb2lab

    reference, candidate = images(), images(1)
    candidate[1] = np.clip(reference[1].astype(int) + 1, 0, 255)
    reference[2, :12] = 128  # greys, which have no hue
    candidate[2, :6] = 100
    np.testing.assert_allclose(srgb_to_lab(reference), rgb2lab(reference), atol=1e-9)
    theirs = deltaE_ciede2000(rgb2lab(reference), rgb2lab(candidate)).mean(axis=(1, 2))
    np.testing.assert_allclose(delta_e2000_each(reference, candidate), theirs, rtol=1e-9)


def test_equal_images_differ_by_nothing_and_black_from_white_by_100() -> None:
    assert delta_e2000_each(images(), images()).tolist() == [0, 0, 0]
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert delta_e2000_each(black, white)[0] == pytest.approx(100, abs=1e-3)
    half = black.copy()
    half[:, :2] = 255  # what is equal counts as 0 in the mean
    assert delta_e2000_each(half, white)[0] == pytest.approx(50, abs=1e-3)


def test_half_a_grey_level_before_rounding_is_seen_where_psnr_sees_nothing() -> None:
    """The planted fault: continuous images, one with half a grey level more of red before both are rounded."""
    rng = np.random.default_rng(0)
    exact = rng.uniform(0, 254, (8, 64, 64, 3))
    shifted = exact + np.array([0.5, 0, 0])
    shift = colour_shift_each(np.round(exact).astype(np.uint8), np.round(shifted).astype(np.uint8))
    np.testing.assert_allclose(shift[:, 0], 0.5, atol=0.04)
    np.testing.assert_array_equal(shift[:, 1:], 0)


def test_the_shift_has_a_sign_and_does_not_wrap_around() -> None:
    dark, light = np.full((1, 4, 4, 3), 3, np.uint8), np.full((1, 4, 4, 3), 253, np.uint8)
    assert colour_shift_each(dark, light).tolist() == [[250, 250, 250]]
    assert colour_shift_each(light, dark).tolist() == [[-250, -250, -250]]


@pytest.mark.parametrize("metric", [delta_e2000_each, colour_shift_each])
def test_what_does_not_compare_is_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="shapes differ"):
        metric(images(), images(size=25))
    with pytest.raises(ValueError, match="dtypes differ"):
        metric(images(), images().astype(np.float32))
    with pytest.raises(ValueError, match=r"uint8 \(\.\.\., 3\)|images \(n, H, W, 3\)"):
        metric(images()[..., :1], images(1)[..., :1])
