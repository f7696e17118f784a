from __future__ import annotations

import os

import pytest

from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval.grid import Grid, load_grid


def test_the_grid_is_fixed() -> None:
    grid = load_grid()
    assert len(grid.prompts) == len(set(grid.prompts)) == 24
    assert grid.seeds == (0, 1)
    assert len(grid.pairs) == 48
    assert grid.prompts_sha256 == "69d6df2ee74ea9c6479b934d198c8b2056edf59a98c8faafc6f42976d0cccca9"


def test_the_prompts_are_texts_of_emoji_that_are_not_held_out() -> None:
    source = os.environ.get("LDM_DEPLOY_DATA")
    if source is None:
        pytest.skip("LDM_DEPLOY_DATA is not set: the emoji are not here")
    from ldm_deploy.training.data import load_images

    images = load_images(source, 8)
    rows = list(zip(images.texts, images.held_out, images.skin_tone, strict=True))
    for prompt in load_grid().prompts:
        found = [bool(held_out) for text, held_out, skin_tone in rows if text == prompt and not skin_tone]
        assert found == [False], prompt


def test_other_prompts_have_another_digest_and_none_is_an_error() -> None:
    assert load_grid(["a", "b"]).prompts_sha256 != load_grid(["b", "a"]).prompts_sha256
    assert load_grid(["a"], [3, 4]).pairs == [("a", 3), ("a", 4)]
    with pytest.raises(EvaluationError, match="at least one prompt and one seed"):
        Grid((), (0,))
