"""What is checked of a bundle before any of its files reaches an engine: the description, the paths, the files.

Each check raises `BundleError`: one line that says what is wrong with which file and what to do.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_deploy.artifact import file_digest
from ldm_deploy.errors import BundleError, ConfigError

FORMAT = 1
BUNDLE_FILE = "bundle.json"
REMEDY = "copy the bundle again or build it again"

# What a value must be, in the words of the message that refuses it. bool is an int in Python and a number nowhere else.
Kind = tuple[str, Callable[[Any], bool]]
TEXT: Kind = ("a text", lambda value: isinstance(value, str) and value != "")
OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
OBJECTS: Kind = ("a list of objects", lambda value: isinstance(value, list) and all(map(OBJECT[1], value)))
NAMES: Kind = ("a list of texts", lambda value: isinstance(value, list) and value != [] and all(map(TEXT[1], value)))
COUNT: Kind = ("an integer of 1 or more", lambda value: type(value) is int and value > 0)
SIZE: Kind = ("an integer of 0 or more", lambda value: type(value) is int and value >= 0)
NUMBER: Kind = ("a number of 0 or more", lambda value: type(value) in (int, float) and 0 <= value < math.inf)
FACTOR: Kind = ("a number above 0", lambda value: NUMBER[1](value) and value > 0)
PAIR: Kind = (
    "[height, width]",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(COUNT[1], value)),
)
DIGEST: Kind = ("64 hexadecimal digits", lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None)
YES_OR_NO: Kind = ("true or false", lambda value: isinstance(value, bool))
OBJECT_OR_NULL: Kind = ("an object or null", lambda value: value is None or OBJECT[1](value))
NAME_OR_NULL: Kind = ("a text or null", lambda value: value is None or TEXT[1](value))

BUNDLE_KEYS = {
    "name": TEXT, "model": OBJECT_OR_NULL, "schedule": OBJECT_OR_NULL, "tokenizer": NAME_OR_NULL, "engines": OBJECTS,
    "variants": OBJECTS, "files": OBJECT, "default_variant": NAME_OR_NULL,
}  # fmt: skip
MODEL_KEYS = {
    "downsampling": COUNT, "latent_channels": COUNT, "scale_factor": FACTOR, "default_size": PAIR,
    "size_multiple": COUNT, "context_length": COUNT,
}  # fmt: skip
COUNTS: Kind = (
    "a list of integers of 1 or more",
    lambda value: isinstance(value, list) and value != [] and all(map(COUNT[1], value)),
)
RANGE_OR_NULL: Kind = (
    "[lowest, highest] or null",
    lambda value: value is None or (isinstance(value, list) and len(value) == 2 and all(map(NUMBER[1], value))),
)
STUDENT_KEYS = {"sampler": TEXT, "steps": COUNTS, "guidance_range": RANGE_OR_NULL}  # of a model of few steps
# All of them: a default that is filled in silently could be another model's. Those of ADDED came later: absent, they
# are what they were before.
SCHEDULE_KEYS = {
    "beta_schedule": TEXT, "num_train_timesteps": COUNT, "beta_start": FACTOR, "beta_end": FACTOR,
    "prediction_type": TEXT, "rescale_zero_terminal_snr": YES_OR_NO, "timestep_spacing": TEXT, "shift": FACTOR,
    "steps_offset": SIZE,
}  # fmt: skip
ADDED = {"shift": 1.0, "steps_offset": 1}
ENGINE_KEYS = {
    "id": TEXT, "component": TEXT, "precision": TEXT, "runtime": TEXT, "runtime_versions": TEXT, "device": TEXT,
    "files": NAMES,
}  # fmt: skip
VARIANT_KEYS = {"name": TEXT, "engines": NAMES, "sampler": TEXT, "steps": COUNT, "guidance_scale": NUMBER}
FILE_KEYS = {"sha256": DIGEST, "size": SIZE}


def check_description(root: Path, data: Mapping[str, Any]) -> None:
    """Types and cross references of bundle.json; unknown keys are left alone, but in `schedule` they are refused."""
    from ldm_deploy.diffusion.schedule import Schedule

    number = data.get("format")
    if number != FORMAT or type(number) is not int:
        raise BundleError(
            f"bundle {root} has format {number!r}; this version reads format {FORMAT}: upgrade ldm_deploy"
        )
    file = root / BUNDLE_FILE
    _check_keys(file, "", data, BUNDLE_KEYS)
    whole = [data[key] is not None for key in ("model", "schedule", "tokenizer")]
    if any(whole) != all(whole) or (data["variants"] and not all(whole)):
        raise BundleError(
            f"{file}: model, schedule and tokenizer must be there all or none, and variants need them; {REMEDY}"
        )
    if all(whole):
        _check_keys(file, "model.", data["model"], MODEL_KEYS)
        if "distilled" in data["model"]:
            _check_keys(file, "model.", data["model"], {"distilled": OBJECT})
            _check_keys(file, "model.distilled.", data["model"]["distilled"], STUDENT_KEYS)
        _check_keys(file, "schedule.", {**ADDED, **data["schedule"]}, SCHEDULE_KEYS)
    for index, entry in enumerate(data["engines"]):
        _check_keys(file, f"engines[{index}].", entry, ENGINE_KEYS)
    for index, entry in enumerate(data["variants"]):
        _check_keys(file, f"variants[{index}].", entry, VARIANT_KEYS)
    for name, entry in data["files"].items():
        check_path(root, name)
        if not isinstance(entry, dict):
            raise BundleError(f"{file}: files[{name!r}] is {entry!r}, not an object; {REMEDY}")
        _check_keys(file, f"files[{name!r}].", entry, FILE_KEYS)
    try:
        if data["schedule"] is not None:
            Schedule.from_dict(data["schedule"])
    except ConfigError as error:
        raise BundleError(f"{file}: {error}; upgrade ldm_deploy, or {REMEDY}") from None

    own = [data["tokenizer"]] if data["tokenizer"] is not None else []
    for name in (*own, *(file for engine in data["engines"] for file in engine["files"])):
        if name not in data["files"]:
            raise BundleError(f"{file} uses {name!r}, which its list of files does not have; {REMEDY}")
    for kind, key in (("engines", "id"), ("variants", "name")):
        names = [entry[key] for entry in data[kind]]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise BundleError(f"{file}: {kind} has {twice!r} twice; {REMEDY}")
    components = {engine["id"]: engine["component"] for engine in data["engines"]}
    for variant in data["variants"]:
        seen = set()
        for engine_id in variant["engines"]:
            if engine_id not in components:
                raise BundleError(
                    f"bundle {root}: variant {variant['name']} needs engine {engine_id!r}, which it lacks; {REMEDY}"
                )
            if components[engine_id] in seen:
                raise BundleError(
                    f"bundle {root}: variant {variant['name']} has two engines for {components[engine_id]}; {REMEDY}"
                )
            seen.add(components[engine_id])


def _check_keys(file: Path, where: str, values: Mapping[str, Any], keys: Mapping[str, Kind]) -> None:
    for key, (description, fits) in keys.items():
        if key not in values:
            raise BundleError(f"{file} has no {where + key!r}; {REMEDY}")
        if not fits(values[key]):
            shown = repr(values[key])
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise BundleError(f"{file}: {where}{key} is {shown}, not {description}; {REMEDY}")


def check_path(root: Path, name: str) -> None:
    """A path of the bundle is relative, plain, with `/` between its parts, and where links lead it stays inside."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or set(name) & set("\\\0") or pure.as_posix() != name:
        raise BundleError(f"bundle {root} names {name!r}, a path that leaves the bundle; do not use it: {REMEDY}")
    try:
        inside = (root / name).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link to itself
        inside = False
    if not inside:
        raise BundleError(f"bundle {root} names {name!r}, a link that leaves the bundle; do not use it: {REMEDY}")


