"""Files and directories that are either whole or absent: atomic writes, digests, manifests.

Write beside, flush to disk, rename; the manifest last. What a killed process left behind is swept by the next writer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm_deploy.errors import ArtifactError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
# A directory with one of these was written by one of our stages and may be replaced by the next run.
MARKS = (MANIFEST, "bundle.json", "report.json")


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of a file's bytes."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def file_digests(root: Path, names: Iterable[str]) -> dict[str, str]:
    """name -> digest of the files `names` below `root`, several at a time: hashing is what an unchanged model costs."""
    from concurrent.futures import ThreadPoolExecutor

    ordered = sorted(names)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(ordered, pool.map(lambda name: file_digest(root / name), ordered), strict=True))


def content_key(ingredients: Mapping[str, Any]) -> str:
    """`sha256:<hex>` of JSON-like values, independent of the order of keys."""
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), default=list)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def tool_versions(*names: str) -> dict[str, str]:
    """Installed versions by distribution name; "absent" where there is none."""
    from importlib import metadata

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "absent"

    return {name: version(name) for name in names}


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by a file with `content`; a kill at any moment leaves the old file or the new one.

    A device or pipe (`/dev/stdout`) is written to as it is. Raises `ArtifactError` if the disk is full, or the place
    cannot be written.
    """
    path = Path(path)
    with _explained(path, size_bytes=len(content)):
        if path.is_dir():
            raise ArtifactError(f"{path} is a directory; give the name of a file")
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path, ("part",))
        part = path.with_name(f".{path.name}.part-{os.getpid()}-{threading.get_ident()}")
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def atomic_write_json(path: Path, data: Any) -> None:
    """`atomic_write_bytes` of indented UTF-8 JSON. NaN and infinity are refused (`ValueError`)."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


@contextlib.contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield an empty directory beside `out`; when the block ends it is renamed to `out`, whatever was there is removed.

    An exception removes it and leaves `out` as it was. Staging directories of processes that died are swept away.
    Raises `ArtifactError` before the block if `out` is a file, or a directory that none of our stages wrote (a wrong
    `--out` must not cost anybody's files), or if another process is about to write it.
    """
    out = Path(os.path.realpath(out))
    with _explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out, ("staging", "old"))
        check_replaceable(out)
        staging = out.with_name(f".{out.name}.staging-{os.getpid()}")
        staging.mkdir()
        try:
            _refuse_others(out)
            yield staging
            for folder, _, names in os.walk(staging, topdown=False):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _swap(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _refuse_others(out: Path) -> None:
    """Raises `ArtifactError` if a living process besides this one has a staging directory for `out`."""
    for name in sorted(os.listdir(out.parent)):
        found = re.fullmatch(rf"\.{re.escape(out.name)}\.staging-(\d+)", name)
        if found and int(found[1]) != os.getpid() and _alive(int(found[1])):
            raise ArtifactError(
                f"{out} is being written by process {found[1]}; wait for it, or choose another place "
                f"(if that process is something else, remove {out.parent / name})"
            )


def check_replaceable(out: Path) -> None:
    """Raises `ArtifactError` unless `out` is absent, empty or ours. Ask before the work, not after it."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file and a directory is to be written; choose another place")
    there = sorted(os.listdir(out)) if out.exists() else []
    if there and not set(MARKS) & set(there):
        raise ArtifactError(
            f"{out} would be replaced and was not written by ldm-deploy (it holds {there[0]!r}); "
            "choose a new or empty directory"
        )


def _swap(staging: Path, out: Path) -> None:
    """Put `staging` in the place of `out`. A death between the two renames is mended by the next `_sweep`."""
    if not out.exists():
        os.replace(staging, out)
    else:
        old = out.with_name(f".{out.name}.old-{os.getpid()}")
        os.replace(out, old)
        try:
            os.replace(staging, out)
        except BaseException:
            os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(out.parent)


def _sweep(path: Path, kinds: tuple[str, ...]) -> None:
    """Remove what dead processes left beside `path`; bring back the old one if one died between its two renames."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.({'|'.join(kinds)})-(\d+)(-\d+)?")
    for name in sorted(os.listdir(path.parent)):
        found = pattern.fullmatch(name)
        if found is None:
            continue
        kind, process = found[1], int(found[2])
        mine = process == os.getpid()
        if kind == "part":
            if not mine and not _alive(process):
                path.with_name(name).unlink(missing_ok=True)
        elif mine or not _alive(process):
            if kind == "old" and not path.exists():
                os.replace(path.with_name(name), path)
            else:
                shutil.rmtree(path.with_name(name), ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Flush a file or a directory's entries to disk; links have nothing of their own to flush."""
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _explained(path: Path, size_bytes: int | None = None) -> Iterator[None]:
    """What a disk or a folder can refuse becomes one line with the remedy."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            needed = "" if size_bytes is None else f" ({size_bytes} bytes needed)"
            raise ArtifactError(
                f"the disk is full while writing {path}{needed}; nothing there was changed: "
                "free some space and run the same command again"
            ) from error
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            place = path if error.filename is None else error.filename
            raise ArtifactError(f"{place} cannot be used ({error.strerror}); choose another place") from error
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise ArtifactError(
                f"{path} cannot be replaced, as a mount point cannot; choose a directory inside it"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise ArtifactError(f"a part of {path} is a file, not a directory; choose another place") from error
        raise


def is_full_disk(error: BaseException) -> bool:
    """By number, or by the words of libraries that raise their own kind (safetensors, ONNX Runtime, numpy)."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return bool(re.search(rf"{os.strerror(errno.ENOSPC)}|\d+ requested and \d+ written", str(error)))


def write_manifest(directory: Path, kind: str, key: str, parents: Mapping[str, str]) -> None:
    """Record digest and size of every file in `directory` (the manifest itself left out)."""
    files = {
        path.relative_to(directory).as_posix(): {"sha256": file_digest(path), "size": path.stat().st_size}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    data = {"format": MANIFEST_FORMAT, "kind": kind, "key": key, "parents": dict(parents), "files": files}
    atomic_write_json(directory / MANIFEST, data)


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises `ArtifactError` if the manifest is missing, damaged or of another format."""
    path = directory / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); restore the directory or make it again") from None
    if not isinstance(data, dict) or data.get("format") != MANIFEST_FORMAT:
        raise ArtifactError(f"{path} is not of format {MANIFEST_FORMAT}, which this version reads; upgrade ldm_deploy")
    if not isinstance(data.get("files"), dict):
        raise ArtifactError(f"{path} has no list of files; restore the directory or make it again")
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
