"""The wheel: one top-level name, every package and data file in it, links that point to the stages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

STAGES = ("export", "quantize", "eval")


def read_pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def copy_tree(root: Path, to: Path) -> Path:
    """What a build needs, links kept as links. Weights become small files: only names matter here."""
    to.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, to / name)
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("ldm_deploy", *STAGES):
        shutil.copytree(root / name, to / name, symlinks=True, ignore=skip)
    for file in (root / "ldm_deploy").rglob("*.safetensors"):
        (to / file.relative_to(root)).write_bytes(b"weights")
    return to


def build_wheel(tree: Path, out: Path) -> list[str]:
    """The names inside the wheel built from `tree`, without a network."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def wrong_names(names: list[str], root: Path) -> list[str]:
    """What is in the wheel and should not be, or the other way round."""
    ours = ("ldm_deploy/", "ldm_deploy-")
    wrong = [f"second top-level name: {name}" for name in names if not name.startswith(ours)]
    for folder in ("ldm_deploy", *STAGES):
        for file in sorted((root / folder).rglob("*")):
            inside = file.relative_to(root)
            if not file.is_file() or "__pycache__" in inside.parts:
                continue
            if folder == "ldm_deploy" and inside.parts[1] in STAGES:
                continue  # through a link; counted in its own folder
            wanted = inside if folder == "ldm_deploy" else Path("ldm_deploy") / inside
            if wanted.as_posix() not in names:
                wrong.append(f"not in the wheel: {wanted}")
    return wrong


def undeclared_packages(root: Path) -> list[str]:
    """Folders with an __init__.py that pyproject.toml does not list, and listed ones that are not there."""
    found = set()
    for folder in ("ldm_deploy", *STAGES):
        for file in (root / folder).rglob("__init__.py"):
            parts = file.parent.relative_to(root).parts
            if parts[0] == "ldm_deploy" and len(parts) > 1 and parts[1] in STAGES:
                continue
            found.add(".".join(parts if parts[0] == "ldm_deploy" else ("ldm_deploy", *parts)))
    declared = set(read_pyproject(root)["tool"]["setuptools"]["packages"])
    return [f"not declared: {name}" for name in sorted(found - declared)] + [
        f"declared, not there: {name}" for name in sorted(declared - found)
    ]


def wrong_links(root: Path) -> list[str]:
    wrong = []
    for stage in STAGES:
        link = root / "ldm_deploy" / stage
        if not link.is_symlink() or link.readlink() != Path("..") / stage or not link.resolve().is_dir():
            wrong.append(f"{link.relative_to(root)} is not the link ../{stage}")
    return wrong


def test_the_wheel_holds_the_package_and_nothing_else(root: Path, tmp_path: Path) -> None:
    tree = copy_tree(root, tmp_path / "tree")
    names = build_wheel(tree, tmp_path / "dist")
    assert not wrong_names(names, tree)
    for needed in ("ldm_deploy/py.typed", "ldm_deploy/cli.py", "ldm_deploy/eval/__init__.py"):
        assert needed in names


def test_every_package_is_declared(root: Path) -> None:
    assert not undeclared_packages(root)


def test_links_point_to_the_stages(root: Path) -> None:
    assert not wrong_links(root)


def test_faults_are_found(root: Path, tmp_path: Path) -> None:
    """An undeclared package, a file outside the patterns, a wrong link, a second top-level name."""
    tree = copy_tree(root, tmp_path / "tree")
    (tree / "export" / "new").mkdir()
    (tree / "export" / "new" / "__init__.py").touch()
    (tree / "eval" / "table.parquet").touch()
    assert undeclared_packages(tree) == ["not declared: ldm_deploy.export.new"]
    files = [file for stage in STAGES for file in (tree / stage).rglob("*.py")]
    names = [f"ldm_deploy/{file.relative_to(tree)}" for file in files]
    assert "not in the wheel: ldm_deploy/eval/table.parquet" in wrong_names(names, tree)
    assert "second top-level name: eval/__init__.py" in wrong_names([*names, "eval/__init__.py"], tree)
    (tree / "ldm_deploy" / "eval").unlink()
    (tree / "ldm_deploy" / "eval").symlink_to("../export")
    assert wrong_links(tree) == ["ldm_deploy/eval is not the link ../eval"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_refuses_another_name(root: Path, stage: str) -> None:
    """A top-level `eval` would hide the built-in."""
    command = [sys.executable, "-c", f"import {stage}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"ldm_deploy.{stage}" in done.stderr.splitlines()[-1]


def test_constraints_pin_every_direct_dependency(root: Path) -> None:
    """What `make setup` installs is pinned, so that a fresh clone gets the set that was tested."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = read_pyproject(root)["project"]
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and line[0] != "#"]
    pinned = {canonicalize_name(pin.name): pin for pin in pins}
    assert len(pinned) == len(pins)
    for pin in pins:
        assert str(pin.specifier).startswith("=="), f"{pin} does not pin a version"
        assert pin.url is None
    extras = project["optional-dependencies"]
    direct = [
        *project["dependencies"],
        *extras["train"],
        *extras["export"],
        *extras["openvino"],
        *extras["dev"],
    ]
    for wanted in map(Requirement, direct):
        pin = pinned[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(str(pin.specifier)[2:]), f"{pin} is outside {wanted}"


def test_the_version_is_one(root: Path) -> None:
    from importlib.metadata import version

    import ldm_deploy

    assert version("ldm-deploy") == ldm_deploy.__version__
    assert ldm_deploy.__version__ in (root / "CHANGELOG.md").read_text(encoding="utf-8")
