"""The documents are run: make targets exist, commands parse, Python blocks run, TOML loads, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def documents(root: Path) -> list[Path]:
    return [root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> Iterator[str]:
    return (body for found, body in FENCE.findall(text) if found == language)


def make_targets(root: Path) -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*?## ", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def wrong_commands(text: str, targets: set[str]) -> list[str]:
    """Lines of ```bash blocks, and `make …` / `ldm-deploy …` in the text, that would not get past the parser."""
    lines = [line for block in blocks(text, "bash") for line in block.splitlines() if line.strip()]
    inline = re.findall(r"`(make [a-z-]+|ldm-deploy [a-z]+)`", FENCE.sub("", text))
    wrong = [line for line in lines if not parses(line, targets, complete=True)]
    return wrong + [line for line in inline if not parses(line, targets, complete=False)]


def parses(line: str, targets: set[str], *, complete: bool) -> bool:
    import typer

    from ldm_deploy.cli import app

    words = shlex.split(line, comments=True)
    if words[0] == "make":
        return all(word in targets for word in words[1:] if "=" not in word and word != "help") and len(words) > 1
    if words[0] == "pip":
        return words[1] == "install"
    if words[0] == ".venv/bin/python":
        return (Path(__file__).parents[1] / words[1]).is_file()
    if words[0] != "ldm-deploy":
        return False
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if words[1] not in commands:
        return False
    if complete:
        try:
            commands[words[1]].make_context(words[1], words[2:])
        except Exception as error:  # typer keeps the class to itself
            if not hasattr(error, "format_message"):
                raise
            return False
    return True


def broken_links(text: str, file: Path) -> list[str]:
    """Relative links to files that are not there."""
    links = [link.partition("#")[0] for link in LINK.findall(text) if not link.startswith(("http://", "https://"))]
    return [link for link in links if link and not (file.parent / link).exists()]


def test_commands_of_the_documents_parse(root: Path) -> None:
    wrong = {file.name: wrong_commands(file.read_text("utf-8"), make_targets(root)) for file in documents(root)}
    assert not any(wrong.values()), wrong


def test_links_of_the_documents_lead_somewhere(root: Path) -> None:
    wrong = {file.name: broken_links(file.read_text("utf-8"), file) for file in documents(root)}
    assert not any(wrong.values()), wrong


def test_the_readme_starts_with_the_two_commands(root: Path) -> None:
    first = next(blocks((root / "README.md").read_text("utf-8"), "bash"))
    assert first.split("\n")[:2] == ["make export", "make test"]


def test_every_command_is_in_the_readme(root: Path) -> None:
    from ldm_deploy.cli import app

    text = (root / "README.md").read_text("utf-8")
    built = {str(command.name) for command in app.registered_commands} - {"distill"}
    assert {name for name in built if f"ldm-deploy {name} " not in text} == set()


def test_python_blocks_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a toy bundle in the place of the one that `make export` writes."""
    import numpy as np

    from tests.tiny_bundle import write_tiny_bundle

    write_tiny_bundle(tmp_path / "build" / "reference")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for body in blocks((root / "README.md").read_text("utf-8"), "python"):
        exec(body, names)
    images = names["images"]
    assert (images.dtype, images.shape) == (np.uint8, (2, 32, 32, 3))
    assert names["config"]["scaling_factor"] == 0.18215


def test_toml_blocks_load(root: Path, tmp_path: Path) -> None:
    from ldm_deploy.config import load_config
    from ldm_deploy.eval.budget import load_budget

    file = tmp_path / "file.toml"
    loaders = []
    for body in blocks((root / "README.md").read_text("utf-8"), "toml"):
        file.write_text(body, encoding="utf-8")
        loaders.append(load_config if body.startswith("preset") else load_budget)
        loaders[-1](file)
    assert loaders == [load_config, load_budget]


@pytest.mark.parametrize(
    "line",
    [
        "make exprot",
        "ldm-deploy optimise reference --out x",
        "ldm-deploy optimize reference",
        "ldm-deploy sample build/reference 'red apple' --sede 0 --out x.png",
        "ldm-deploy eval",
        "rm -rf build",
        ".venv/bin/python benchmarks/unet_int9.py",
    ],
)
def test_a_planted_wrong_command_is_found(root: Path, line: str) -> None:
    assert wrong_commands(f"```bash\n{line}\n```\n", make_targets(root)) == [line]


def test_planted_wrong_inline_commands_and_links_are_found(root: Path) -> None:
    text = "Run `make exprot`, then `ldm-deploy optimise`; see [this](docs/none.md) and [that](README.md#use)."
    assert wrong_commands(text, make_targets(root)) == ["make exprot", "ldm-deploy optimise"]
    assert broken_links(text, root / "README.md") == ["docs/none.md"]
