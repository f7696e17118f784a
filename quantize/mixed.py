"""Mixed precision for one component: every layer studied alone, then a search for the fastest assignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import QuantizationError
from ldm_deploy.eval.latency import compare_engines
from ldm_deploy.eval.parity import Probe, compare_outputs, explain
from ldm_deploy.eval.speedup import speedup
from ldm_deploy.progress import task
from ldm_deploy.quantize.candidates import Candidate, engine_name, judge_parity
from ldm_deploy.quantize.drawing import Drawing, image_quality
from ldm_deploy.quantize.far import Far
from ldm_deploy.quantize.kit import Kit
from ldm_deploy.quantize.scheme import AnyRecipe
from ldm_deploy.quantize.search import Found, Measured, search
from ldm_deploy.quantize.sensitivity import describe_study, study_layers

ROUNDS = 20  # of a measurement during the search; what is chosen is measured again
TIME_LIMIT_S = 6.0
NAME = "searched"  # of the recipe


@dataclass
class Mixed:
    """What `mix_component` found. `study`: an entry of sensitivity.json."""

    candidate: Candidate | None
    found: Found
    study: dict[str, Any]


def mix_component(
    component: str,
    kit: Kit,
    folder: Path,
    probes: Sequence[Probe],
    limit: float,
    feeds: Mapping[str, np.ndarray],
    drawing: Drawing | None,
    *,
    psnr_db_min: float,
    builds: int,
    start: Sequence[Candidate] = (),
    far: Far | None = None,
    journals: Path | None = None,
    seed: int = 0,
) -> Mixed:
    """Search the layers of the kit's widest recipe; `kit` is calibrated.

    `limit`: of the relative error on `probes`, as for any engine. `feeds`: of the timed call. `drawing` None (a
    component of a model that draws nothing): dB of the outputs' relative error on the probes stand for the PSNR.
    `start`: candidates of fixed recipes. `far`: draws for single layers. `journals`: a folder for what a killed search
    goes on from.
    """
    widest = _widest(kit, start)
    layers, latency_ms = study_layers(
        component, kit, widest, feeds, folder, probes=probes, drawing=drawing, far=far, seed=seed,
        journal=None if journals is None else journals / f"{component}.layers.jsonl",
    )  # fmt: skip
    if not layers:
        raise QuantizationError(f"{component} has no layer with a name of its own; mixed precision cannot be searched")
    names = [layer.name for layer in layers]
    bench = _Bench(component, kit, folder, widest, names, probes, limit, feeds, drawing, seed)
    starts = [[layer.name for layer in kit.layers(one.recipe) if layer.name in names] for one in start]
    with task(f"searching {component}", builds) as advance:  # fewer if nothing more helps
        found = search(
            layers, bench.measure, psnr_db_min=psnr_db_min, builds=builds, start=starts, advance=advance,
            journal=None if journals is None else journals / f"{component}.search.json",
        )  # fmt: skip
    candidate = None
    if found.best is not None:
        recipe = bench.recipe(found.best.layers)
        path = folder / NAME / engine_name(component, kit)
        candidate = Candidate(NAME, path, recipe, *judge_parity(kit, path, recipe, probes, limit))
        candidate.size_bytes = sum(file.stat().st_size for file in kit.files(path))
    study = describe_study(
        component, kit, widest, layers, latency_ms, None if found.best is None else found.best.layers
    )
    return Mixed(candidate, found, study)


def _widest(kit: Kit, start: Sequence[Candidate]) -> AnyRecipe:
    """The recipe with most layers; of those that only differ in how values are scaled, the fastest that was correct."""
    every = kit.settle(next(iter(kit.recipes.values())))
    names = [layer.name for layer in kit.layers(every)]
    timed = [(one.speedup["median"], replace(one.recipe, keep_float=())) for one in start if one.speedup is not None]
    alike = [(speed, recipe) for speed, recipe in timed if [layer.name for layer in kit.layers(recipe)] == names]
    return max(alike, key=lambda pair: pair[0])[1] if alike else every


class _Bench:
    """Builds an assignment, draws with it, and times it against the float engines."""

    def __init__(
        self,
        component: str,
        kit: Kit,
        folder: Path,
        widest: AnyRecipe,
        names: Sequence[str],
        probes: Sequence[Probe],
        limit: float,
        feeds: Mapping[str, np.ndarray],
        drawing: Drawing | None,
        seed: int,
    ) -> None:
        self.component, self.kit, self.folder, self.widest, self.names = component, kit, folder, widest, names
        self.probes, self.limit, self.feeds, self.drawing, self.seed = probes, limit, feeds, drawing, seed
        self._reference: np.ndarray | None = None

    def recipe(self, layers: Sequence[str]) -> AnyRecipe:
        return replace(self.widest, keep_float=tuple(name for name in self.names if name not in layers))

    def measure(self, layers: Sequence[str]) -> Measured:
        recipe = self.recipe(layers)
        path = self.folder / f"trial{self.kit.suffix}"
        self.kit.build(path, recipe)
        engine = self.kit.open(path, recipe)
        parity = compare_outputs(engine, self.probes, self.limit)
        name = f"{self.component} with {len(layers)} INT8 layers"
        refused = None if parity.passed else explain(parity, self.component, name)
        psnr = self._psnr(engine)
        ratio = self._ratio(self.kit.spec(path, recipe))
        return Measured(tuple(layers), psnr, ratio["median"], (ratio["ci95_low"], ratio["ci95_high"]), refused)

    def _psnr(self, engine: Any) -> float:
        if self.drawing is None:
            errors = compare_outputs(engine, self.probes, np.inf).errors
            # ‖error‖ / ‖reference‖ as dB below the reference: there are no images to compare.
            return float(-10 * np.log10(max(float(np.mean(np.square(errors))), 1e-10)))
        if self._reference is None:
            fp32 = next(iter(self.kit.siblings().values()))
            self._reference = self.drawing.images(self.component, self.kit.open_spec(fp32))
        images = self.drawing.images(self.component, engine)
        return float(image_quality(self._reference, images, seed=self.seed)["mean"])

    def _ratio(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Against the fastest of the float engines, in one interleaved run."""
        siblings = self.kit.siblings()
        measured = compare_engines(
            {**siblings, "trial": spec}, self.feeds, rounds=ROUNDS, threads=self.kit.threads, seed=self.seed,
            time_limit_s=TIME_LIMIT_S,
        )  # fmt: skip
        if "trial" in measured["failed"]:
            raise QuantizationError(f"{self.component}: a trial engine fails: {measured['failed']['trial']}")
        samples = {name: measured["samples_ms"][name] for name in siblings if name in measured["samples_ms"]}
        fastest = min(samples, key=lambda name: float(np.median(samples[name])))
        return speedup(samples[fastest], measured["samples_ms"]["trial"], fastest, seed=self.seed)
