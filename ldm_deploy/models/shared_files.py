"""Files that a student has from the reference beside it instead of once more: two that ship together weigh less.

model.json's `shared`: file name -> `folder`, a directory beside the student's own, and `sha256`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_deploy.artifact import atomic_write_json, file_digest, read_manifest, write_manifest
from ldm_deploy.errors import ArtifactError


def place_of(directory: Path, model: Mapping[str, Any], name: str) -> Path:
    """Where a file of the reference `directory` lies. `model`: the content of its model.json.

    Raises `ArtifactError` for a shared file that is not there, or is not the one that was shared.
    """
    shared = model.get("shared", {}).get(name)
    if shared is None:
        return directory / name
    folder = shared["folder"]
    if Path(folder).name != folder or folder in ("", ".", ".."):
        raise ArtifactError(f"{directory / 'model.json'} shares {name} with {folder!r}; a folder beside it is allowed")
    path = directory.absolute().parent / folder / name
    if not path.is_file():
        raise ArtifactError(f"{directory} shares {name} with {path.parent}, which has none; put the two side by side")
    if file_digest(path) != shared["sha256"]:
        raise ArtifactError(
            f"{directory} shares {path}, which is another file by now; restore the one it was made with"
        )
    return path


def share_files(directory: Path, sibling: Path, names: Sequence[str]) -> list[str]:
    """Remove those of `names` from `directory` that `sibling`, a directory beside it, has byte for byte; returns them.

    model.json and the manifest say so. Raises `ArtifactError` if the two do not lie side by side.
    """
    from ldm_deploy.models.reference import read_model

    if directory.resolve().parent != sibling.resolve().parent:
        raise ArtifactError(f"{directory} and {sibling} do not lie side by side; move one of them")
    model, manifest, shared = read_model(directory), read_manifest(directory), {}
    for name in names:
        own, other = directory / name, sibling / name
        if own.is_file() and other.is_file() and file_digest(own) == file_digest(other):
            shared[name] = {"folder": sibling.resolve().name, "sha256": file_digest(other)}
    atomic_write_json(directory / "model.json", {**model, "shared": {**model.get("shared", {}), **shared}})
    for name in shared:
        (directory / name).unlink()
    write_manifest(directory, manifest["kind"], manifest["key"], manifest["parents"])
    return list(shared)
