"""Training images: a folder or zip in the image-folder layout with captions, or scikit-image's photographs."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ldm_deploy.errors import DataError

# Skin-tone modifiers U+1F3FB to U+1F3FF as they appear in emoji file names.
SKIN_TONE = re.compile(r"_1f3f[b-f]", re.IGNORECASE)
HELD_OUT_SHARE = 20  # one base image in 20

# The colour photographs inside the scikit-image wheel, with captions (all free; see scikit-image's data/README.txt).
PHOTOGRAPHS = {
    "astronaut.png": "astronaut in an orange suit",
    "chelsea.png": "cat",
    "coffee.png": "cup of coffee",
    "rocket.jpg": "rocket at night",
    "color.png": "coloured lights",
    "motorcycle_left.png": "motorcycle",
    "hubble_deep_field.jpg": "galaxies",
    "retina.jpg": "retina",
    "ihc.png": "tissue",
}


@dataclass(frozen=True)
class ImageSet:
    """`images` uint8 (n, size, size, 3); the other fields have one entry per image."""

    images: np.ndarray
    texts: list[str]
    names: list[str]
    held_out: np.ndarray  # bool (n,)
    skin_tone: np.ndarray  # bool (n,): a skin-tone variant of another image
    digest: str
    groups: list[str]  # what kind of thing it shows, "" where the data does not say

    def select(self, chosen: np.ndarray) -> ImageSet:
        """The images where `chosen` (bool, (n,)) is true."""
        rows = np.flatnonzero(chosen)
        return ImageSet(
            self.images[rows],
            [self.texts[row] for row in rows],
            [self.names[row] for row in rows],
            self.held_out[rows],
            self.skin_tone[rows],
            self.digest,
            [self.groups[row] for row in rows],
        )


def base_name(file_name: str) -> str:
    """The file's stem with skin-tone code points removed: variants of one emoji share it."""
    return SKIN_TONE.sub("", PurePosixPath(file_name).stem)


def is_held_out(file_name: str) -> bool:
    """Whether an image is kept from training in both stages: sha256(base name) mod 20 = 0."""
    return int(hashlib.sha256(base_name(file_name).encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def load_images(source: str | Path, size: int, conditioning: str = "captions") -> ImageSet:
    """Read every image, composited over white and box-resized to `size` x `size`.

    `source`: a folder or a zip that holds `metadata.csv` or `metadata.jsonl` with columns `file_name` and `text` (the
    layout of image-folder loaders), or "photos". `texts` are what a model is conditioned on: the column `text` for
    "captions", `label` (`text` where there is none) for "labels", empty for "none". Raises `DataError` naming the
    first file that is missing or damaged. `groups` are the column `group`, or `label`.
    """
    if str(source) == "photos":
        return photograph_crops(size, count=512, seed=0)
    path = Path(source)
    if not path.exists():
        raise DataError(f"data {str(source)!r} does not exist; give a folder, a zip file, or 'photos'")
    digest = hashlib.sha256()
    images, texts, names, skin_tone, groups = [], [], [], [], []
    for row, content in _rows(path):
        name, text = row.get("file_name"), _condition(row, conditioning)
        if not name or text is None:
            raise DataError(f"data {path}: a metadata row has no file_name or no text: {row}; each image needs both")
        if conditioning != "none" and not str(text).strip():
            raise DataError(
                f"data {path}: the text of {name} is empty; give it a caption, or train with conditioning = 'none'"
            )
        text = str(text)
        images.append(_decode(content, size, f"{path}: {name}"))
        texts.append(text)
        names.append(name)
        groups.append(str(row.get("group") or row.get("label") or ""))
        skin_tone.append(str(row.get("skin_tone", "0")) not in ("0", "", "False", "false"))
        digest.update(f"{name}\0{text}\0".encode() + images[-1].tobytes())
    if not images:
        raise DataError(f"data {path} holds no images; metadata.csv needs rows with file_name and text")
    held_out = np.array([is_held_out(name) for name in names])
    digested = f"sha256:{digest.hexdigest()}"
    return ImageSet(np.stack(images), texts, names, held_out, np.array(skin_tone), digested, groups)


def photographs() -> dict[str, np.ndarray]:
    """The photographs inside scikit-image, none of which is downloaded: name -> uint8 (H, W, 3)."""
    try:
        import skimage.data
    except ImportError:
        raise DataError("the photographs come with scikit-image; install ldm_deploy[train]") from None
    folder = Path(skimage.data.__file__).parent
    found = {name: _read_rgb(folder / name) for name in PHOTOGRAPHS if (folder / name).is_file()}
    if not found:
        raise DataError(f"no photographs in {folder}; reinstall scikit-image")
    return found


def held_out_photographs() -> dict[str, np.ndarray]:
    """scikit-learn's two photographs, never trained on: name -> uint8 (H, W, 3)."""
    try:
        import sklearn.datasets
    except ImportError:
        raise DataError("the held-out photographs come with scikit-learn; install ldm_deploy[train]") from None
    folder = Path(sklearn.datasets.__file__).parent / "images"
    return {name: _read_rgb(folder / name) for name in ("china.jpg", "flower.jpg")}


def random_crop(photograph: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A square crop of random place and scale, box-resized: uint8 (H, W, 3) -> uint8 (size, size, 3)."""
    from PIL import Image

    height, width = photograph.shape[:2]
    side = int(np.exp(rng.uniform(np.log(size), np.log(min(height, width, 6 * size)))))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    return np.asarray(crop.resize((size, size), Image.Resampling.BOX))


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Box-resize to smaller squares: uint8 (n, H, W, 3) -> uint8 (n, size, size, 3)."""
    from PIL import Image

    if images.shape[1:3] == (size, size):
        return images
    box = Image.Resampling.BOX
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), box)) for image in images])


