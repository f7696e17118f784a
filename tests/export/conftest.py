"""A reference that several tests of this folder export."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_reference import write_tiny_reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset `tiny` with random weights."""
    return write_tiny_reference(tmp_path_factory.mktemp("reference"))
