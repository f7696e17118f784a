"""Images in folders: found by name, read as they are. What would have to be converted or resized is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm_deploy.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")
PNG_DEPTH = 24  # the byte of a PNG file that says how many bits a channel has
WHAT = {  # Pillow's mode -> in words
    "1": "black and white", "L": "grey", "LA": "grey with transparency", "P": "an image with a palette",
    "RGBA": "an image with transparency", "CMYK": "a CMYK image",
}  # fmt: skip

Size = tuple[int, int]  # height, width


def list_images(folder: Path) -> list[str]:
    """The names of the PNG and JPEG files in a folder (not below it), sorted. Raises `DataError` if there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one that holds PNG or JPEG images")
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not names:
        raise DataError(f"{folder} holds no images; put PNG or JPEG files into it (folders in it are not searched)")
    return names


def paired_names(reference: Path, candidate: Path) -> list[str]:
    """The file names that both folders hold. Raises `DataError` unless they hold the same ones."""
    names, others = list_images(reference), list_images(candidate)
    if names != others:
        found = []
        for folder, missing in ((candidate, set(names) - set(others)), (reference, set(others) - set(names))):
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                found.append(f"{folder} lacks {min(missing)}{more}")
        raise DataError(f"{'; '.join(found)}: images are paired by file name, so give both folders the same names")
    return names


def image_size(path: Path) -> Size:
    """Height and width, from the header alone. Raises `DataError` for what `read_image` would refuse."""
    return _open(path, pixels=False).shape[:2]


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3). Raises `DataError` for what is not 8-bit RGB, or does not open."""
    return _open(path, pixels=True)


def read_images(folder: Path, names: Sequence[str], size: Size, first: Path) -> np.ndarray:
    """uint8 (n, H, W, 3). Raises `DataError` for an image of another size than that of `first`, naming both."""
    images = []
    for name in names:
        image = read_image(folder / name)
        if image.shape[:2] != size:
            raise DataError(
                f"images differ in size: {folder / name} is {_text(image.shape)}, {first} is {_text(size)} "
                "(height x width); images are never resized, so give images of one size"
            )
        images.append(image)
    return np.stack(images)


def _text(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _open(path: Path, pixels: bool) -> np.ndarray:
    """The image; without `pixels` an array of its shape that takes no memory."""
    from PIL import Image, UnidentifiedImageError

    try:
        with open(path, "rb") as file:
            head = file.read(PNG_DEPTH + 1)
        with Image.open(path) as image:
            # Pillow reads 16-bit colour as 8 bits without a word.
            deep = image.format == "PNG" and head[PNG_DEPTH] == 16
            if deep or image.mode.startswith(("I", "F")):
                raise DataError(
                    f"image {path} has 16 bits per channel; save it as RGB with 8 bits, scaled as it is to be shown"
                )
            if image.mode != "RGB":
                raise DataError(
                    f"image {path} is {WHAT.get(image.mode, 'not RGB')} (mode {image.mode}); "
                    "save it as RGB with 8 bits per channel, the same way in every folder"
                )
            if not pixels:
                return np.broadcast_to(np.uint8(0), (image.height, image.width, 3))
            return np.asarray(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"image {path} does not open ({error}); make it again") from None
