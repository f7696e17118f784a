from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_deploy.errors import DataError
from ldm_deploy.eval.image_files import image_size, list_images, paired_names, read_image, read_images


def picture(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_deep_png(path: Path, values: np.ndarray) -> None:
    """uint16 (H, W, 3) as a PNG with 16 bits per channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_images_are_read_as_they_are(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture())
    assert image_size(tmp_path / "a.png") == (12, 16)
    Image.fromarray(picture()).save(tmp_path / "b.JPG", quality=95)
    assert read_image(tmp_path / "b.JPG").shape == (12, 16, 3)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    (tmp_path / "more").mkdir()
    assert list_images(tmp_path) == ["a.png", "b.JPG"]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("L", r"is grey \(mode L\); save it as RGB with 8 bits per channel"),
        ("1", "is black and white"),
        ("LA", "is grey with transparency"),
        ("P", "is an image with a palette"),
        ("RGBA", "is an image with transparency"),
        ("I;16", "has 16 bits per channel; save it as RGB with 8 bits"),
    ],
)
def test_what_would_have_to_be_converted_is_refused_by_name(tmp_path: Path, mode: str, message: str) -> None:
    path = tmp_path / "odd.png"
    if mode == "I;16":
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path)
    else:
        Image.fromarray(picture()).convert(mode).save(path)
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=message) as error:
            read(path)
        assert str(error.value).startswith(f"image {path} ")
        assert "\n" not in str(error.value)


def test_16_bit_colour_which_pillow_cuts_to_8_without_a_word_is_refused(tmp_path: Path) -> None:
    write_deep_png(tmp_path / "deep.png", np.full((8, 8, 3), 40001, np.uint16))
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode == "RGB"
    with pytest.raises(DataError, match=r"deep\.png has 16 bits per channel"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("content", [b"", b"not an image at all, but long enough to have a header"])
def test_what_does_not_open_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.png does not open .*; make it again"):
        read_image(tmp_path / "bad.png")


def test_an_image_that_is_cut_off_is_named(tmp_path: Path) -> None:
    Image.fromarray(picture(64, 64)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut\.png does not open"):
        read_image(tmp_path / "cut.png")


def test_unequal_sizes_name_both_files_and_sizes(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    Image.fromarray(picture(12, 20)).save(tmp_path / "b.png")
    with pytest.raises(DataError) as error:
        read_images(tmp_path, ["a.png", "b.png"], (12, 16), tmp_path / "a.png")
    assert str(error.value) == (
        f"images differ in size: {tmp_path / 'b.png'} is 12x20, {tmp_path / 'a.png'} is 12x16 (height x width); "
        "images are never resized, so give images of one size"
    )


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images; put PNG or JPEG files into it"):
        list_images(tmp_path)
    with pytest.raises(DataError, match="none is no folder; give one that holds PNG or JPEG images"):
        list_images(tmp_path / "none")


def test_folders_with_other_names_say_what_each_lacks(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, names in ((one, "abc"), (other, "cdef")):
        folder.mkdir()
        for name in names:
            Image.fromarray(picture()).save(folder / f"{name}.png")
    with pytest.raises(DataError) as error:
        paired_names(one, other)
    assert str(error.value) == (
        f"{other} lacks a.png and 1 more; {one} lacks d.png and 2 more: "
        "images are paired by file name, so give both folders the same names"
    )
