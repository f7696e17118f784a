"""The user's cache of exports: what was made once of the same content, options, tools and machine is not made again.

An entry is a directory of its own, named by the digest of everything that went into it. Its large files share their
storage with the bundles made from it (hard links), and are read-only for that reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_deploy.artifact import (
    atomic_write_json,
    check_replaceable,
    content_key,
    file_digest,
    file_digests,
    staged_directory,
    tool_versions,
)
from ldm_deploy.errors import ArtifactError, ConfigError
from ldm_deploy.progress import note

RECEIPT = "receipt.json"
CONTENT = "content"
COMPILED = "compiled"  # what runtimes compiled, a folder for each: they name the files and check whom they fit
LIMIT_BYTES = 20 * 10**9
LARGE_BYTES = 10**6
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# What engines are made with, and of.
PACKAGES = (
    "diffusers", "ldm-deploy", "nncf", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxscript",
    "openvino", "safetensors", "tensorrt", "tokenizers", "torch", "torch-tensorrt", "transformers",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A cached directory. `used`: seconds since the epoch."""

    root: Path
    about: str
    size_bytes: int
    used: float


@dataclass(frozen=True)
class Cache:
    """Entries below `root`, in all at most `limit_bytes`; the ones unused for longest go first."""

    root: Path
    limit_bytes: int = LIMIT_BYTES

    def fill(self, out: Path, about: str, ingredients: Mapping[str, Any], build: Callable[[Path], object]) -> bool:
        """Put at `out` what an earlier call made of the same `ingredients`, else `build(out)`; whether it was there.

        An entry that is not as it was written is dropped. What the cache itself cannot do (no space, no rights) is said
        and costs the reuse only. `about`: for whoever lists the cache.
        """
        check_replaceable(out)
        entry = self.root / content_key(ingredients).removeprefix("sha256:")
        whole = self._is_whole(entry)
        if not whole:
            build(out)
        elif _is_placed(entry, out):
            note(f"{out}: unchanged")
        else:
            with staged_directory(out) as staging:
                _share(entry / CONTENT, staging)
            note(f"{out}: taken from the cache")
        try:
            if not whole:
                self._keep(entry, out, about)
            _place(entry, out)
        except (OSError, ArtifactError) as error:
            note(f"{out}: not kept in the cache ({error})")
        return whole

    def entries(self) -> list[Entry]:
        """The one used last comes first."""
        found = []
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            receipt = _read(path / RECEIPT)
            if receipt is not None and _is_ours(path):
                size = sum(file["size"] for file in receipt["files"].values())
                found.append(Entry(path, receipt["about"], size, (path / RECEIPT).stat().st_mtime))
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove every entry, broken ones too, and nothing else; returns the bytes of those that were whole."""
        freed = sum(entry.size_bytes for entry in self.entries())
        for path in list(self.root.iterdir()) if self.root.is_dir() else ():
            if _is_ours(path):
                shutil.rmtree(path)
        freed += self.compiled_bytes()
        shutil.rmtree(self.root / COMPILED, ignore_errors=True)
        return freed

    def compiled(self, runtime: str) -> Path | None:
        """The folder in which a runtime keeps the models it compiled; None where nothing may be kept or written.

        It is trimmed to a quarter of the limit first; the files unused for longest go.
        """
        folder, total = self.root / COMPILED / runtime, 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = sorted(folder.iterdir(), key=lambda path: -max(path.stat().st_atime, path.stat().st_mtime))
            for path in kept:
                total += path.stat().st_size
                if total > self.limit_bytes // 4:
                    path.unlink()
        except OSError:  # another process was faster, or the place is read-only
            return folder if os.access(folder, os.W_OK) else None
        return folder if self.limit_bytes and os.access(folder, os.W_OK) else None

    def compiled_bytes(self) -> int:
        return sum(size for size, _ in _files(self.root / COMPILED).values())

    def _is_whole(self, entry: Path) -> bool:
        """Every file as the receipt has it. Where size and time of change are those of then, the bytes are not read:
        a bundle's digests are checked whenever it is opened."""
        receipt = _read(entry / RECEIPT)
        if receipt is None:
            shutil.rmtree(entry, ignore_errors=True)
            return False
        there = _files(entry / CONTENT)
        doubtful = [name for name, file in receipt["files"].items() if there.get(name) != _times(file)]
        if set(there) == set(receipt["files"]) and all(name in there for name in doubtful):
            digests = file_digests(entry / CONTENT, doubtful)
            if all(digests[name] == receipt["files"][name]["sha256"] for name in doubtful):
                return True
        note(f"the cache entry {entry} was changed; it is made anew")
        shutil.rmtree(entry, ignore_errors=True)
        return False

    def _keep(self, entry: Path, out: Path, about: str) -> None:
        sizes = {name: size for name, (size, _) in _files(out).items()}
        if sum(sizes.values()) > self.limit_bytes:
            note(f"{out}: larger than the cache may be ({self.limit_bytes} bytes) and not kept there")
            return
        with staged_directory(entry) as staging:
            (staging / CONTENT).mkdir()
            _share(out, staging / CONTENT)
            digests = file_digests(staging / CONTENT, sizes)
            files = {
                name: {"size": size, "mtime_ns": changed, "sha256": digests[name]}
                for name, (size, changed) in _files(staging / CONTENT).items()
            }
            atomic_write_json(staging / RECEIPT, {"format": 1, "about": about, "files": files, "placed": {}})
        self._evict(spare=entry)

    def _evict(self, spare: Path) -> None:
        total = 0
        for entry in self.entries():
            total += entry.size_bytes
            if total > self.limit_bytes and entry.root != spare:
                shutil.rmtree(entry.root, ignore_errors=True)


