"""Data rules: composition over white, box filter, the held-out split, and clear words for damaged data."""

from __future__ import annotations

import hashlib
import zipfile

import numpy as np
import pytest
from PIL import Image

from ldm_deploy.errors import DataError
from ldm_deploy.training.data import (
    base_name,
    held_out_photographs,
    is_held_out,
    load_images,
    photograph_crops,
    photographs,
    random_crop,
    resize,
)


def write_folder(folder, images, header="file_name,text"):
    folder.mkdir()
    rows = [header]
    for name, image in images.items():
        Image.fromarray(image).save(folder / name)
        rows.append(f"{name},a {name.split('.')[0]}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_transparency_is_composited_over_white_and_boxes_are_averaged(tmp_path):
    image = np.zeros((4, 4, 4), dtype=np.uint8)
    image[:2, :2] = (200, 100, 0, 255)  # one opaque quarter, the rest transparent
    data = load_images(write_folder(tmp_path / "d", {"quarter.png": image}), size=2)
    assert data.images.tolist() == [[[[200, 100, 0], [255] * 3], [[255] * 3, [255] * 3]]]
    half = load_images(tmp_path / "d", size=1)
    expected = np.round((np.array([200, 100, 0]) + 3 * 255) / 4)
    assert np.abs(half.images[0, 0, 0] - expected).max() <= 1
    assert data.texts == ["a quarter"]


def test_folder_and_zip_give_the_same(tmp_path):
    rng = np.random.default_rng(0)
    images = {f"{i}.png": rng.integers(256, size=(8, 8, 3), dtype=np.uint8) for i in range(3)}
    folder = write_folder(tmp_path / "d", images)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"inner/{file.name}")
    from_folder, from_zip = load_images(folder, 8), load_images(tmp_path / "d.zip", 8)
    np.testing.assert_array_equal(from_folder.images, from_zip.images)
    np.testing.assert_array_equal(from_folder.images[1], images["1.png"])
    assert from_folder.digest == from_zip.digest


def test_skin_tone_variants_share_their_base_emojis_split():
    assert base_name("images/emoji_u1f44b_1f3fb.png") == base_name("images/emoji_u1f44b_1f3ff.png") == "emoji_u1f44b"
    assert base_name("emoji_u1f468_1f3fd_200d_1f373.png") == "emoji_u1f468_200d_1f373"
    for name in ("emoji_u1f44b", "emoji_u1f34e", "emoji_u2764"):
        expected = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        assert is_held_out(f"images/{name}.png") == expected
        assert is_held_out(f"{name}_1f3fc.png") == expected
    share = np.mean([is_held_out(f"emoji_u{code:x}.png") for code in range(4000)])
    assert 0.03 < share < 0.07


def test_photographs_need_no_download_and_exclude_the_held_out_ones():
    trained_on, held_out = photographs(), held_out_photographs()
    assert len(trained_on) >= 8
    assert set(held_out) == {"china.jpg", "flower.jpg"}
    assert not set(trained_on) & set(held_out)
    crops = photograph_crops(32, count=6, seed=1)
    assert crops.images.shape == (6, 32, 32, 3)
    np.testing.assert_array_equal(crops.images, photograph_crops(32, 6, 1).images)
    assert crops.digest != photograph_crops(32, 6, 2).digest


def test_random_crop_of_a_flat_photograph_is_flat():
    crop = random_crop(np.full((90, 70, 3), 77, dtype=np.uint8), 32, np.random.default_rng(0))
    assert crop.shape == (32, 32, 3)
    assert (crop == 77).all()


def test_damaged_data_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist; give a folder, a zip file, or 'photos'"):
        load_images(tmp_path / "none", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no metadata\.csv or metadata\.jsonl"):
        load_images(tmp_path / "empty", 8)
    with pytest.raises(DataError, match="holds no images"):
        load_images(write_folder(tmp_path / "rows", {}), 8)
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(DataError, match="neither a folder nor a readable zip"):
        load_images(tmp_path / "text.zip", 8)
    folder = write_folder(tmp_path / "d", {"one.png": np.zeros((8, 8, 3), np.uint8)})
    (folder / "one.png").write_bytes((folder / "one.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"one\.png does not open"):
        load_images(folder, 8)
    (folder / "one.png").unlink()
    with pytest.raises(DataError, match=r"one\.png is in metadata\.csv and not in the folder"):
        load_images(folder, 8)
    captionless = write_folder(tmp_path / "c", {"one.png": np.zeros((8, 8, 3), np.uint8)}, header="file_name,title")
    with pytest.raises(DataError, match="no file_name or no text"):
        load_images(captionless, 8)


def test_images_of_every_mode_are_read_alike_and_deep_ones_are_refused(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    modes = {
        "rgb.png": red,
        "rgba.png": red.convert("RGBA"),
        "p.png": red.convert("P"),
        "cmyk.tif": red.convert("CMYK"),
        "la.png": Image.new("LA", (4, 4), (80, 255)),
        "l.png": Image.new("L", (4, 4), 80),
        "1.png": Image.new("1", (4, 4)),
    }
    for name, image in modes.items():
        image.save(folder / name)
    rows = "".join(f"{name},a square\n" for name in modes)
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    data = load_images(folder, 4)
    expected = [[255, 0, 0]] * 4 + [[80] * 3] * 2 + [[0] * 3]
    assert data.images[:, 0, 0].tolist() == expected
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(folder / "rgb.png")
    with pytest.raises(DataError, match=r"rgb\.png has mode 'I;16', more than 8 bits per channel; save it with 8 bits"):
        load_images(folder, 4)


def test_classes_and_captions_come_from_their_columns(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "metadata.csv").write_text("file_name,text,label\na.png,a caption,food\nb.png,another,\n")
    assert load_images(folder, 4).texts == ["a caption", "another"]
    assert load_images(folder, 4, "labels").texts == ["food", "another"]
    assert load_images(folder, 4, "none").texts == ["", ""]
    (folder / "metadata.csv").write_text("file_name,text\na.png,a caption\nb.png, \n")
    with pytest.raises(DataError, match=r"the text of b\.png is empty; give it a caption, or train with cond"):
        load_images(folder, 4)
    assert load_images(folder, 4, "none").texts == ["", ""]


def test_resize_averages_boxes():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    halved = resize(images, 2)
    expected = images.reshape(2, 2, 2, 2, 2, 3).astype(float).mean(axis=(2, 4))
    assert np.abs(halved - expected).max() <= 0.5
    assert resize(images, 4) is images
