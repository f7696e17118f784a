"""What a torch module of the user's own computes, as a digest: weights, settings and source code."""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ldm_deploy.artifact import content_key, file_digest

DEPTH = 8  # of objects in objects that are read into


def module_digest(module: nn.Module) -> str:
    """sha256 over tensors, attributes of every submodule, and code: that of its classes and all other code in this
    process that is neither ours nor of an installed package.

    An attribute without readable content counts with its address, which is another one in every process: better
    exported twice than taken for the same.
    """
    from concurrent.futures import ThreadPoolExecutor

    state = module.state_dict(keep_vars=True)
    # Buffers that are not saved are computed with as well.
    tensors = {**state, **dict(module.named_buffers())}
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(tensors, pool.map(_tensor_digest, tensors.values()), strict=True))
    parts = {name: (type(part).__qualname__, _settings(part)) for name, part in module.named_modules()}
    return content_key({"tensors": digests, "parts": parts, "code": _code(module)})


def array_digest(array: np.ndarray) -> str:
    """sha256 over dtype, shape and values."""
    content = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return f"sha256:{content.hexdigest()}"


def _tensor_digest(value: torch.Tensor) -> str:
    plain = value.detach().cpu().contiguous().flatten()
    return f"{value.dtype} {tuple(value.shape)} {array_digest(plain.view(torch.uint8).numpy())}"


def _settings(part: nn.Module) -> dict[str, str]:
    """Attributes of one submodule that are no tensors and no submodules; hooks and the like of torch left out."""
    own = {name for name in vars(nn.Module()) if name.startswith("_")}
    return {name: _text(value) for name, value in vars(part).items() if name not in own}


def _text(value: Any, depth: int = 0) -> str:
    if isinstance(value, torch.Tensor):
        return _tensor_digest(value)
    if isinstance(value, np.ndarray):
        return array_digest(value)
    if isinstance(value, Mapping):  # diffusers' configurations keep notes of their own in random order under "_…"
        return repr({str(key): _text(entry, depth + 1) for key, entry in value.items() if str(key)[:1] != "_"})
    if isinstance(value, list | tuple | set):
        entries = [_text(entry, depth + 1) for entry in value]
        return repr(sorted(entries) if isinstance(value, set) else entries)
    if isinstance(value, nn.Module):
        return type(value).__qualname__  # its content is among the submodules, or it computes nothing
    if inspect.isroutine(value):
        closed = [_text(cell.cell_contents, depth + 1) for cell in getattr(value, "__closure__", None) or ()]
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)} {closed}"
    if getattr(type(value), "__repr__", None) is object.__repr__ and depth < DEPTH:
        return f"{type(value).__qualname__} { {name: _text(entry, depth + 1) for name, entry in _own(value).items()} }"
    return repr(value)


def _own(value: Any) -> dict[str, Any]:
    slots = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
    return {name: getattr(value, name, None) for name in sorted({*getattr(value, "__dict__", ()), *slots})}


def _code(module: nn.Module) -> list[str]:
    kinds = {type(part) for part in module.modules() if not type(part).__module__.startswith("torch.")}
    files = {inspect.getsourcefile(kind) for kind in kinds}
    installed = {Path(path).resolve() for path in (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix)}
    for name, loaded in list(sys.modules.items()):
        file = Path(getattr(loaded, "__file__", None) or "")
        ours = name.partition(".")[0] == "ldm_deploy"
        if file.is_file() and not ours and not installed & set(file.resolve().parents):
            files.add(str(file))
    return sorted(file_digest(Path(file)) for file in files if file is not None)
