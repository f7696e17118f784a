"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Ran(NamedTuple):
    """What one `ldm-deploy` call left behind."""

    code: int
    out: str
    err: str


def pytest_configure() -> None:
    """What tests promise to the bit holds on a CPU: a GPU is used only where it is named in the environment."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def ldm_deploy_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Call `ldm-deploy` in this process: `ldm_deploy_cli("verify", path)` -> exit code, stdout, stderr."""
    from ldm_deploy.cli import main

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        code = stop.value.code
        captured = capsys.readouterr()
        return Ran(code if isinstance(code, int) else 1, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def _not_quiet() -> None:
    """`--quiet` in an earlier test is not for the next one."""
    from ldm_deploy.progress import set_quiet

    set_quiet(False)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test takes an export from the user's cache, or leaves one there."""
    os.environ["LDM_DEPLOY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
