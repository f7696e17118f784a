"""Which variant is chosen, and why not the others: gates first, then do no harm, then speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_deploy.eval.budget import Budget, Gate, Measured, check_limits

Row = dict[str, Any]


def judge_variant(row: Row, baseline: Row, budget: Budget) -> None:
    """Fill in `gates`, and `refused` where a quantized variant is not faster than its fp32 sibling."""
    if row["latency_ms"] is None and row["refused"] is not None:
        return  # never drawn with; an earlier stage says why
    gates = check_limits(budget.limits_for(row["name"]), figures(row, baseline))
    row["gates"] = [gate.to_dict() for gate in gates]
    if row["refused"] is None:
        row["refused"] = harm(row)


def figures(row: Row, baseline: Row) -> dict[str, Measured]:
    """What each limit of a budget is compared with."""
    found = quality_figures(row["quality"] or {})
    speed = row["speedup"]
    if speed is None:
        whose = row if row["latency_ms"] is None else baseline
        found["speedup_min"] = Measured(None, reason=f"{whose['name']} was not timed; its row says why")
    else:
        low, high = speed["ci95_low"], speed["ci95_high"]
        found["speedup_min"] = _spread(speed["median"], None if low is None else (low, high), speed.get("noise"))
    for limit, name in (("peak_memory_max", "peak_memory_bytes"), ("size_max", "size_bytes")):
        reason = None if row[name] is not None else f"{row['name']} was not loaded; its row says why"
        found[limit] = Measured(row[name], reason=reason, baseline=baseline[name])
    return found


def quality_figures(quality: Mapping[str, Any]) -> dict[str, Measured]:
    """What the limits on images are compared with; `quality` as report.json has it."""
    absent: dict[str, Any] = {"mean": None, "worst": None, "ci95": None, "reason": "no images were compared"}
    found = {}
    for name in ("psnr_db_min", "ssim_min", "ms_ssim_min", "lpips_max", "delta_e2000_max"):
        entry = quality.get(name.rpartition("_")[0]) or absent
        found[name] = _spread(entry["mean"], entry["ci95"], entry["reason"])
    # Of these very images, which are the protocol's: a fact, without an interval.
    worst = quality.get("psnr_db") or absent
    found["worst_psnr_db_min"] = Measured(worst["worst"], reason=worst["reason"])
    found["colour_shift_max"] = largest_shift(quality.get("colour_shift") or absent)
    return found


def largest_shift(entry: Mapping[str, Any]) -> Measured:
    """The largest absolute mean of the three channels; the interval holds the largest of their absolute values.

    `entry`: `mean` and `ci95` of red, green and blue.
    """
    if entry["mean"] is None:
        return Measured(None, reason=entry["reason"])
    value = max(abs(mean) for mean in entry["mean"])
    if entry["ci95"] is None:
        return _spread(value, None, None)
    ends = [sorted((abs(low), abs(high))) if low * high > 0 else [0.0, max(-low, high)] for low, high in entry["ci95"]]
    low, high = (max(channel[side] for channel in ends) for side in (0, 1))
    return Measured(value, (low, high))


def _spread(value: float | None, interval: Sequence[float] | None, reason: str | None) -> Measured:
    if value is not None and interval is None:
        return Measured(value, reason="a single sample has no interval; draw two images or more")
    return Measured(value, (interval[0], interval[1]) if interval else None, reason)


def harm(row: Row) -> str | None:
    """Why a quantized variant is not worth its loss of quality; None if it is faster than its fp32 sibling."""
    for other in row["comparisons"]:
        if other.get("noise"):
            return f"do no harm: it is not shown to be faster than {other['versus']}, {other['noise']}"
        if other["ci95_low"] is None:
            return f"do no harm: one sample does not show that it is faster than {other['versus']}"
        if other["ci95_high"] <= 1:
            return f"do no harm: it is not faster than {other['versus']}, {times(other)}"
        if other["ci95_low"] <= 1:
            return f"do no harm: it is not shown to be faster than {other['versus']}, {times(other)}"
    return None


def times(ratio: Mapping[str, Any]) -> str:
    """`1.34 times its speed (95 % interval 1.29 to 1.38)`."""
    text = f"{ratio['median']:.2f} times its speed"
    if ratio["ci95_low"] is None:
        return text
    return f"{text} (95 % interval {ratio['ci95_low']:.2f} to {ratio['ci95_high']:.2f})"


def obstacle(row: Row) -> str | None:
    """The first reason not to choose a variant, in one clause; None if it may be chosen."""
    if row["refused"] is not None:
        return str(row["refused"])
    if row["status"] != "ok":
        return str(row["reason"])
    for gate in row["gates"]:
        if gate["result"] == "fail":
            return f"{gate['name']} failed: {gate['reason']}"
    for gate in row["gates"]:
        if gate["required"] and gate["result"] != "pass":
            return f"{gate['name']} is required and was not measured: {gate['reason']}"
    return None


def choose(rows: Sequence[Row], baseline: Row) -> tuple[str | None, str]:
    """(name of the fastest variant that keeps its budget, or None; why, in one paragraph)."""
    against = {row["name"]: obstacle(row) for row in rows}
    fit = [row for row in rows if against[row["name"]] is None]
    others = "".join(
        f" Not chosen: {name}, because {reason}." for name, reason in against.items() if reason is not None
    )
    if not fit:
        what = "No variant keeps its budget." if rows else "The bundle has no variants."
        if baseline["status"] != "ok":
            what += f" {baseline['name']} was not measured: {baseline['reason']}."
        return None, what + others
    best = max(fit, key=_speed)
    slower = [row["name"] for row in fit if row is not best]
    text = f"{best['name']} keeps every required limit"
    text += (
        f" and is faster than {', '.join(slower)}, which would too"
        if slower
        else ", and no other variant does"
        if others
        else ""
    )
    compared = [entry for entry in (best["speedup"], *best["comparisons"]) if entry is not None]
    for entry in compared:
        if entry["versus"] == best["name"]:
            continue  # a single component's fp32 engine is the baseline itself
        text += f"; against {entry['versus']} it has {times(entry)}"
    return best["name"], f"{text}.{others}"


def _speed(row: Row) -> float:
    """Larger is faster: the ratio to the baseline, or, without one, the inverse of the latency of the same rounds."""
    return float(row["speedup"]["median"] if row["speedup"] else 1 / row["latency_ms"]["median"])


__all__ = ["Gate", "choose", "figures", "harm", "judge_variant", "obstacle", "times"]
