"""Which layers become INT8: the assignment that is fastest among those that keep the quality asked for.

Two models guide the search and neither decides. Time won and squared error are taken to add up over layers (errors of
layers are hardly correlated), which orders the layers; every assignment that is tried is then built, drawn with and
timed, and what was measured is all that counts. Builds are few and their number is bounded.

1. Giving back: of the fastest assignment given that breaks the quality, the layers with the largest squared error go to
   float, as few as bring it back. Layers side by side win more than the sum of each alone, which this keeps.
2. Greedy: layers that win time, those that cost least squared error per millisecond first. The longest prefix of this
   order that keeps the quality is found by bisection.
3. Refinement: of the best so far, give the least useful layer back, take the next one in, or swap the two; and leave
   out what won least. A step is kept if it is surely faster and still keeps the quality. Ends when none of them helps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm_deploy.artifact import atomic_write_json, content_key
from ldm_deploy.quantize.sensitivity import LayerStudy

PEAK = 255.0


@dataclass(frozen=True)
class Measured:
    """One assignment that was built. `speedup` against the float engine of the same run, median and 95 % interval."""

    layers: tuple[str, ...]  # in INT8, sorted
    psnr_db: float  # of images, mean
    speedup: float
    ci95: tuple[float, float]
    refused: str | None = None  # why it cannot be chosen, whatever its figures

    def keeps(self, psnr_db_min: float) -> bool:
        return self.refused is None and self.psnr_db >= psnr_db_min


@dataclass
class Found:
    """What a search measured, in order, and which of it is best: None if nothing keeps the quality and is faster."""

    best: Measured | None
    measured: list[Measured] = field(default_factory=list)

    def pareto(self) -> list[Measured]:
        """Those that no other beats in both quality and speed, the fastest first."""
        front: list[Measured] = []
        for one in sorted(self.measured, key=lambda m: (-m.speedup, -m.psnr_db)):
            if one.refused is None and (not front or one.psnr_db > front[-1].psnr_db):
                front.append(one)
        return front

    def closest(self, count: int = 3) -> list[Measured]:
        """Those with the best quality: what to look at where nothing keeps the budget."""
        return sorted((m for m in self.measured if m.refused is None), key=lambda m: -m.psnr_db)[:count]

    def to_list(self) -> list[dict[str, Any]]:
        """`measured` of search.json."""
        front = self.pareto()
        return [
            {**asdict(one), "layers": list(one.layers), "ci95": list(one.ci95)}
            | {"pareto": one in front, "best": one == self.best}
            for one in self.measured
        ]


Measure = Callable[[Sequence[str]], Measured]


def search(
    layers: Sequence[LayerStudy],
    measure: Measure,
    *,
    psnr_db_min: float,
    builds: int,
    start: Sequence[Sequence[str]] = (),
    journal: Path | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Found:
    """Try at most `builds` assignments; `measure` builds one and measures it.

    `start`: assignments to measure first (the fixed recipes). `journal`: what was measured, kept after every build, so
    that a killed search goes on where it stopped and a finished one gives the same again; it is void for other layers
    or another limit. `advance` is called after every build.
    """
    budget = _Budget(measure, builds, journal, _key(layers, psnr_db_min), advance)
    best: Measured | None = None
    try:
        given = [budget(one) for one in start]
        for found in given:
            best = _better(best, found, psnr_db_min)
        broken = [one for one in given if not one.keeps(psnr_db_min)]
        if broken:
            fastest = max(broken, key=lambda one: one.speedup)
            for found in _give_back(fastest.layers, layers, budget, psnr_db_min):
                best = _better(best, found, psnr_db_min)
        order = greedy_order(layers)
        keeps, breaks = 0, len(order) + 1  # lengths of prefixes
        while breaks - keeps > 1:
            # All of it first: it may well keep the quality.
            length = len(order) if breaks > len(order) else (keeps + breaks) // 2
            found = budget(order[:length])
            best = _better(best, found, psnr_db_min)
            if found.keeps(psnr_db_min):
                keeps = length
            else:
                breaks = length
        while best is not None:
            for proposal in _neighbours(best.layers, order):
                better = _better(best, budget(proposal), psnr_db_min)
                if better is not best:
                    best = better
                    break
            else:
                break
    except _Spent:
        pass
    return Found(best, budget.measured)


def greedy_order(layers: Sequence[LayerStudy]) -> list[str]:
    """Layers that win time, least squared error per millisecond first. A layer that was not measured is left out."""
    costs = {
        layer.name: squared_error(layer) / layer.time_won_ms["median"]
        for layer in layers
        if layer.time_won_ms is not None and layer.time_won_ms["median"] > 0
    }
    return sorted(costs, key=lambda name: (costs[name], name))


def squared_error(layer: LayerStudy) -> float:
    """Of the images if this layer alone is INT8; where none were drawn, of the output, relative."""
    if layer.image_psnr_db is not None:
        return float(PEAK**2 / 10 ** (layer.image_psnr_db["mean"] / 10))
    return float(layer.relative_error or 0.0) ** 2


def _give_back(
    chosen: Sequence[str], layers: Sequence[LayerStudy], budget: _Budget, psnr_db_min: float
) -> Iterator[Measured]:
    """Assignments with ever more of the worst layers in float until the quality is kept, then as few as keep it."""
    errors = {layer.name: squared_error(layer) for layer in layers}
    worst = sorted(chosen, key=lambda name: (-errors.get(name, 0.0), name))
    broke, dropped = 0, 1
    while dropped < len(worst):
        found = budget(worst[dropped:])
        yield found
        if found.keeps(psnr_db_min):
            break
        broke, dropped = dropped, 2 * dropped
    else:
        return
    while dropped - broke > 1:
        middle = (broke + dropped) // 2
        found = budget(worst[middle:])
        yield found
        broke, dropped = (broke, middle) if found.keeps(psnr_db_min) else (middle, dropped)


def _neighbours(chosen: Sequence[str], order: Sequence[str]) -> Iterator[list[str]]:
    """Assignments one step away, the most promising first."""
    inside = [name for name in order if name in chosen]
    outside = [name for name in order if name not in chosen]
    if outside:
        yield [*chosen, outside[0]]
    if inside and outside:
        yield [*(name for name in chosen if name != inside[-1]), outside[0]]
    strangers = [name for name in chosen if name not in order]  # from a fixed recipe: they win nothing by themselves
    if strangers and inside:
        yield [name for name in chosen if name in order]
    if len(outside) > 1:
        yield [*chosen, outside[1]]
    if len(inside) > 1:
        yield [name for name in chosen if name != inside[-1]]


def _better(best: Measured | None, found: Measured, psnr_db_min: float) -> Measured | None:
    """`found` if it keeps the quality and is surely faster than `best` (or than float, where there is none yet)."""
    if not found.keeps(psnr_db_min):
        return best
    if best is None:
        return found if found.ci95[0] > 1 else None
    return found if found.ci95[0] > best.speedup else best


class _Spent(Exception):
    """No build is left."""


class _Budget:
    """Measures every assignment once, remembers it in the journal, and stops when the builds are spent."""

    def __init__(
        self, measure: Measure, builds: int, journal: Path | None, key: str, advance: Callable[[], object]
    ) -> None:
        self.measure = measure
        self.builds = builds
        self.journal = journal
        self.key = key
        self.advance = advance
        self.measured: list[Measured] = []
        self.known = {one.layers: one for one in _read(journal, key)}

    def __call__(self, layers: Sequence[str]) -> Measured:
        wanted = tuple(sorted(set(layers)))
        seen = next((one for one in self.measured if one.layers == wanted), None)
        if seen is not None:
            return seen
        if len(self.measured) >= self.builds:
            raise _Spent
        if wanted not in self.known:
            found = self.measure(wanted)
            self.known[wanted] = found
            if self.journal is not None:
                content = {"key": self.key, "measured": [asdict(one) for one in self.known.values()]}
                atomic_write_json(self.journal, content)
        self.measured.append(self.known[wanted])
        self.advance()
        return self.known[wanted]


def _read(journal: Path | None, key: str) -> list[Measured]:
    if journal is None or not journal.is_file():
        return []
    try:
        content: Mapping[str, Any] = json.loads(journal.read_text(encoding="utf-8"))
        if content["key"] != key:
            return []
        return [
            Measured(**{**one, "layers": tuple(one["layers"]), "ci95": tuple(one["ci95"])})
            for one in content["measured"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _key(layers: Sequence[LayerStudy], psnr_db_min: float) -> str:
    return content_key({"layers": [layer.to_dict() for layer in layers], "psnr_db_min": psnr_db_min})
