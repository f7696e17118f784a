"""What an application or a terminal pays for: no torch and no engine library before they are needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "onnxruntime",
    "onnx",
    "openvino",
    "nncf",
    "diffusers",
    "transformers",
    "lpips",
    "scipy",
    "skimage",
)
REPORT = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def loaded_after(statement: str) -> list[str]:
    """Heavy packages in `sys.modules` of a fresh interpreter after `statement`."""
    command = [sys.executable, "-c", f"{statement}\n{REPORT}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def test_import_loads_no_heavy_package() -> None:
    assert loaded_after("import ldm_deploy") == []


@pytest.mark.parametrize("arguments", [["--help"], ["optimize", "--help"], ["sample", "--help"], ["--version"]])
def test_help_loads_no_heavy_package(arguments: list[str]) -> None:
    call = f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code"
    assert loaded_after(f"from ldm_deploy.cli import main\n{call}") == []


@pytest.mark.parametrize("module", ["artifact", "diffusion", "runtime"])
def test_runtime_never_loads_torch(module: str) -> None:
    """All modules of the part at once."""
    statement = f"""
import importlib, pkgutil, ldm_deploy.{module} as part
for found in pkgutil.iter_modules(getattr(part, "__path__", [])):
    importlib.import_module(part.__name__ + "." + found.name)
"""
    assert not {"torch", "onnx", "openvino", "lpips"} & set(loaded_after(statement))


def test_a_planted_import_is_seen() -> None:
    assert loaded_after("import onnxruntime") == ["onnxruntime"]
