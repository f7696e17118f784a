"""Does a bundle with an INT8 engine in it draw well enough? Asked of the engine that won, before it is kept."""

from __future__ import annotations

import math

import numpy as np

from ldm_deploy.eval.parity import Runnable
from ldm_deploy.quantize.drawing import Drawing, image_quality

PROMPTS = 8  # drawn with; the images of one are better or worse by 3 dB than those of another


class ImageGate:
    """For the components of one bundle, one after the other: their squared errors add up to what is allowed.

    `psnr_db_min`: of images with all of them replaced, against those of fp32. `components`: how many are to come.
    """

    def __init__(self, drawing: Drawing, psnr_db_min: float, components: int, *, seed: int = 0) -> None:
        self.drawing, self.seed = drawing, seed
        self._left = 10 ** (-psnr_db_min / 10)  # squared error that may still be made; the peak is 1
        self._components = components
        self._references: dict[str, np.ndarray] = {}

    @property
    def asked_db(self) -> float:
        """PSNR that the next component must keep: it may take an equal part of what is left."""
        return -10 * math.log10(max(self._left, 1e-30) / max(self._components, 1))

    def psnr_db(self, component: str, fp32: Runnable, engine: Runnable) -> float:
        """Of the images drawn with `engine` against those drawn with `fp32`, which are drawn once."""
        if component not in self._references:
            self._references[component] = self.drawing.images(component, fp32)
        images = self.drawing.images(component, engine)
        return float(image_quality(self._references[component], images, seed=self.seed)["mean"])

    def settle(self, psnr_db: float | None) -> None:
        """The next component is through: with this PSNR, or None if it stays in float."""
        self._components -= 1
        if psnr_db is not None:
            self._left -= 10 ** (-psnr_db / 10)
