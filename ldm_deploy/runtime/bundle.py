"""Bundles: the directory an application ships. Everything is checked before an engine sees a file.

The format is described in docs/bundle.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_deploy.artifact import atomic_write_json, file_digest
from ldm_deploy.errors import BundleError

FORMAT = 1
BUNDLE_FILE = "bundle.json"
REQUIRED = ("name", "model", "schedule", "tokenizer", "engines", "variants", "files")
MODEL_KEYS = ("downsampling", "latent_channels", "scale_factor", "default_size", "size_multiple", "context_length")
REMEDY = "copy the bundle again or build it again"


@dataclass(frozen=True)
class EngineRecord:
    """One entry of `engines`: a component at a precision for a runtime on a device."""

    id: str
    component: str
    precision: str
    runtime: str
    runtime_versions: str
    device: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class VariantRecord:
    """One entry of `variants`: engines that turn a prompt into an image, and how they are driven."""

    name: str
    engines: tuple[str, ...]
    sampler: str
    steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. `data` is the content of bundle.json."""

    root: Path
    data: dict[str, Any]
    engines: dict[str, EngineRecord]
    variants: dict[str, VariantRecord]

    def variant(self, name: str | None = None) -> VariantRecord:
        """By name, or the default one. Raises `BundleError` listing the names there are."""
        wanted = name or self.data.get("default_variant")
        if wanted not in self.variants:
            there = ", ".join(self.variants) or "none"
            raise BundleError(f"bundle {self.root} has no variant {wanted!r}; there are: {there}")
        return self.variants[wanted]


def read_bundle(path: str | Path, *, check_digests: bool = True) -> Bundle:
    """Read and check bundle.json and every file it names; no engine is opened.

    Checked: format, paths (none absolute, none through "..", no link that leaves the bundle), that the files listed and
    the files there are the same, their sizes and digests, and that engines and variants name what exists.
    Raises `BundleError`, one line with the remedy.
    """
    root = Path(path)
    data = _read_json(root)
    if data["format"] != FORMAT:
        raise BundleError(
            f"bundle {root} has format {data['format']!r}; this version reads format {FORMAT}: upgrade ldm_deploy"
        )
    missing = [key for key in REQUIRED if key not in data]
    missing += [f"model.{key}" for key in MODEL_KEYS if key not in data.get("model", {})]
    if missing:
        raise BundleError(f"{root / BUNDLE_FILE} has no {missing[0]!r}; {REMEDY}")
    files: dict[str, dict[str, Any]] = data["files"]
    for name in files:
        _check_path(root, name)
    _check_files(root, files, check_digests=check_digests)
    try:
        engines = {entry["id"]: _record(EngineRecord, entry) for entry in data["engines"]}
        variants = {entry["name"]: _record(VariantRecord, entry) for entry in data["variants"]}
    except (KeyError, TypeError) as error:
        raise BundleError(f"{root / BUNDLE_FILE}: an engine or variant has no {error}; {REMEDY}") from None
    for name in (data["tokenizer"], *(file for engine in engines.values() for file in engine.files)):
        if name not in files:
            raise BundleError(f"{root / BUNDLE_FILE} uses {name!r}, which its list of files does not have; {REMEDY}")
    for variant in variants.values():
        for engine_id in variant.engines:
            if engine_id not in engines:
                raise BundleError(f"bundle {root}: variant {variant.name} needs engine {engine_id!r}, which it lacks; {REMEDY}")
    return Bundle(root, data, engines, variants)


def check_runtime_versions(bundle: Bundle, variant: VariantRecord) -> None:
    """Compare the versions a variant's engines were built for with those installed. Raises `BundleError`."""
    from importlib import metadata

    from packaging.specifiers import SpecifierSet

    for engine_id in variant.engines:
        engine = bundle.engines[engine_id]
        package = engine.runtime
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise BundleError(f"engine {engine.id} needs {package} {engine.runtime_versions}; install it") from None
        if not SpecifierSet(engine.runtime_versions).contains(installed, prereleases=True):
            raise BundleError(
                f"engine {engine.id} needs {package} {engine.runtime_versions} and {installed} is installed; "
                "install a fitting version, or choose another variant"
            )


def write_bundle(root: Path, data: Mapping[str, Any]) -> Bundle:
    """Write bundle.json, last and atomically, for the files that lie in `root`; `files` is computed. Returns the bundle."""
    files = {
        name: {"sha256": file_digest(root / name).removeprefix("sha256:"), "size": (root / name).stat().st_size}
        for name in sorted(_files_in(root))
    }
    atomic_write_json(root / BUNDLE_FILE, {**data, "format": FORMAT, "files": files})
    return read_bundle(root, check_digests=False)


def verify_bundle(path: str | Path) -> Bundle:
    """`read_bundle` with every check, the runtime versions of all variants among them."""
    bundle = read_bundle(path)
    for variant in bundle.variants.values():
        check_runtime_versions(bundle, variant)
    return bundle


def _read_json(root: Path) -> dict[str, Any]:
    path = root / BUNDLE_FILE
    if not path.is_file():
        raise BundleError(f"{root} is no bundle: there is no {path}; give a directory written by `ldm-deploy optimize`")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} does not parse ({error}); {REMEDY}") from None
    if not isinstance(data, dict) or "format" not in data:
        raise BundleError(f"{path} is not a bundle's description; {REMEDY}")
    return data


def _check_path(root: Path, name: str) -> None:
    pure = PurePosixPath(name)
    inside = (root / name).resolve().is_relative_to(root.resolve())
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not inside:
        raise BundleError(f"bundle {root} names {name!r}, a path that leaves the bundle; do not use it: {REMEDY}")


def _files_in(root: Path) -> set[str]:
    """Every file but bundle.json, links included and not followed."""
    return {
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, folders, names in os.walk(root)
        for name in [*names, *(entry for entry in folders if os.path.islink(os.path.join(folder, entry)))]
    } - {BUNDLE_FILE}


def _check_files(root: Path, files: Mapping[str, Mapping[str, Any]], *, check_digests: bool) -> None:
    there = _files_in(root)
    missing, unlisted = sorted(set(files) - there), sorted(there - set(files))
    if missing:
        raise BundleError(f"bundle {root}: {missing[0]} is missing; {REMEDY}")
    if unlisted:
        raise BundleError(f"bundle {root}: {unlisted[0]} is not in its list of files; remove it, or {REMEDY}")
    for name, entry in files.items():
        size = (root / name).stat().st_size
        if size != entry["size"]:
            raise BundleError(f"bundle {root}: {name} has {size} bytes instead of {entry['size']}; {REMEDY}")
        if check_digests and file_digest(root / name) != f"sha256:{entry['sha256']}":
            raise BundleError(f"bundle {root}: {name} was changed (its sha256 differs); {REMEDY}")


def _record(kind: type[Any], entry: Mapping[str, Any]) -> Any:
    values = {name: entry[name] for name in kind.__dataclass_fields__}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
