"""The mixed-precision search over the components of one bundle, and what it leaves in the new one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.artifact import content_key
from ldm_deploy.errors import QuantizationError
from ldm_deploy.eval.machine import machine, usable_threads
from ldm_deploy.eval.studies import read_studies
from ldm_deploy.quantize.calibration import CalibrationSet
from ldm_deploy.quantize.drawing import studio_of
from ldm_deploy.quantize.far import Far
from ldm_deploy.quantize.mixed import mix_component
from ldm_deploy.quantize.search import Measured
from ldm_deploy.quantize.timestep_error import write_study

if TYPE_CHECKING:
    from ldm_deploy.eval.budget import Budget
    from ldm_deploy.eval.parity import Probe
    from ldm_deploy.quantize.candidates import Candidate
    from ldm_deploy.quantize.drawing import Drawing
    from ldm_deploy.quantize.kit import Kit
    from ldm_deploy.runtime.bundle import Bundle

STUDY_PROMPTS, STUDY_STEPS = 2, 20  # drawn for every layer and every assignment


class BundleSearch:
    """`refine` is called for one component after the other, `write` at the end."""

    def __init__(
        self,
        bundle: Bundle,
        target: str,
        limits: Budget,
        data: CalibrationSet,
        out: Path,
        wanted: Sequence[str],
        *,
        builds: int,
        seed: int,
        threads: int | None,
        ray: str | None = None,
    ) -> None:
        self.target, self.builds, self.seed = target, builds, seed
        self.threads = threads or usable_threads()
        key = {
            "files": bundle.data["files"], "calibration": data.digest, "target": target, "seed": seed,
            "budget": limits.digest, "threads": threads, "machine": machine(threads)["fingerprint"],
        }  # fmt: skip
        self.journals = out.with_name(f"{out.name}.search") / content_key(key).removeprefix("sha256:")[:16]
        self.drawing: Drawing | None = None
        self.far: Far | None = None
        if bundle.data["model"] is not None:
            studio = studio_of(bundle, target, data, self.threads, prompts=STUDY_PROMPTS, steps=STUDY_STEPS)
            self.drawing = studio.open()
            self.far = None if ray is None else Far(ray, studio)
            limit = limits.limits_for(f"int8-{target}").limits.get("psnr_db_min")
            # Squared errors of components add up: each gets its part.
            self.psnr_db_min = (0.0 if limit is None else float(str(limit))) + 10 * math.log10(len(wanted))
        else:
            self.psnr_db_min = -20 * math.log10(max(limits.parity_limit("int8", name) for name in wanted))
        self.studies: list[dict[str, Any]] = []
        self.searches: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []

    def refine(
        self,
        component: str,
        kit: Kit,
        folder: Path,
        probes: Sequence[Probe],
        limit: float,
        feeds: Mapping[str, np.ndarray],
        start: Sequence[Candidate],
    ) -> Candidate | None:
        """The engine of the best assignment, or None with the reason and the closest ones in `refused`."""
        runtime, _, device = self.target.partition("-")
        about = {"component": component, "runtime": runtime, "device": device, "precision": "int8"}
        candidate, reason = None, None
        try:
            mixed = mix_component(
                component, kit, folder, probes, limit, feeds, self.drawing, psnr_db_min=self.psnr_db_min,
                builds=self.builds, start=start, far=self.far, journals=self.journals, seed=self.seed,
            )  # fmt: skip
            self.studies.append(mixed.study)
            self.searches.append({**about, "psnr_db_min": self.psnr_db_min, "measured": mixed.found.to_list()})
            candidate = mixed.candidate
            if candidate is not None:
                self._refuse(component, kit, start, mixed.found.measured)
            else:
                closest = "; ".join(
                    f"{one.psnr_db:.1f} dB at {one.speedup:.2f}x with {len(one.layers)} layers"
                    for one in mixed.found.closest()
                )
                reason = (
                    f"{component}: none of {len(mixed.found.measured)} assignments keeps {self.psnr_db_min:.1f} dB and "
                    f"is faster than float; closest: {closest or 'none was correct'}"
                )
        except QuantizationError as error:  # the fixed recipes are there all the same
            reason = str(error)
        if reason is not None:
            name = f"{component}-int8-{self.target} (searched)"
            self.refused.append({"name": name, **about, "reason": reason, "parity": None, "speedup": None})
        return candidate

    def _refuse(self, component: str, kit: Kit, start: Sequence[Candidate], measured: Sequence[Measured]) -> None:
        """Fixed recipes that were drawn with and do not keep the quality, now that an assignment is there that does."""
        known = {one.layers: one for one in measured}
        for one in start:
            drawn = known.get(tuple(sorted(layer.name for layer in kit.layers(one.recipe))))
            if drawn is not None and one.refused is None and drawn.psnr_db < self.psnr_db_min:
                one.refused = (
                    f"{component}: INT8 ({one.name}) draws images of {drawn.psnr_db:.1f} dB, "
                    f"{self.psnr_db_min:.1f} are asked for; the searched assignment keeps that"
                )

    def write(self, root: Path, engines: Sequence[Mapping[str, Any]]) -> None:
        """sensitivity.json and search.json in the bundle `root`, with what other targets left there."""
        kept = {engine["component"]: engine for engine in engines}
        for study in self.studies:
            engine = kept.get(study["component"])
            for layer in study["layers"]:
                # Of the engine that was chosen in the end, which may be that of a fixed recipe.
                layer["changed"] = None if engine is None else layer["name"] in engine["layers"]
        if self.drawing is not None and self.studies:
            earlier = read_studies(root).get("sensitivity", {"studies": []})
            content = {
                "format": 1,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "protocol": {**self.drawing.protocol(), "threads": self.threads},
                "studies": [*earlier["studies"], *self.studies],
            }
            write_study("sensitivity", content, root)
        if self.searches:
            earlier = read_studies(root).get("search", {"searches": []})
            created = datetime.now(UTC).isoformat(timespec="seconds")
            content = {"format": 1, "created": created, "searches": [*earlier["searches"], *self.searches]}
            write_study("search", content, root)
