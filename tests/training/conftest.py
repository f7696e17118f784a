"""References with random weights, to distil from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm_deploy.config import PRESETS
from tests.tiny_reference import write_tiny_reference


@pytest.fixture
def make_teacher(tmp_path: Path) -> Callable[..., Path]:
    """`make_teacher(autoencoder=..., unet=...)` -> a directory like the preset `tiny` with these sections changed."""

    def make(**sections: Any) -> Path:
        directory = tmp_path / "teacher"
        directory.mkdir()
        return write_tiny_reference(directory, dataclasses.replace(PRESETS["tiny"], **sections))

    return make
