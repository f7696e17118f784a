"""examples/python is run as its reader would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ldm_deploy
from tests.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def run(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    example = root / "examples" / "python" / "stickers.py"
    # Without torch: importing it would fail.
    script = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", script, str(example), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_three_stickers_on_a_sheet_of_two_by_two(root: Path, bundle: Path, tmp_path: Path) -> None:
    done = run(root, bundle, tmp_path / "sheet.png", "sun", "rocket", "cat face", "--seed", 5, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("sheet.png: 3 stickers\n")
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (64, 64, 3)
    drawn = ldm_deploy.load(bundle)(["sun", "rocket", "cat face"], seed=5, steps=2)
    np.testing.assert_array_equal(pixels[:32, :32], drawn[0])
    np.testing.assert_array_equal(pixels[:32, 32:], drawn[1])
    np.testing.assert_array_equal(pixels[32:, :32], drawn[2])
    assert (pixels[32:, 32:] == 255).all()


def test_what_goes_wrong_is_one_line(root: Path, tmp_path: Path) -> None:
    done = run(root, tmp_path, tmp_path / "sheet.png", "sun")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} is no bundle")
    assert done.stderr.count("\n") == 1
