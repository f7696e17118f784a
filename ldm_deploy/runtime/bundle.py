"""Bundles: the directory an application ships. Everything is checked before an engine sees a file.

The format is described in docs/bundle.md, the checks are in `runtime.checks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldm_deploy.artifact import atomic_write_json, file_digest
from ldm_deploy.errors import BundleError, ConfigError
from ldm_deploy.runtime.checks import (
    BUNDLE_FILE,
    FORMAT,
    REMEDY,
    check_description,
    check_files,
    check_path,
    files_in,
)

# Distributions that bring a runtime's library; the name of the runtime itself where it is not here.
DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "aoti": ("torch",),
}


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
    built_for: dict[str, Any] | None = None  # what an engine that is not portable needs of the machine
    inputs: tuple[dict[str, Any], ...] = ()  # name, dtype and shape, in the engine's order
    outputs: tuple[dict[str, Any], ...] = ()
    rest: str | None = None  # of int8 in OpenVINO: what all other nodes compute in


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
        """By name, or the default one. Raises `ConfigError` for an unknown name, `BundleError` without a default."""
        wanted = name or self.data.get("default_variant")
        if wanted not in self.variants:
            there = ", ".join(self.variants) or "none"
            if name is None:
                raise BundleError(f"bundle {self.root} has no variant {wanted!r}; there are: {there}: name one of them")
            raise ConfigError(f"bundle {self.root} has no variant {wanted!r}; there are: {there}")
        return self.variants[wanted]


def read_bundle(path: str | Path, *, check_digests: bool = True) -> Bundle:
    """Read and check bundle.json and every file it names; no engine is opened.

    Checked: format, types, paths (none absolute, none through "..", no link that leaves the bundle), that the files
    listed and the files there are the same, their sizes and digests, and that engines and variants name what exists.
    Raises `BundleError`, one line with the remedy.
    """
    root = Path(path)
    return _checked(root, _read_json(root), check_digests=check_digests)


def write_bundle(root: Path, data: Mapping[str, Any]) -> Bundle:
    """Write bundle.json, last and atomically, for the files that lie in `root`; `format` and `files` are computed.

    Raises `BundleError` before anything is written if `read_bundle` would refuse the result.
    """
    root = Path(root)
    files = {
        name: {"sha256": file_digest(root / name).removeprefix("sha256:"), "size": (root / name).stat().st_size}
        for name in sorted(files_in(root))
    }
    # Through JSON and back, so that what is returned is what a reader will see.
    content = json.loads(json.dumps({**data, "format": FORMAT, "files": files}, allow_nan=False))
    bundle = _checked(root, content, check_digests=False)
    atomic_write_json(root / BUNDLE_FILE, content)
    return bundle


def verify_bundle(path: str | Path) -> Bundle:
    """`read_bundle` with every check, the default variant's runtime among them."""
    bundle = read_bundle(path)
    if bundle.data["default_variant"] is not None:
        check_runtime_versions(bundle, bundle.variant())
    return bundle


def check_runtime_versions(bundle: Bundle, variant: VariantRecord) -> None:
    """Compare the versions a variant's engines were built for with those installed. Raises `BundleError`."""
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    others = ", ".join(name for name in bundle.variants if name != variant.name)
    remedy = f"install a fitting version, or choose another variant ({others or 'this bundle has no other'})"
    for engine in (bundle.engines[engine_id] for engine_id in variant.engines):
        needs = f"engine {engine.id} needs {engine.runtime} {engine.runtime_versions}"
        try:
            wanted = SpecifierSet(engine.runtime_versions)
        except InvalidSpecifier:
            raise BundleError(f"{needs}, which is no range of versions; {REMEDY}") from None
        installed = _installed(engine.runtime)
        if installed is None:
            raise BundleError(f"{needs} and none is installed; {remedy}")
        if not wanted.contains(installed, prereleases=True):
            raise BundleError(f"{needs} and {installed} is installed; {remedy}")


def _installed(runtime: str) -> str | None:
    from importlib import metadata

    for name in DISTRIBUTIONS.get(runtime, (runtime,)):
        try:
            return metadata.version(name)
        except (metadata.PackageNotFoundError, ValueError):
            continue
    return None


def _read_json(root: Path) -> dict[str, Any]:
    path = root / BUNDLE_FILE
    if not path.is_file():
        raise BundleError(f"{root} is no bundle: there is no {path}; give a directory written by `ldm-deploy optimize`")
    check_path(root, BUNDLE_FILE)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} does not parse ({error}); {REMEDY}") from None
    if not isinstance(data, dict) or "format" not in data:
        raise BundleError(f"{path} is not a bundle's description; {REMEDY}")
    return data


def _checked(root: Path, data: dict[str, Any], *, check_digests: bool) -> Bundle:
    check_description(root, data)
    check_files(root, data["files"], check_digests=check_digests)
    engines = {entry["id"]: _record(EngineRecord, entry) for entry in data["engines"]}
    variants = {entry["name"]: _record(VariantRecord, entry) for entry in data["variants"]}
    return Bundle(root, data, engines, variants)


def _record(kind: type[Any], entry: Mapping[str, Any]) -> Any:
    """The fields of a record, picked from a checked entry; keys it does not know are left in `Bundle.data`."""
    values = {field.name: entry[field.name] for field in fields(kind) if field.name in entry}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
