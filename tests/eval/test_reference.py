from __future__ import annotations

import math

import numpy as np
import pytest

from ldm_deploy.errors import DataError
from ldm_deploy.eval import reference
from ldm_deploy.eval.grid import Grid, load_grid, retrieval_grid
from ldm_deploy.eval.lpips_distance import Lpips
from ldm_deploy.eval.reference import (
    base_text,
    draw,
    nearest_by_pixels,
    psnr_db_inside,
    reconstruct_held_out,
    reconstruct_photographs,
    retrieve,
)
from ldm_deploy.training.data import ImageSet


def image_set(count: int = 40, size: int = 64) -> ImageSet:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    images = np.kron(coarse, np.ones((1, size // 8, size // 8, 1), np.uint8))
    images[:, :, : size // 2] = 255
    held_out, tone = np.zeros(count, bool), np.zeros(count, bool)
    held_out[:6] = True
    tone[3:6] = True
    texts = [f"thing {index}" for index in range(count)]
    texts[5] = "thing 4: dark skin tone"
    return ImageSet(
        images, texts, [f"{index}.png" for index in range(count)], held_out, tone, "sha256:" + "0" * 64, texts
    )


class Pipeline:
    """An autoencoder that is off by `error` where the image is not white, and a sampler that draws from the data."""

    def __init__(self, images: ImageSet, error: int = 2, wrong: tuple[str, ...] = ()) -> None:
        self.images, self.error, self.wrong = images, error, wrong
        self.model = {"size_multiple": 16}
        self.sampler, self.steps, self.guidance_scale = "ddim", 50, 5.0

    def encode(self, image: np.ndarray) -> np.ndarray:
        return image

    def decode(self, latent: np.ndarray) -> np.ndarray:
        change = np.where((latent == 255).all(-1, keepdims=True), 0, np.where(latent < 128, self.error, -self.error))
        return (latent + change).astype(np.uint8)

    def __call__(self, prompt: str, *, seed: int, steps: int | None, guidance_scale: float | None) -> np.ndarray:
        index = self.images.texts.index(prompt)
        image = self.images.images[index + 1 if prompt in self.wrong else index]
        return np.clip(image.astype(int) + seed, 0, 255).astype(np.uint8)[None]


def test_white_background_flatters_and_is_taken_out() -> None:
    images = image_set()
    figures = reconstruct_held_out(Pipeline(images), images)  # type: ignore[arg-type]
    inside = 20 * math.log10(255 / 2)
    assert figures["n"] == 3  # held out and no skin-tone variant
    assert figures["psnr_db_not_white"] == pytest.approx(inside)
    assert figures["psnr_db"] == pytest.approx(inside + 10 * math.log10(2))  # half of each image is white
    assert 0 < figures["ssim"] < 1


def test_nothing_held_out_is_a_reason() -> None:
    images = image_set()
    images.held_out[:] = False
    figures = reconstruct_held_out(Pipeline(images), images)  # type: ignore[arg-type]
    assert (figures["psnr_db"], figures["reason"]) == (None, "no image is held out")


def test_psnr_inside_a_mask_looks_at_the_mask_alone() -> None:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    other = images.copy()
    other[0, 0, 0] = 10
    other[1, 3, 3] = 10
    mask = np.zeros((3, 4, 4), bool)
    mask[:2, 0, 0] = True
    found = psnr_db_inside(images, other, mask)
    assert found == pytest.approx([20 * math.log10(25.5), 100])  # the third image has no pixel in the mask


def test_photographs_say_which_size_was_measured() -> None:
    pytest.importorskip("sklearn")
    rows = reconstruct_photographs(Pipeline(image_set()))  # type: ignore[arg-type]
    assert {name: row["size"] for name, row in rows.items()} == {"china.jpg": "192x320", "flower.jpg": "192x320"}
    assert all(row["psnr_db"] > 40 for row in rows.values())


def test_photographs_that_are_not_there_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise DataError("the held-out photographs come with scikit-learn")

    monkeypatch.setattr("ldm_deploy.training.data.held_out_photographs", absent)
    (row,) = reconstruct_photographs(Pipeline(image_set())).values()  # type: ignore[arg-type]
    assert (row["psnr_db"], row["reason"]) == (None, "the held-out photographs come with scikit-learn")


@pytest.mark.parametrize("method", ["LPIPS", "pixels"])
def test_retrieval_counts_samples_that_are_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    lpips = Lpips()
    if method == "LPIPS" and not lpips.available:
        pytest.skip(str(lpips.reason))
    if method == "pixels":
        lpips.reason = "no weights"
    monkeypatch.setattr(reference, "Lpips", lambda: lpips)
    images = image_set()
    grid = Grid(("thing 7", "thing 9", "thing 20"), (0, 1))
    found = retrieve(draw(Pipeline(images, wrong=("thing 9",)), grid), images, grid)  # type: ignore[arg-type]
    assert found["method"].startswith(method)
    assert [row["nearest"] for row in found["samples"]] == [
        "thing 7", "thing 7", "thing 10", "thing 10", "thing 20", "thing 20",
    ]  # fmt: skip
    assert (found["hits"], found["n"]) == (4, 6)
    assert found["rate"] == pytest.approx(2 / 3)
    assert found["gallery"] == 40


def test_prompts_that_the_data_does_not_have_cannot_be_retrieved() -> None:
    images = image_set()
    found = retrieve(images.images[:2], images, Grid(("thing 1", "unicorn"), (0,)))
    assert found["rate"] is None
    assert "no image of 'unicorn'" in found["reason"]
    assert retrieve(images.images[:2], images, Grid(("",), (0, 1)))["reason"] == "the model takes no prompt"


def test_shipped_prompts_of_retrieval_begin_with_those_of_the_reports() -> None:
    grid, report = retrieval_grid(), load_grid()
    assert len(set(grid.prompts)) == len(grid.prompts) == 50
    assert grid.prompts[:24] == report.prompts
    assert grid.seeds == report.seeds == (0, 1)


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("red apple", "red apple"),
        ("thumbs up: medium-dark skin tone", "thumbs up"),
        ("man: bald", "man: bald"),
        ("man: light skin tone, bald", "man: bald"),
        ("handshake: light skin tone, dark skin tone", "handshake"),
    ],
)
def test_skin_tones_do_not_count(text: str, base: str) -> None:
    assert base_text(text) == base


def test_nearest_by_pixels_over_several_blocks() -> None:
    rng = np.random.default_rng(0)
    gallery = rng.integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    queries = gallery[[3, 300, 599]]
    index, distance = nearest_by_pixels(queries, gallery)
    assert index.tolist() == [3, 300, 599]
    np.testing.assert_allclose(distance, 0, atol=1e-4)
    (other,), (far,) = nearest_by_pixels(queries[:1], gallery[500:501])
    assert other == 0
    assert far == pytest.approx(np.sqrt(((queries[0].astype(float) - gallery[500]) ** 2).mean()))
