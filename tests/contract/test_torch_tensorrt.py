"""What we ask of torch-tensorrt exists, in 2.11 and in 2.14: our calls against the signatures in its own wheels."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import zipfile

import pytest

from ldm_deploy.export import to_torch_tensorrt

VERSIONS = ("2.11.0", "2.14.0")
# What we call -> (file of the wheel, function in it)
PLACES = {
    "torch_tensorrt.dynamo.compile": ("torch_tensorrt/dynamo/_compiler.py", "compile"),
    "torch_tensorrt.save": ("torch_tensorrt/_compile.py", "save"),
    "torch_tensorrt.Input": ("torch_tensorrt/_Input.py", "__init__"),
}


@pytest.fixture(scope="module", params=VERSIONS)
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("torch_tensorrt")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    fetched = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), f"torch-tensorrt=={request.param}"],
        capture_output=True,
        text=True,
    )
    if fetched.returncode:
        pytest.skip(f"not checked: torch-tensorrt {request.param} cannot be fetched")
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def calls() -> list[tuple[str, int, set[str]]]:
    """(name, number of positional arguments, keywords) of every call of torch_tensorrt in our code."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(to_torch_tensorrt))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch_tensorrt."):
            found.append((ast.unparse(node.func), len(node.args), {str(keyword.arg) for keyword in node.keywords}))
    return found


def problems(wheel: zipfile.ZipFile, name: str, positional: int, keywords: set[str]) -> list[str]:
    file, function = PLACES[name]
    source = wheel.read(file).decode()
    definition = next(
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == function
    )
    given = definition.args
    accepted = {argument.arg for argument in (*given.args, *given.kwonlyargs)}
    if function == "__init__":  # it reads its **kwargs by name
        accepted |= {word for word in keywords if f'kwargs["{word}"]' in source or f'"{word}" in kwargs' in source}
    missing = [f"{name} takes no {word!r}" for word in sorted(keywords - accepted)]
    return missing + ([f"{name} takes fewer arguments by position"] if positional > len(given.args) else [])


def test_every_call_fits(wheel: zipfile.ZipFile) -> None:
    made = calls()
    assert {name for name, _, _ in made} == set(PLACES)
    assert [text for call in made for text in problems(wheel, *call)] == []


def test_a_keyword_that_is_not_there_is_found(wheel: zipfile.ZipFile) -> None:
    for name in PLACES:
        assert problems(wheel, name, 1, {"calibrator"}) == [f"{name} takes no 'calibrator'"]


def test_strong_typing_is_the_default(wheel: zipfile.ZipFile) -> None:
    """We ask for nothing: types must be the module's own. 2.14 has no other mode, and no switch for it."""
    defaults = wheel.read("torch_tensorrt/dynamo/_defaults.py").decode()
    compiler = wheel.read("torch_tensorrt/dynamo/_compiler.py").decode()
    assert "USE_EXPLICIT_TYPING = True" in defaults or "use_explicit_typing" not in compiler
