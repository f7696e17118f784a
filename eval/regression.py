"""Is a variant worse than in a stored result? Every figure against the same figure of an earlier report.json.

Quality is paired per image: the same prompts and seeds against the same baseline, then and now. Speed is a ratio of
ratios: each run's own speed-up over its own baseline, so that neither another machine nor another tenant matters.
Intervals are of 99 %: a gate that runs with every commit must not cry wolf.

On one machine with one set of versions an engine is reproducible to the bit, and a change of its images is a change of
the engine. Elsewhere it is not: low precision rounds, one flipped rounding changes the next step, and after fifty of
them INT8 images differ by as much as they differ from fp32 (docs/ci.md has the figures). So `image_change_max` is
judged on the same machine and versions only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.artifact import file_digest
from ldm_deploy.errors import EvaluationError
from ldm_deploy.eval.budget import AGAINST, Budget, Gate, Measured, check_limits
from ldm_deploy.eval.choose import largest_shift
from ldm_deploy.eval.metrics import bootstrap_ci
from ldm_deploy.eval.quality import nothing_measured
from ldm_deploy.eval.rows import empty_row
from ldm_deploy.eval.sketch import sketched_mse

FORMAT = 1
LEVEL = 99
Z95, Z99 = 1.959964, 2.575829  # of the normal distribution, two-sided
# Above it two images differ by less than 0.08 grey levels, and float noise alone decides: ONNX Runtime's and OpenVINO's
# fp32 images have 91 to 100 dB against torch's, and 11 dB between them would be no loss.
SATURATED_DB = 70.0
# What must agree for figures of two runs to be of the same thing.
PROTOCOL = ("prompts_sha256", "seeds", "sampler", "steps", "guidance_scale", "size", "batch")
IDLE = ("python", "lpips")  # versions that neither draw nor take time
STORE = "store a new result: ldm-deploy eval BUNDLE --out DIR"

Row = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """An earlier report.json. `drawn`: by name, the variants that images were drawn with."""

    path: Path
    digest: str
    report: Mapping[str, Any]
    drawn: Mapping[str, Row]


def read_stored(path: Path) -> Stored:
    """Read an earlier report.json. Raises `EvaluationError` for what is damaged or of another format."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise EvaluationError(f"stored result {path} cannot be read: {error.strerror}; give a report.json") from None
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"stored result {path} is damaged ({error}); restore it, or {STORE}") from None
    if not isinstance(report, dict) or "variants" not in report:
        raise EvaluationError(f"stored result {path} is no result of `ldm-deploy eval`; give a report.json")
    number = report.get("format")
    if number != FORMAT or isinstance(number, bool):
        raise EvaluationError(
            f"stored result {path} has format {number!r}; this version reads format {FORMAT}: {STORE}"
        )
    try:
        rows = [row for row in report["variants"] if row["status"] == "ok" and row["latency_ms"] is not None]
        # Compared with itself now, what is damaged shows before minutes of measuring.
        conditions = compare_conditions(report, report)
        for row in rows:
            compare_rows(row, row, conditions)
        return Stored(path, file_digest(path), report, {row["name"]: row for row in rows})
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise EvaluationError(f"stored result {path} is damaged ({error!r}); restore it, or {STORE}") from None


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def check_comparable(stored: Stored, source: Mapping[str, Any], protocol: Mapping[str, Any]) -> None:
    """Raises `EvaluationError` unless the stored result is of the same model and was drawn under the same protocol.

    `source` and `protocol` are those of this run, as report.json has them.
    """
    key = "digest" if source["digest"] is not None else "name"
    theirs, ours = stored.report.get("source", {}).get(key), source[key]
    if theirs != ours:
        raise EvaluationError(f"stored result {stored.path} is of another model ({theirs}, not {ours}); {STORE}")
    for key in PROTOCOL:
        theirs, ours = stored.report["protocol"].get(key), protocol[key]
        if theirs != ours:
            raise EvaluationError(
                f"stored result {stored.path} was drawn with {key} {theirs}, and this run with {ours}; {STORE}"
            )