def photograph_crops(size: int, count: int, seed: int) -> ImageSet:
    """`count` seeded crops of the photographs as a data set; none is held out (scikit-learn's photographs are)."""
    rng = np.random.default_rng(seed)
    sources = photographs()
    names = [sorted(sources)[index] for index in rng.integers(len(sources), size=count)]
    images = np.stack([random_crop(sources[name], size, rng) for name in names])
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    nothing = np.zeros(count, dtype=bool)
    texts = [PHOTOGRAPHS[name] for name in names]
    return ImageSet(images, texts, names, nothing, nothing.copy(), f"sha256:{digest}", texts)


def _condition(row: dict[str, Any], conditioning: str) -> Any:
    if conditioning == "none":
        return ""
    label = row.get("label") if conditioning == "labels" else None
    return row.get("text") if label in (None, "") else label


def _read_rgb(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _decode(content: bytes, size: int, where: str) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):  # converting them to 8 bits would clip, not scale
                raise DataError(
                    f"image {where} has mode {image.mode!r}, more than 8 bits per channel; save it with 8 bits"
                )
            rgba = image.convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"image {where} does not open ({error}); repair it or remove it from the metadata") from None
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    rgb = Image.alpha_composite(white, rgba).convert("RGB")
    return np.asarray(rgb.resize((size, size), Image.Resampling.BOX))


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Metadata rows with the bytes of their images, from a folder or a zip."""
    if path.is_dir():
        for name in ("metadata.csv", "metadata.jsonl"):
            if (path / name).is_file():
                for row in _parse_metadata(name, (path / name).read_text(encoding="utf-8"), path):
                    file = path / str(row.get("file_name"))
                    if not file.is_file():
                        raise DataError(f"data {path}: {row.get('file_name')} is in {name} and not in the folder")
                    yield row, file.read_bytes()
                return
        raise DataError(f"data folder {path} has no metadata.csv or metadata.jsonl (columns file_name, text)")
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            for member in sorted(members):
                if PurePosixPath(member).name in ("metadata.csv", "metadata.jsonl"):
                    root = PurePosixPath(member).parent
                    for row in _parse_metadata(member, archive.read(member).decode("utf-8"), path):
                        file_name = str(root / str(row.get("file_name")))
                        if file_name not in members:
                            raise DataError(f"data {path}: {file_name} is in {member} and not in the archive")
                        yield row, archive.read(file_name)
                    return
    except zipfile.BadZipFile:
        raise DataError(f"data {path} is neither a folder nor a readable zip file; give one of these") from None
    raise DataError(f"data archive {path} has no metadata.csv or metadata.jsonl (columns file_name, text)")


def _parse_metadata(name: str, text: str, path: Path) -> list[dict[str, Any]]:
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text)))
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"data {path}: {name} is no valid JSON lines: {error}") from None