def user_cache() -> Cache:
    """At LDM_DEPLOY_CACHE, else where the system keeps caches; of LDM_DEPLOY_CACHE_LIMIT bytes ("5GB"), else 20 GB.

    Raises `ConfigError` for a limit that is no size.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("LDM_DEPLOY_CACHE") or Path(home) / "ldm-deploy")
    text = os.environ.get("LDM_DEPLOY_CACHE_LIMIT", "")
    limit = parse_size(text) if text else LIMIT_BYTES
    if limit is None:
        raise ConfigError(
            f"LDM_DEPLOY_CACHE_LIMIT is {text!r}; give a number of bytes, as 5GB (kB, MB, GB, TB; 0 keeps nothing)"
        )
    return Cache(root, limit)


def parse_size(text: str) -> int | None:
    """Bytes of "5GB", "1.5 MB" or "1000"; None for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|kB|MB|GB|TB)", text)
    return None if match is None else int(float(match[1]) * UNITS[match[2]])


def made_with(threads: int | None, machine: str) -> dict[str, Any]:
    """The ingredients of everything that is made here: tools, our own code, the machine (its fingerprint)."""
    return {"versions": tool_versions(*PACKAGES), "code": _code_digest(), "machine": machine, "threads": threads}


def show_cache(cache: Cache) -> dict[str, Any]:
    """Print the entries; returns them as data."""
    entries = cache.entries()
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        print(f"{entry.root.name[:12]}  {entry.size_bytes / 1e6:10.2f} MB  used {used}  {entry.about}")
    total, compiled = sum(entry.size_bytes for entry in entries), cache.compiled_bytes()
    if compiled:
        print(f"compiled by runtimes: {compiled / 1e6:.2f} MB")
    print(
        f"{cache.root}: {len(entries)} exports, {total / 1e6:.2f} MB of {cache.limit_bytes / 1e6:.0f} MB "
        "(LDM_DEPLOY_CACHE_LIMIT); `ldm-deploy cache --clear` removes them"
    )
    return {
        "format": 1,
        "directory": str(cache.root),
        "limit_bytes": cache.limit_bytes,
        "size_bytes": total,
        "compiled_bytes": compiled,
        "entries": [
            {"key": entry.root.name, "about": entry.about, "size_bytes": entry.size_bytes, "used_unix_s": entry.used}
            for entry in entries
        ],
    }


def _code_digest() -> str:
    """Over this package's code: a checkout changes without its version doing so."""
    root = Path(__file__).parent
    paths = [
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith((".py", ".toml"))
    ]
    return content_key({path.relative_to(root).as_posix(): file_digest(path) for path in paths})


def _place(entry: Path, out: Path) -> None:
    """Note that `out` holds the entry, which is used now."""
    receipt = _read(entry / RECEIPT)
    if receipt is not None:
        there = {place: files for place, files in receipt["placed"].items() if os.path.isdir(place)}
        atomic_write_json(entry / RECEIPT, {**receipt, "placed": {**there, os.path.realpath(out): _files(out)}})


def _is_placed(entry: Path, out: Path) -> bool:
    """Whether `out` is as an earlier run left it."""
    receipt = _read(entry / RECEIPT) or {"placed": {}}
    placed = receipt["placed"].get(os.path.realpath(out), {})
    return bool(placed) and {name: tuple(times) for name, times in placed.items()} == _files(out)


def _share(source: Path, target: Path) -> None:
    """Every file of `source` in `target`: large ones linked where the file system can, the others copied.

    External data of an ONNX file is copied whatever its size: onnx takes a link for an attack and refuses it.
    """
    for name, (size, _) in _files(source).items():
        made = target / name
        made.parent.mkdir(parents=True, exist_ok=True)
        if size < LARGE_BYTES or name.endswith(".onnx.data") or not _linked(source / name, made):
            shutil.copyfile(source / name, made)


def _linked(source: Path, made: Path) -> bool:
    try:
        os.link(source, made)
        made.chmod(0o444)  # one written in place would change the others
    except OSError:
        made.unlink(missing_ok=True)
        return False
    return True


def _files(root: Path) -> dict[str, tuple[int, int]]:
    """name -> (size in bytes, time of last change in ns)"""

    def walk() -> Iterator[tuple[str, tuple[int, int]]]:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                status = path.stat()
                yield path.relative_to(root).as_posix(), (status.st_size, status.st_mtime_ns)

    return dict(walk())


def _times(file: Mapping[str, Any]) -> tuple[int, int]:
    return file["size"], file["mtime_ns"]


def _is_ours(path: Path) -> bool:
    return re.fullmatch(r"(\.?)[0-9a-f]{64}(\.(staging|old)-\d+)?", path.name) is not None and path.is_dir()


def _read(receipt: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(receipt.read_text(encoding="utf-8"))
        fits = (
            data["format"] == 1
            and isinstance(data["placed"], dict)
            and all({"size", "mtime_ns", "sha256"} <= set(file) for file in data["files"].values())
        )
        return data if fits and isinstance(data["about"], str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
