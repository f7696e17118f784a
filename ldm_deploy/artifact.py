"""Files and directories that are either whole or absent: atomic writes, digests, manifests.

Write beside, flush to disk, rename; the manifest last.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ldm_deploy.errors import ArtifactError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def content_key(ingredients: Mapping[str, Any]) -> str:
    """`sha256:<hex>` of JSON-like values, independent of the order of keys."""
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), default=list)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def tool_versions(*names: str) -> dict[str, str]:
    """Installed versions by distribution name; "absent" where there is none."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"

    return {name: version(name) for name in names}


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A full disk or a folder without write permission becomes one line with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArtifactError(
                f"the disk is full while writing {path}; nothing there was changed: "
                "free some space and run the same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ArtifactError(f"{path} cannot be written ({error.strerror}); choose another place") from error
        raise


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by a file with `content`; a kill at any moment leaves the old file or the new one."""
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def atomic_write_json(path: Path, data: Any) -> None:
    """`atomic_write_bytes` of indented UTF-8 JSON. NaN and infinity are refused (`ValueError`)."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


@contextlib.contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory beside `out`; when the block ends it is renamed to `out`, whatever was there is removed.

    An exception removes it and leaves `out` as it was. Staging directories of processes that died are swept away.
    """
    out = Path(os.path.abspath(out))
    with _explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        staging = out.parent / f".{out.name}.staging-{os.getpid()}"
        staging.mkdir()
        try:
            yield staging
            for path in staging.rglob("*"):
                if path.is_file() and not path.is_symlink():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            if out.exists():
                old = out.parent / f".{out.name}.old-{os.getpid()}"
                os.replace(out, old)
                os.replace(staging, out)
                shutil.rmtree(old)
            else:
                os.replace(staging, out)
            _sync_directory(out.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _sweep(out: Path) -> None:
    """Remove what dead processes left beside `out`; bring back the old `out` if one died between its two renames."""
    for path in sorted(out.parent.glob(f".{out.name}.*-*")):
        kind, _, process = path.name.removeprefix(f".{out.name}.").partition("-")
        if kind not in ("staging", "old") or not process.isdecimal():
            continue
        if int(process) != os.getpid() and _alive(int(process)):
            continue
        if kind == "old" and not out.exists():
            os.replace(path, out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(directory: Path, kind: str, key: str, parents: Mapping[str, str]) -> None:
    """Record digest and size of every file in `directory` (the manifest itself left out)."""
    files = {
        path.relative_to(directory).as_posix(): {"sha256": file_digest(path), "size": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    data = {"format": MANIFEST_FORMAT, "kind": kind, "key": key, "parents": dict(parents), "files": files}
    atomic_write_json(directory / MANIFEST, data)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises `ArtifactError` if the manifest is missing, damaged or of another format."""
    path = directory / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); restore the directory or make it again") from None
    if not isinstance(data, dict) or data.get("format") != MANIFEST_FORMAT:
        raise ArtifactError(f"{path} is not of format {MANIFEST_FORMAT}, which this version reads; upgrade ldm_deploy")
    return data


def verify_manifest(directory: Path) -> dict[str, Any]:
    """Compare every file with the manifest. Raises `ArtifactError` naming the first that is missing or changed."""
    data = read_manifest(directory)
    for name, entry in data["files"].items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"{directory}: {name} is missing; restore the directory or make it again")
        if file_digest(path) != entry["sha256"]:
            raise ArtifactError(f"{directory}: {name} is not what was written; restore the directory or make it again")
    return data
