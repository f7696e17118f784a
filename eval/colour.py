"""Colour: CIEDE2000 between sRGB images, and how far each channel drifted.

A shift of half a grey level before rounding is 54 dB, far beyond any limit on PSNR, and no eye sees it in one image;
the signed mean over many pixels shows it at once.
"""

from __future__ import annotations

import numpy as np

from ldm_deploy.eval.metrics import check_pair

# IEC 61966-2-1: linear sRGB to CIE XYZ (D65, 2 degrees), and the white of that illuminant.
TO_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]], np.float64
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def srgb_to_lab(image: np.ndarray) -> np.ndarray:
    """sRGB uint8 (..., 3) -> CIE L*a*b* (D65) float64 (..., 3); L* is 0 to 100. scikit-image's `rgb2lab`."""
    if image.dtype != np.uint8 or image.shape[-1] != 3:
        raise ValueError(f"colours need uint8 (..., 3); got {image.dtype} {image.shape}")
    value = np.arange(256) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)[image]
    # Sums instead of a matrix product, whose rounding may depend on the number of threads.
    xyz = [sum(weight * linear[..., channel] for channel, weight in enumerate(row)) for row in TO_XYZ]
    x, y, z = (
        np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
        for ratio in (value / white for value, white in zip(xyz, WHITE, strict=True))
    )
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def delta_e2000(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """CIEDE2000 difference of L*a*b* colours, float64 (..., 3) twice -> (...); about 1 is just noticeable.

    Sharma, Wu and Dalal 2005, "The CIEDE2000 color-difference formula: implementation notes", eq. 2 to 22, with
    k_L = k_C = k_H = 1.
    """
    lightness1, a1, b1 = np.moveaxis(first, -1, 0)
    lightness2, a2, b2 = np.moveaxis(second, -1, 0)
    stretch = 1.5 - 0.5 * _saturation((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2)  # 1 + G
    a1, a2 = stretch * a1, stretch * a2
    chroma1, chroma2 = np.hypot(a1, b1), np.hypot(a2, b2)
    hue1, hue2 = _hue(a1, b1), _hue(a2, b2)

    grey = chroma1 * chroma2 == 0  # no hue to speak of
    turn = hue2 - hue1
    turn = np.where(turn > 180, turn - 360, np.where(turn < -180, turn + 360, turn))
    turn = np.where(grey, 0, turn)
    delta_hue = 2 * np.sqrt(chroma1 * chroma2) * np.sin(np.radians(turn) / 2)

    apart = np.abs(hue1 - hue2) > 180
    total = hue1 + hue2
    mean_hue = np.where(apart, (total + np.where(total < 360, 360, -360)) / 2, total / 2)
    mean_hue = np.where(grey, total, mean_hue)
    mean_lightness, mean_chroma = (lightness1 + lightness2) / 2, (chroma1 + chroma2) / 2

    def cosine(multiple: int, offset: float) -> np.ndarray:
        return np.asarray(np.cos(np.radians(multiple * mean_hue + offset)))

    t = 1 - 0.17 * cosine(1, -30) + 0.24 * cosine(2, 0) + 0.32 * cosine(3, 6) - 0.20 * cosine(4, -63)
    middle = (mean_lightness - 50) ** 2
    scaled_lightness = (lightness2 - lightness1) / (1 + 0.015 * middle / np.sqrt(20 + middle))
    scaled_chroma = (chroma2 - chroma1) / (1 + 0.045 * mean_chroma)
    scaled_hue = delta_hue / (1 + 0.015 * mean_chroma * t)
    rotation = np.sin(np.radians(60 * np.exp(-(((mean_hue - 275) / 25) ** 2))))
    rotation = -2 * _saturation(mean_chroma) * rotation
    squared = scaled_lightness**2 + scaled_chroma**2 + scaled_hue**2 + rotation * scaled_chroma * scaled_hue
    return np.asarray(np.sqrt(np.maximum(squared, 0)))


def _saturation(chroma: np.ndarray) -> np.ndarray:
    """The root of C⁷ / (C⁷ + 25⁷). Products, because powers are slow."""
    cube = chroma * chroma * chroma
    seventh = cube * cube * chroma
    return np.asarray(np.sqrt(seventh / (seventh + 25.0**7)))


def _hue(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle of a colour, 0 to 360 degrees."""
    angle = np.degrees(np.arctan2(b, a))
    return np.where(angle < 0, angle + 360, angle)


def delta_e2000_each(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Mean CIEDE2000 over the pixels of each image: sRGB uint8 (n, H, W, 3) twice -> float64 (n,), 0 for equal images.

    Raises `ValueError` for unequal shapes or dtypes, or what is not uint8.
    """
    check_pair(reference, candidate)
    found = []
    for a, b in zip(reference, candidate, strict=True):
        differs = (a != b).any(axis=-1)  # the others are 0, and much of an emoji is white in both
        found.append(delta_e2000(srgb_to_lab(a[differs]), srgb_to_lab(b[differs])).sum() / differs.size)
    return np.array(found)


def colour_shift_each(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Mean of candidate - reference over the pixels of each image: uint8 (n, H, W, 3) twice -> grey levels (n, 3).

    Signed, red, green, blue; exact sums. Raises `ValueError` for unequal shapes or dtypes.
    """
    check_pair(reference, candidate)
    if reference.ndim != 4 or reference.shape[-1] != 3:
        raise ValueError(f"a colour shift needs images (n, H, W, 3); got {reference.shape}")
    pairs = zip(reference, candidate, strict=True)
    return np.array([(b.astype(np.float64) - a.astype(np.float64)).mean(axis=(0, 1)) for a, b in pairs])
