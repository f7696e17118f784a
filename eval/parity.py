"""Does an engine compute what the reference computes? Judged on recorded real inputs, without torch.

Export and quantization both ask this of every engine they build: a clean build is not a correct engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm_deploy.errors import LdmDeployError, ParityError

Arrays = dict[str, np.ndarray]


class Runnable(Protocol):
    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Probe:
    """Inputs that a component met while the reference drew images, and what the reference returned for them.

    `allowance`: how many times the limit an engine may err here.
    """

    inputs: Arrays
    outputs: Arrays
    allowance: float = 1.0

    def describe(self) -> str:
        return ", ".join(f"{name} {'x'.join(map(str, value.shape)) or 'scalar'}" for name, value in self.inputs.items())


@dataclass(frozen=True)
class ParityResult:
    """The worst relative error over all probes and outputs, measured by what its probe allows.

    `passed` is false for anything that is not a number.
    """

    relative_error: float
    limit: float
    probe: str
    output: str
    errors: tuple[float, ...]  # the worst of each probe
    reason: str | None = None  # where the engine failed to run, or returned another shape or name
    allowance: float = 1.0  # of the worst probe
    allowances: tuple[float, ...] = ()  # of each

    @property
    def passed(self) -> bool:
        return self.relative_error <= self.limit * self.allowance  # NaN is not

    def to_dict(self) -> dict[str, Any]:
        """The worst of the probes that allow what the limit says; if there are others, theirs in `other_sizes`."""
        strict = [error for error, allowance in zip(self.errors, self.allowances, strict=False) if allowance == 1]
        wide = [error for error, allowance in zip(self.errors, self.allowances, strict=False) if allowance != 1]
        worst = _worst(strict) if strict else self.relative_error
        found: dict[str, Any] = {"relative_error": _finite(worst), "limit": self.limit, "passed": self.passed}
        if wide:
            limit = self.limit * max(self.allowances)
            found["other_sizes"] = {"relative_error": _finite(_worst(wide)), "limit": limit}
        return found


def _worst(errors: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def relative_error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """‖candidate - reference‖ / ‖reference‖ in float64; NaN if either holds a value that is not finite.

    Raises `ValueError` for unequal shapes. A reference of zeros gives 0 for zeros, else infinity.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: reference {reference.shape}, candidate {candidate.shape}")
    expected, found = reference.astype(np.float64), candidate.astype(np.float64)
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        return math.nan
    distance, size = float(np.linalg.norm(found - expected)), float(np.linalg.norm(expected))
    if size == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / size


def compare_outputs(engine: Runnable, probes: Sequence[Probe], limit: float) -> ParityResult:
    """Run every probe and keep the worst error; it is NaN where the engine fails to run or returns another shape."""
    if not probes:
        raise ValueError("parity needs one probe or more; an engine without any was not compared")
    worst, largest = ParityResult(math.nan, limit, "", "", ()), -1.0
    errors: list[float] = []
    for probe in probes:
        found, output, reason = _compare_one(engine, probe)
        errors.append(found)
        share = found / probe.allowance
        if math.isnan(share) or (share > largest and not math.isnan(largest)):
            largest = share
            worst = ParityResult(found, limit, probe.describe(), output, (), reason, probe.allowance)
            if reason is not None:
                break
    return replace(worst, errors=tuple(errors), allowances=tuple(probe.allowance for probe in probes))


def _compare_one(engine: Runnable, probe: Probe) -> tuple[float, str, str | None]:
    try:
        outputs = engine.run(probe.inputs)
    except (LdmDeployError, RuntimeError, ValueError) as failure:
        return math.nan, "", f"it does not run: {str(failure).splitlines()[0]}"
    worst, name_of_worst = -1.0, ""
    for name, expected in probe.outputs.items():
        if name not in outputs:
            return math.nan, name, f"it has no output {name!r}; it has {', '.join(outputs)}"
        if outputs[name].shape != expected.shape:
            return math.nan, name, f"output {name!r} is {outputs[name].shape}, not {expected.shape}"
        error = relative_error(expected, outputs[name])
        if math.isnan(error):
            return error, name, None
        if error > worst:
            worst, name_of_worst = error, name
    return worst, name_of_worst, None


def check_parity(engine: Runnable, probes: Sequence[Probe], limit: float, *, component: str, name: str) -> ParityResult:
    """`compare_outputs`; raises `ParityError` where the limit is broken. `name` is the engine's."""
    result = compare_outputs(engine, probes, limit)
    if not result.passed:
        raise ParityError(explain(result, component, name))
    return result


def explain(result: ParityResult, component: str, name: str) -> str:
    """Why an engine failed parity, in one line with what to do."""
    if result.reason is not None:
        return (
            f"{component}: engine {name} is not the reference: on the probe {result.probe}, {result.reason}; "
            "an axis or a value was fixed by the export: keep it symbolic in the module's forward"
        )
    where = f"output {result.output!r} on the probe {result.probe}"
    if math.isnan(result.relative_error):
        found = f"{where} has values that are not finite"
    else:
        found = f"{where} has relative error {result.relative_error:.3g}"
    return (
        f"{component}: engine {name} differs from the reference: {found}, limit {result.limit * result.allowance:g}; "
        "it is not used: look for the layer where it starts, or raise [parity] in the budget file if this is meant"
    )


def write_probes(path: Path, probes: Sequence[Probe]) -> None:
    """One safetensors file: `input.<name>.<i>` and `output.<name>.<i>`."""
    from safetensors.numpy import save

    arrays: Arrays = {}
    for index, probe in enumerate(probes):
        arrays |= {f"input.{name}.{index}": np.ascontiguousarray(value) for name, value in probe.inputs.items()}
        arrays |= {f"output.{name}.{index}": np.ascontiguousarray(value) for name, value in probe.outputs.items()}
    path.write_bytes(save(arrays))


def read_probes(path: Path) -> list[Probe]:
    """Read what `write_probes` wrote. Raises `ParityError` if the file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ParityError(f"probes {path} cannot be read ({error}); export the model again") from None
    probes: dict[int, Probe] = {}
    for key, value in arrays.items():
        kind, _, rest = key.partition(".")
        name, _, index = rest.rpartition(".")
        if kind not in ("input", "output") or not index.isdecimal():
            raise ParityError(f"probes {path} hold {key!r}, which is neither input nor output; export the model again")
        probe = probes.setdefault(int(index), Probe({}, {}))
        (probe.inputs if kind == "input" else probe.outputs)[name] = value
    return [probes[index] for index in sorted(probes)]
