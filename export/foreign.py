"""One component of the user's own: `module:function` returns a torch module, example inputs and their free axes."""

from __future__ import annotations

import gc
import importlib
import inspect
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ldm_deploy.errors import ConfigError, ExportError
from ldm_deploy.eval.parity import Arrays, Probe, write_probes

if TYPE_CHECKING:
    from torch import nn

    from ldm_deploy.cache import Cache
    from ldm_deploy.export.targets import Target
    from ldm_deploy.export.to_onnx import Axes
    from ldm_deploy.runtime.bundle import Bundle


def export_function(
    source: str,
    component: str,
    out: Path,
    *,
    precision: str = "fp32",
    target: str = "onnxruntime-cpu",
    options: Sequence[str] = (),
    threads: int | None = None,
    cache: Cache | None = None,
) -> Bundle:
    """Export what `source` ("package.module:function") returns: (module, inputs, axes).

    `inputs`: input name -> example tensor, by the names of `forward`'s parameters or in their order. `axes`: input name
    -> {dimension: symbol}. Outputs are called by their keys if `forward` returns a dict, else `output`, or `output_0`
    and so on. The engine is compared with the module on the examples and, symbol by symbol, on other sizes. The bundle
    holds the engine and its probes and no variant. Raises `ConfigError` for what is not as described, and otherwise as
    `export_source`.
    """
    from ldm_deploy.export.export import through_cache
    from ldm_deploy.export.module_digest import array_digest, module_digest
    from ldm_deploy.export.targets import choose_target

    chosen = choose_target(target, precision, options)
    made = [call_function(source)]
    module, inputs, axes = made[0]
    digest = module_digest(module)
    examples = {name: array_digest(value) for name, value in inputs.items()}
    del module
    return through_cache(
        cache,
        out,
        " ".join([f"{source} {component}-{precision}-{target}", *options]),
        {
            "module": digest,
            "inputs": examples,
            "axes": axes,
            "component": component,
            "precision": precision,
            "target": target,
            "options": options,
        },
        lambda directory: _export(source, digest, made, directory, component, precision, chosen, threads),
        threads=threads,
    )


def _export(
    source: str,
    digest: str,
    made: list[tuple[nn.Module, Arrays, Axes]],
    out: Path,
    component: str,
    precision: str,
    target: Target,
    threads: int | None,
) -> None:
    """`made` holds what the function returned, and is emptied: nothing else may keep the module in memory."""
    from ldm_deploy.artifact import staged_directory
    from ldm_deploy.export.export import build_engine, provenance
    from ldm_deploy.export.traced import Traced
    from ldm_deploy.progress import task
    from ldm_deploy.runtime.bundle import write_bundle

    module, inputs, axes = made.pop()
    if threads is not None:
        torch.set_num_threads(threads)
    with staged_directory(out) as staging, task(f"exporting for {target.name}", 3) as advance:
        origin = provenance(source, {"module": digest}, [target])
        probes = make_probes(ModuleEngine(module), inputs, axes, source)
        advance()
        folder = staging / "traced"
        folder.mkdir()
        traced = Traced(module, probes, (axes, {name: {} for name in probes[0].outputs}), component, {}, folder)
        del module
        if not target.from_module:
            traced.graph(precision)
            traced.release()  # from here on the engine needs the room
            gc.collect()
        engine = build_engine(traced, staging, precision=precision, target=target, threads=threads)
        advance()
        shutil.rmtree(folder)
        (staging / "probes").mkdir()
        write_probes(staging / "probes" / f"{component}.safetensors", probes)
        advance()
        whole = dict.fromkeys(("model", "schedule", "tokenizer", "default_variant"))
        write_bundle(staging, {**origin, **whole, "engines": [engine], "variants": [], "refused": []})


def call_function(source: str) -> tuple[nn.Module, Arrays, Axes]:
    """What "package.module:function" returns, checked: the module in evaluation mode, arrays, axes.

    The module is looked for in the working directory first. Raises `ConfigError`.
    """
    where, _, name = source.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(where), name, None)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{source}: there is no module {error.name!r} here; run this where it can be imported"
        ) from None
    if not callable(function):
        raise ConfigError(f"{source}: the module {where} has no function {name!r}")
    made = function()
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], torch.nn.Module)):
        kinds = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise ConfigError(f"{source}() returned {kinds}; return (torch.nn.Module, inputs, axes)")
    module, inputs, axes = made
    if not inputs or not all(isinstance(value, torch.Tensor) for value in dict(inputs).values()):
        raise ConfigError(f"{source}() returned the inputs {inputs!r}; return a dict of input name to example tensor")
    for name, named in dict(axes).items():
        if name not in inputs:
            raise ConfigError(
                f"{source}: axes are given for {name!r}, which is no input; there are: {', '.join(inputs)}"
            )
        for axis, symbol in named.items():
            if not 0 <= axis < inputs[name].ndim:
                raise ConfigError(
                    f"{source}: axis {axis} ({symbol}) of {name!r} is not there; it has {inputs[name].ndim} dimensions"
                )
    arrays = {name: np.ascontiguousarray(value.detach().cpu().numpy()) for name, value in inputs.items()}
    return module.eval().requires_grad_(False), arrays, {name: dict(named) for name, named in axes.items()}


class ModuleEngine:
    """A torch module behind the interface of an engine; outputs get their names from what it returns."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = set(inspect.signature(module.forward).parameters)

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        with torch.inference_mode():
            named = set(feeds) <= self.parameters
            found = self.module(**tensors) if named else self.module(*tensors.values())
        if isinstance(found, Mapping):
            outputs = dict(found)
        elif isinstance(found, tuple | list) and len(found) > 1:
            outputs = {f"output_{index}": value for index, value in enumerate(found)}
        else:
            outputs = {"output": found[0] if isinstance(found, tuple | list) else found}
        wrong = next((name for name, value in outputs.items() if not isinstance(value, torch.Tensor)), None)
        if wrong is not None:
            raise ExportError(f"forward() returned {type(outputs[wrong]).__name__} as {wrong!r}; return tensors")
        return {name: value.numpy() for name, value in outputs.items()}


def make_probes(engine: ModuleEngine, inputs: Arrays, axes: Axes, source: str) -> list[Probe]:
    """The examples as given, and each symbol at half its size, or twice where the module does not take half.

    Raises `ExportError` for a symbol that the module itself takes at neither.
    """
    probes = [Probe(inputs, engine.run(inputs))]
    for symbol in dict.fromkeys(symbol for named in axes.values() for symbol in named.values()):
        reasons = []
        for resize in (_halved, _doubled):
            resized = {name: resize(value, axes.get(name, {}), symbol) for name, value in inputs.items()}
            try:
                probes.append(Probe(resized, engine.run(resized)))
                break
            except Exception as error:  # whatever the module raises
                reasons.append(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))
        else:
            raise ExportError(
                f"{source}: the module takes {symbol!r} neither at half nor at twice the example's size "
                f"({reasons[0]}); take the axis out of axes, or mend forward()"
            )
    return probes


def _doubled(value: np.ndarray, named: Mapping[int, str], symbol: str) -> np.ndarray:
    for axis, name in named.items():
        if name == symbol:
            value = np.concatenate([value, value], axis=axis)
    return value


def _halved(value: np.ndarray, named: Mapping[int, str], symbol: str) -> np.ndarray:
    for axis, name in named.items():
        if name == symbol:
            value = np.take(value, range(max(1, value.shape[axis] // 2)), axis=axis)
    return np.ascontiguousarray(value)
