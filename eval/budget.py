"""The budget: which limits a variant must keep, and whether it keeps them (pass, fail or not measured)."""

from __future__ import annotations

import difflib
import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ldm_deploy.errors import BudgetError

FORMAT = 1
SHIPPED = "eval/budgets.toml"
# The name says what it bounds and from which side; quality limits need nothing but images.
QUALITY = (
    "psnr_db_min",
    "worst_psnr_db_min",
    "ssim_min",
    "ms_ssim_min",
    "lpips_max",
    "delta_e2000_max",
    "colour_shift_max",
)
LIMITS = (*QUALITY, "speedup_min", "peak_memory_max", "size_max")
MINIMA = tuple(name for name in LIMITS if name.endswith("_min"))
RELATIVE = ("peak_memory_max", "size_max")  # bytes, or a multiple of the baseline: "0.6x"
SETTINGS = ("lpips_backbone", "required")
# How much worse than in a stored result a variant may be (eval/regression.py says what each is).
TOLERANCES = (
    "speedup_drop_max", "psnr_db_drop_max", "ssim_drop_max", "lpips_rise_max", "colour_change_max", "image_change_max",
    "peak_memory_rise_max", "size_rise_max",
)  # fmt: skip
AGAINST = ("still_runs", *TOLERANCES)  # the gates against a stored result
BACKBONES = ("squeeze", "alex", "vgg")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "mixed", "w8", "w4")
COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder", "pipeline")
MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")

Limit = float | str
Result = Literal["pass", "fail", "not measured"]


@dataclass(frozen=True)
class Limits:
    """The limits of one variant, in the order of `LIMITS` or `TOLERANCES`."""

    limits: Mapping[str, Limit]
    required: tuple[str, ...]
    lpips_backbone: str = "squeeze"


