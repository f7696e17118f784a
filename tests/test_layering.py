"""Who may import whom: docs/architecture.md, checked on the source. A back edge fails here, with its line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

STAGES = ("export", "quantize", "eval")
MEETING_PLACES = ("ldm_deploy.cli", "ldm_deploy.optimize", "ldm_deploy.__main__")
HEAVY = ("torch", "torchvision", "onnx", "openvino", "nncf", "diffusers", "transformers", "lpips", "tensorrt")

# A part of the package -> the stages it must not import.
FORBIDDEN_STAGES = {
    "core": STAGES,
    "eval": ("export", "quantize"),
    "export": ("quantize",),
    "quantize": ("export",),
}
TORCH_FREE = ("ldm_deploy.runtime", "ldm_deploy.diffusion")


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of the package, the linked stages under their installed names."""
    folders = {"ldm_deploy": root / "ldm_deploy", **{f"ldm_deploy.{stage}": root / stage for stage in STAGES}}
    for prefix, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if prefix == "ldm_deploy" and parts[0] in STAGES:
                continue  # reached through the link: the stage itself is in the list
            yield ".".join([prefix, *(part for part in parts if part != "__init__")]), file


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions. `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
                continue
            assert node.module is not None
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            dynamic = name in ("import_module", "importlib.import_module", "__import__")
            if dynamic and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def part_of(module: str) -> str:
    """`core` or the stage that a dotted name belongs to."""
    second = module.split(".")[1] if "." in module else ""
    return second if second in STAGES else "core"


def violations(module: str, source: str) -> list[str]:
    """What `source`, installed as `module`, imports against the rules."""
    found = []
    part = part_of(module)
    torch_free = module.startswith(TORCH_FREE)
    for line, name in imports(source):
        if name.startswith("."):
            found.append(f"{module}:{line} imports {name!r}: imports are absolute")
        bound = name.startswith("ldm_deploy.") and module not in MEETING_PLACES
        if bound and part_of(name) in FORBIDDEN_STAGES[part]:
            found.append(f"{module}:{line} ({part}) must not import {name}")
        if name.split(".")[0] in STAGES:
            found.append(f"{module}:{line} imports {name}: write ldm_deploy.{name}")
        own = module.rpartition("engine_")[2]  # runtime/engine_openvino.py is where openvino is used
        if torch_free and name.split(".")[0] in set(HEAVY) - {own}:
            found.append(f"{module}:{line} must not import {name}: an application does not have it")
        if torch_free and name.startswith(("ldm_deploy.models", "ldm_deploy.training")):
            found.append(f"{module}:{line} must not import {name}: it needs torch")
    return sorted(set(found))


def module_level_heavy_imports(module: str, source: str) -> list[str]:
    """Heavy imports that run as soon as the module is imported."""
    body = ast.parse(source).body
    statements: list[ast.stmt] = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    top = ast.unparse(ast.Module(statements, []))
    names = [name for _, name in imports(top) if name.split(".")[0] in HEAVY]
    return [f"{module} imports {name} at the top" for name in names]


def test_the_tree_keeps_the_rules(root: Path) -> None:
    found = [line for module, file in modules(root) for line in violations(module, file.read_text("utf-8"))]
    assert not found, "\n".join(found)


def test_every_part_is_looked_at(root: Path) -> None:
    names = [module for module, _ in modules(root)]
    assert {part_of(name) for name in names} == {"core", *STAGES}
    assert len(names) == len(set(names))
    assert "ldm_deploy.cli" in names


def test_the_core_imports_heavy_packages_late(root: Path) -> None:
    found = []
    for module, file in modules(root):
        if part_of(module) == "core" and not module.startswith(("ldm_deploy.models", "ldm_deploy.training")):
            found += module_level_heavy_imports(module, file.read_text("utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("ldm_deploy.artifact", "from ldm_deploy.eval.metrics import ssim", "(core) must not import"),
        ("ldm_deploy.artifact", "from ldm_deploy import eval", "(core) must not import"),
        (
            "ldm_deploy.training.loop",
            "def f():\n    import ldm_deploy.export.parity",
            "(core) must not import",
        ),
        (
            "ldm_deploy.artifact",
            "import importlib\nimportlib.import_module('ldm_deploy.quantize')",
            "must not",
        ),
        ("ldm_deploy.eval.compare", "from ldm_deploy.export import parity", "(eval) must not import"),
        ("ldm_deploy.eval.compare", "from ldm_deploy.quantize import scheme", "(eval) must not"),
        ("ldm_deploy.export.parity", "from ldm_deploy.quantize import scheme", "(export) must not"),
        ("ldm_deploy.quantize.quantize", "from ldm_deploy.export.parity import x", "(quantize) must not"),
        ("ldm_deploy.runtime.pipeline", "def f():\n    import torch.nn", "must not import torch.nn"),
        ("ldm_deploy.runtime.pipeline", "from ldm_deploy.models import unet", "it needs torch"),
        ("ldm_deploy.diffusion.samplers", "from torch import nn", "must not import torch"),
        ("ldm_deploy.eval.report", "from . import metrics", "imports are absolute"),
        ("ldm_deploy.eval.report", "from eval import metrics", "write ldm_deploy.eval"),
    ],
)
def test_a_planted_back_edge_is_found(module: str, source: str, message: str) -> None:
    assert any(message in line for line in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ldm_deploy.cli", "from ldm_deploy.eval.budget import load_budget"),
        ("ldm_deploy.export.to_onnx", "from ldm_deploy.eval.budget import load_budget\nimport torch"),
        ("ldm_deploy.quantize.quantize", "from ldm_deploy.eval.latency import Worker"),
        ("ldm_deploy.eval.compare", "from ldm_deploy.runtime.bundle import read_bundle"),
        ("ldm_deploy.runtime.engines", "import onnxruntime"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_a_planted_heavy_import_is_found() -> None:
    assert module_level_heavy_imports("ldm_deploy.artifact", "import torch\ndef f():\n    import onnx")
    assert not module_level_heavy_imports("ldm_deploy.artifact", "def f():\n    import torch")