def files_in(root: Path) -> set[str]:
    """Every file but bundle.json, links included and not followed."""
    return {
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, folders, names in os.walk(root)
        for name in [*names, *(entry for entry in folders if os.path.islink(os.path.join(folder, entry)))]
    } - {BUNDLE_FILE}


def check_files(root: Path, files: Mapping[str, Mapping[str, Any]], *, check_digests: bool) -> None:
    """The files listed and the files there are the same, with the same size and, where asked, the same digest."""
    there = files_in(root)
    missing, unlisted = sorted(set(files) - there), sorted(there - set(files))
    if missing:
        raise BundleError(f"bundle {root}: {missing[0]} is missing; {REMEDY}")
    if unlisted:
        raise BundleError(f"bundle {root}: {unlisted[0]} is not in its list of files; remove it, or {REMEDY}")
    for name, entry in files.items():
        try:
            status = (root / name).stat()
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"bundle {root}: {name} is no regular file; {REMEDY}")
            if status.st_size != entry["size"]:
                raise BundleError(
                    f"bundle {root}: {name} has {status.st_size} bytes instead of {entry['size']}; {REMEDY}"
                )
            if check_digests and file_digest(root / name) != f"sha256:{entry['sha256']}":
                raise BundleError(f"bundle {root}: {name} was changed (its sha256 differs); {REMEDY}")
        except OSError as error:
            raise BundleError(f"bundle {root}: {name} cannot be read ({error.strerror}); {REMEDY}") from None
