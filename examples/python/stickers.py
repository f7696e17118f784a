"""A small application around a bundle: draws a sheet of stickers and writes it as one PNG.

    pip install ldm-deploy
    python stickers.py build/reference sheet.png "red apple" "cat face" rocket sun

It needs the bundle and what `ldm-deploy` installs (numpy, onnxruntime, Pillow); torch is never imported.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from PIL import Image

import ldm_deploy


def sheet(images: np.ndarray) -> np.ndarray:
    """uint8 (n, H, W, 3) -> one image, as square as can be, empty places white."""
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    filled = np.full((rows * columns, height, width, 3), 255, dtype=np.uint8)
    filled[:count] = images
    return filled.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a sheet of stickers.")
    parser.add_argument("bundle")
    parser.add_argument("out")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--seed", type=int, default=0, help="of the first sticker; the next ones count up")
    parser.add_argument("--steps", type=int, help="fewer is faster; by default what the bundle was measured with")
    arguments = parser.parse_args()

    # Loading checks every file of the bundle. Do it once and keep the pipeline: threads may share it.
    try:
        pipeline = ldm_deploy.load(arguments.bundle)
        images = pipeline(
            arguments.prompts,
            seed=arguments.seed,
            steps=arguments.steps,
            on_step=lambda index, *_: print(f"\rstep {index + 1}", end="", flush=True),
        )
    except ldm_deploy.LdmDeployError as error:  # one line that says what to do
        raise SystemExit(f"error: {error}") from None
    Image.fromarray(sheet(images)).save(arguments.out)
    print(f"\r{arguments.out}: {len(images)} stickers")


if __name__ == "__main__":
    main()