@dataclass(frozen=True)
class Measured:
    """One figure of a variant. `interval`: where it lies at `level` percent; None without a spread (bytes).

    `reason`: why it counts as not measured. `baseline`: the same figure of the baseline, for multiples. `detail`: what
    a reader wants to see beside the figure, such as the two figures it is the difference of.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    reason: str | None = None
    baseline: float | None = None
    detail: str | None = None
    level: int = 95


@dataclass(frozen=True)
class Gate:
    """One limit, checked. `limit` is in the unit of the value; `limit_text` as the budget has it."""

    name: str
    limit: float | None
    limit_text: str
    value: float | None
    interval: tuple[float, float] | None
    required: bool
    result: Result
    reason: str | None
    detail: str | None = None
    level: int = 95

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "limit": self.limit,
            "limit_text": self.limit_text,
            "value": self.value,
            f"ci{self.level}": list(self.interval) if self.interval else None,
            "required": self.required,
            "result": self.result,
            "reason": self.reason,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class Budget:
    """A budget file. `variants`: (pattern, what it overrides), in the order of the file; the last match wins.

    `regression` and `variant_regressions`: the same for the tolerances against a stored result.
    """

    path: str
    digest: str
    default: Mapping[str, Any]
    variants: tuple[tuple[str, Mapping[str, Any]], ...]
    regression: Mapping[str, Any]
    variant_regressions: tuple[tuple[str, Mapping[str, Any]], ...]
    parity: Mapping[str, float]
    component_parity: Mapping[str, Mapping[str, float]]

    def limits_for(self, variant: str) -> Limits:
        """`[default]` with every matching `[variant."pattern"]` laid over it."""
        return self._limits(variant, self.default, self.variants, LIMITS)

    def tolerances_for(self, variant: str) -> Limits:
        """`[regression]` with every matching `[variant."pattern".regression]` laid over it."""
        return self._limits(variant, self.regression, self.variant_regressions, TOLERANCES)

    def _limits(
        self,
        variant: str,
        default: Mapping[str, Any],
        variants: tuple[tuple[str, Mapping[str, Any]], ...],
        names: tuple[str, ...],
    ) -> Limits:
        merged = dict(default)
        for pattern, overrides in variants:
            if fnmatchcase(variant, pattern):
                merged |= overrides
        limits = {name: merged[name] for name in names if name in merged}
        required = tuple(merged.get("required", ()))
        for name in required:
            if name not in limits:
                raise BudgetError(
                    f"budget {self.path}: variant {variant} requires {name!r} and has no such limit; set it or drop it"
                )
        return Limits(limits, required, merged.get("lpips_backbone", "squeeze"))

    def parity_limit(self, precision: str, component: str | None = None) -> float:
        """The largest relative error of an engine: `[parity.<component>]` before `[parity]`."""
        specific = self.component_parity.get(component or "", {})
        if precision in specific:
            return specific[precision]
        if precision not in self.parity:
            raise BudgetError(
                f"budget {self.path} has no parity limit for precision {precision!r}; it has {', '.join(self.parity)}: "
                f"add `{precision} = ...` under [parity]"
            )
        return self.parity[precision]


def load_budget(path: Path | str | None = None) -> Budget:
    """Read a budget file; None is the shipped one. Raises `BudgetError` naming the key and the nearest known one."""
    shipped = _shipped_text()
    if path is None:
        return _parse(shipped, SHIPPED)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise BudgetError(f"budget {path} cannot be read: {reason}; give a TOML file") from None
    budget, own = _parse(text, str(path)), _parse(shipped, SHIPPED)
    digest = "sha256:" + hashlib.sha256((text + shipped).encode()).hexdigest()
    if not budget.regression:  # a gate that nobody set would sleep
        regressions = own.variant_regressions + budget.variant_regressions
        budget = replace(budget, regression=own.regression, variant_regressions=regressions)
    return replace(budget, parity={**own.parity, **budget.parity}, digest=digest)


def check_limits(limits: Limits, measured: Mapping[str, Measured]) -> list[Gate]:
    """One gate per limit. A figure that is missing from `measured` is not measured."""
    nothing = Measured(None, reason="this figure was not taken")
    return [
        _check(name, limit, measured.get(name, nothing), name in limits.required)
        for name, limit in limits.limits.items()
    ]


def _check(name: str, limit: Limit, found: Measured, required: bool) -> Gate:
    text = limit if isinstance(limit, str) else f"{limit:g}"

    def gate(result: Result, reason: str | None, bound: float | None) -> Gate:
        if reason is not None and found.detail is not None:
            reason = f"{reason} ({found.detail})"
        return Gate(name, bound, text, found.value, found.interval, required, result, reason, found.detail, found.level)

    bound: float | None = None
    if isinstance(limit, str):
        multiple = float(limit[:-1])
        if found.baseline is not None:
            bound = multiple * found.baseline
    else:
        bound = float(limit)
    if found.value is None or found.reason is not None:
        return gate("not measured", found.reason or "this figure was not taken", bound)
    if bound is None:
        return gate("not measured", f"the limit is {text} of the baseline, which was not measured", None)
    low, high = found.interval or (found.value, found.value)
    result = judge(low, high, bound, minimum=name in MINIMA)
    if result == "not measured":
        reason = (
            f"too noisy: the limit {bound:g} lies inside the {found.level} % interval {low:.4g} to {high:.4g}; "
            "take more samples"
        )
        return gate(result, reason, bound)
    if result == "fail":
        side = "below" if name in MINIMA else "above"
        return gate(result, f"{found.value:.4g} is {side} the limit {bound:.4g}", bound)
    return gate(result, None, bound)


def judge(low: float, high: float, limit: float, *, minimum: bool) -> Result:
    """Three-valued: the whole interval must keep the limit to pass, and all of it must break it to fail."""
    kept, broken = (low >= limit, high < limit) if minimum else (high <= limit, low > limit)
    return "pass" if kept else "fail" if broken else "not measured"


def _shipped_text() -> str:
    return (resources.files("ldm_deploy.eval") / "budgets.toml").read_text(encoding="utf-8")


def _parse(text: str, path: str) -> Budget:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BudgetError(f"budget {path} is no valid TOML: {error}") from None
    _known(data, ("format", "default", "variant", "regression", "parity"), f"budget {path}")
    if data.get("format") != FORMAT:
        raise BudgetError(
            f"budget {path} has format {data.get('format')!r}; this version reads `format = {FORMAT}`: "
            "add the line, or upgrade ldm_deploy"
        )
    default = _section(data.get("default", {}), f"budget {path}: [default]")
    regression = _tolerances(data.get("regression", {}), f"budget {path}: [regression]")
    variants = data.get("variant", {})
    if not isinstance(variants, dict):
        raise BudgetError(f'budget {path}: `variant` is {variants!r}; write [variant."name or pattern"]')
    overrides, regressions = [], []
    for name, table in variants.items():
        where = f'budget {path}: [variant."{name}"'
        _known(table, (*LIMITS, *SETTINGS, "regression"), f"{where}]")
        overrides.append((name, _section({k: v for k, v in table.items() if k != "regression"}, f"{where}]")))
        regressions.append((name, _tolerances(table.get("regression", {}), f"{where}.regression]")))
    parity, by_component = _parity(data.get("parity", {}), f"budget {path}: [parity]")
    digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    return Budget(path, digest, default, tuple(overrides), regression, tuple(regressions), parity, by_component)


def _known(table: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(table, dict):
        raise BudgetError(f"{where} is {table!r}; it must be a table of {', '.join(names)}")
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise BudgetError(f"{where}: unknown key {key!r}; did you mean {near!r}? Known: {', '.join(names)}")


def _section(table: Any, where: str) -> dict[str, Any]:
    _known(table, (*LIMITS, *SETTINGS), where)
    for name, value in table.items():
        if name == "required":
            _required(value, LIMITS, where)
        elif name == "lpips_backbone":
            if value not in BACKBONES:
                raise BudgetError(f"{where}: lpips_backbone is {value!r}; allowed: {', '.join(BACKBONES)}")
        elif isinstance(value, str) and name in RELATIVE:
            if MULTIPLE.fullmatch(value) is None:
                raise BudgetError(
                    f'{where}: {name} is {value!r}; give bytes, or a multiple of the baseline such as "0.6x"'
                )
        elif not _number(value) or (value < 0 and name != "ssim_min"):
            allowed = 'bytes, or a multiple such as "0.6x"' if name in RELATIVE else "a number of 0 or more"
            raise BudgetError(f"{where}: {name} is {value!r}; give {allowed}")
    return dict(table)


def _tolerances(table: Any, where: str) -> dict[str, Any]:
    _known(table, (*TOLERANCES, "required"), where)
    for name, value in table.items():
        if name == "required":
            _required(value, TOLERANCES, where)
        elif not _number(value) or value < 0:
            raise BudgetError(f"{where}: {name} is {value!r}; give a number of 0 or more")
    return dict(table)


def _required(value: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(value, list):
        raise BudgetError(f"{where}: required is {value!r}; give a list of limits: {', '.join(names)}")
    for name in value:
        _known({str(name): 0}, names, f"{where}: required")


def _parity(table: Any, where: str) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    _known(table, (*PRECISIONS, *COMPONENTS), where)
    plain: dict[str, float] = {}
    by_component: dict[str, dict[str, float]] = {}
    for name, value in table.items():
        if name in COMPONENTS:
            _known(value, PRECISIONS, f"{where[:-1]}.{name}]")
            by_component[name] = {key: _error(limit, key, where) for key, limit in value.items()}
        else:
            plain[name] = _error(value, name, where)
    return plain, by_component


def _error(value: Any, name: str, where: str) -> float:
    if not _number(value) or value <= 0:
        raise BudgetError(f"{where}: {name} is {value!r}; give the largest relative error, a number above 0")
    return float(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