def add_regression(report: dict[str, Any], stored: Stored, budget: Budget, seed: int = 0) -> None:
    """Append the gates against `stored` to the `gates` of every variant that was drawn with then.

    A variant that is not in this bundle any more becomes a row that fails. `against` says what was compared how.
    """
    there = {row["name"]: row for row in report["variants"]}
    report["variants"] += [_gone(row) for name, row in stored.drawn.items() if name not in there]
    conditions = compare_conditions(stored.report, report)
    for row in report["variants"]:
        if row["name"] in stored.drawn:
            found = compare_rows(stored.drawn[row["name"]], row, conditions, seed)
            gates = [_still_runs(row), *check_limits(budget.tolerances_for(row["name"]), found)]
            row["gates"] = [*row["gates"], *(gate.to_dict() for gate in gates)]
    new = [name for name, row in there.items() if name not in stored.drawn and row["latency_ms"] is not None]
    report["against"] = {
        "path": str(stored.path),
        "digest": stored.digest,
        "created": stored.report["created"],
        **conditions,
        "note": conditions["note"] + (f"; not in it, so not judged: {', '.join(new)}" if new else ""),
        "new": new,
    }


def compare_conditions(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What two reports have in common besides model and protocol: `same_machine`, `other_versions`, and a sentence.

    A machine with another number of threads is another machine.
    """
    same_machine = (then["machine"]["fingerprint"], then["protocol"]["threads"]) == (
        now["machine"]["fingerprint"],
        now["protocol"]["threads"],
    )
    old, new = then["machine"]["versions"], now["machine"]["versions"]
    names = [name for name in {**old, **new} if name not in IDLE]
    other = {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}
    where = f"the result of {then['created']}"
    if not same_machine:
        machine = f"{then['machine']['cpu']}, {then['protocol']['threads']} threads"
        where += f", another machine ({machine}): ratios are compared, not milliseconds"
    elif other:
        changed = ", ".join(f"{name} {was or 'absent'}, now {is_ or 'absent'}" for name, (was, is_) in other.items())
        where += f", the same machine with other versions ({changed}): ratios are compared, not milliseconds"
    else:
        where += ", the same machine and versions"
    return {"same_machine": same_machine, "other_versions": other, "note": f"compared with {where}"}


def compare_rows(then: Row, now: Row, conditions: Mapping[str, Any], seed: int = 0) -> dict[str, Measured]:
    """What each tolerance bounds, of one variant: by name, with its 99 % interval or the reason why there is none.

    `speedup_drop_max`: the part of its speed-up that is gone. `psnr_db_drop_max`, `ssim_drop_max`, `lpips_rise_max`:
    loss per image, mean over images. `colour_change_max`: grey levels that the mean of a channel moved by, in the worst
    channel. `image_change_max`: root mean square difference between the images then and now, in grey levels.
    `peak_memory_rise_max`, `size_rise_max`: the part by which bytes grew.
    """
    alike = conditions["same_machine"] and not conditions["other_versions"]
    measures: dict[str, Callable[[], Measured]] = {
        "speedup_drop_max": lambda: _speedup_drop(then, now, alike),
        "psnr_db_drop_max": lambda: _loss(then, now, "psnr_db", seed),
        "ssim_drop_max": lambda: _loss(then, now, "ssim", seed),
        "lpips_rise_max": lambda: _loss(then, now, "lpips", seed),
        "colour_change_max": lambda: _colour_change(then, now, seed),
        "image_change_max": lambda: _image_change(then, now, alike, seed),
        "peak_memory_rise_max": lambda: _rise(then, now, "peak_memory_bytes"),
        "size_rise_max": lambda: _rise(then, now, "size_bytes"),
    }
    found = {}
    for name, measure in measures.items():
        try:
            found[name] = replace(measure(), level=LEVEL)
        except _Absent as absent:
            found[name] = Measured(None, reason=str(absent), level=LEVEL)
    return found


class _Absent(Exception):
    """A figure that one of the two runs does not have; says which and why."""


def _speedup_drop(then: Row, now: Row, alike: bool) -> Measured:
    """1 - ratio of the two speed-ups. Their logarithms are taken as normal, with the spread of each run's interval."""
    spread = 0.0
    for whose, row in (("the stored result", then), ("this run", now)):
        speed = row["speedup"]
        if speed is None or speed["ci95_low"] is None:
            raise _Absent(f"{whose} has no speed-up with an interval; its row says why")
        spread = math.hypot(spread, math.log(speed["ci95_high"] / speed["ci95_low"]) / (2 * Z95))
    if then["speedup"]["versus"] != now["speedup"]["versus"]:
        raise _Absent(f"the stored speed-up is over {then['speedup']['versus']}, this one {now['speedup']['versus']}")
    ratio = now["speedup"]["median"] / then["speedup"]["median"]
    low, high = (1 - ratio * math.exp(sign * Z99 * spread) for sign in (1, -1))
    detail = f"{then['speedup']['median']:.3g}x then, {now['speedup']['median']:.3g}x now"
    if alike:
        detail += f"; {then['latency_ms']['median']:.4g} ms then, {now['latency_ms']['median']:.4g} ms now"
    return Measured(1 - ratio, (low, high), detail=detail)


def _loss(then: Row, now: Row, metric: str, seed: int) -> Measured:
    """Mean over images of what was lost, with its bootstrap interval over images."""
    if metric == "lpips":
        keys = ("backbone", "weights_sha256")
        networks = [tuple(row["quality"]["lpips"].get(key) for key in keys) for row in (then, now) if row["quality"]]
        if len(set(networks)) > 1:
            raise _Absent(f"LPIPS was stored with {networks[0]}, and is now taken with {networks[1]}")
    old, new = _paired(then, now, metric)
    detail = f"{old.mean():.4g} then, {new.mean():.4g} now"
    if metric == "psnr_db":
        old, new = np.minimum(old, SATURATED_DB), np.minimum(new, SATURATED_DB)
    lost = new - old if metric == "lpips" else old - new
    return Measured(float(lost.mean()), _interval(lost, seed), detail=detail)


def _colour_change(then: Row, now: Row, seed: int) -> Measured:
    old, new = _paired(then, now, "colour_shift")
    moved = new - old
    mean = [float(value) for value in moved.mean(axis=0)]
    detail = "red, green, blue: " + ", ".join(f"{value:+.3f}" for value in mean)
    intervals = [_interval(channel, seed) for channel in moved.T]
    return replace(largest_shift({"mean": mean, "ci95": intervals}), detail=detail)


def _image_change(then: Row, now: Row, alike: bool, seed: int) -> Measured:
    old, new = _paired(then, now, "sketch")
    mse = sketched_mse(old, new)
    change = math.sqrt(mse.mean())
    if not alike:
        raise _Absent(
            f"the images differ by {change:.2g} grey levels, which on another machine or with other versions rounding "
            "alone may do"
        )
    low, high = _interval(mse, seed)
    detail = f"{int((mse > 0).sum())} of {len(mse)} images changed; if that is meant, {STORE}"
    return Measured(change, (math.sqrt(low), math.sqrt(high)), detail=detail)


def _rise(then: Row, now: Row, key: str) -> Measured:
    for whose, row in (("the stored result", then), ("this run", now)):
        if not row[key]:
            raise _Absent(f"{whose} has no {key}; its row says why")
    detail = f"{then[key] / 2**20:.4g} MiB then, {now[key] / 2**20:.4g} MiB now"
    return Measured(now[key] / then[key] - 1, detail=detail)


def _paired(then: Row, now: Row, key: str) -> tuple[Any, Any]:
    """`key` of every image, then and now: numbers as arrays (n, …), sketches as lists."""
    columns = []
    for whose, row in (("the stored result", then), ("this run", now)):
        column = [image.get(key) for image in row.get("images") or ()]
        if not column or None in column:
            reason = ((row["quality"] or {}).get(key) or {}).get("reason") or "its images have none"
            raise _Absent(f"{whose} has no {key} of every image: {reason}")
        columns.append(column)
    labels = [[(image["prompt"], image["seed"]) for image in row["images"]] for row in (then, now)]
    if labels[0] != labels[1]:
        raise _Absent("the stored result is of other images")
    first, second = columns
    return (first, second) if key == "sketch" else (np.array(first, np.float64), np.array(second, np.float64))


def _interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    interval = bootstrap_ci(values, np.mean, LEVEL / 100, seed)
    if interval is None:
        raise _Absent("a single image has no interval; draw two or more")
    return interval


def _still_runs(row: Row) -> Gate:
    runs = row["status"] == "ok"
    reason = None if runs else f"it drew when the result was stored: {row['reason']}"
    return Gate(AGAINST[0], None, "as stored", None, None, True, "pass" if runs else "fail", reason, level=LEVEL)


def _gone(then: Row) -> Row:
    reason = f"it is not in this bundle; if that is meant, {STORE}"
    row = empty_row(then["name"], then["runtime"], then["device"], then["precision"])
    return row | {"status": "not measured", "reason": reason, "quality": nothing_measured(reason, None)}
