"""What it costs and gains to quantize one layer alone: final images along the whole trajectory, and time in the engine.

Every layer gets an engine of its own, in which nothing else is INT8. Its images are compared with those of the engine
in which nothing is; its time is what its own kernels, and those that came and went with it (quantizing, reordering),
take less than before. Kernels that are the same in both engines are left out: their noise would drown a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import LdmDeployError
from ldm_deploy.eval.parity import Probe, compare_outputs
from ldm_deploy.quantize.drawing import Drawing, image_quality
from ldm_deploy.quantize.far import Far
from ldm_deploy.quantize.kit import Kit, Spec
from ldm_deploy.quantize.profile import NodeTimes
from ldm_deploy.quantize.scheme import AnyRecipe

RUNS = 12  # profiled calls per engine


@dataclass(frozen=True)
class LayerStudy:
    """One layer of sensitivity.json."""

    name: str
    op: str
    image_psnr_db: dict[str, Any] | None  # mean, worst, ci95, n
    time_won_ms: dict[str, Any] | None  # median, ci95
    relative_error: float | None = None  # of the component's output on the probes
    reason: str | None = None

    def to_dict(self, changed: bool | None = None) -> dict[str, Any]:
        return {
            "name": self.name,
            "op": self.op,
            "image_psnr_db": self.image_psnr_db,
            "time_won_ms": self.time_won_ms,
            "relative_error": self.relative_error,
            "changed": changed,
            "reason": self.reason,
        }


def study_layers(
    component: str,
    kit: Kit,
    recipe: AnyRecipe,
    feeds: Mapping[str, np.ndarray],
    folder: Path,
    *,
    probes: Sequence[Probe],
    drawing: Drawing | None,
    far: Far | None = None,
    journal: Path | None = None,
    seed: int = 0,
) -> tuple[list[LayerStudy], float]:
    """Every layer that `recipe` quantizes, in the order of the graph; and the latency in ms with none of them changed.

    `feeds`: of the timed call. `drawing` None (a component of a model that draws nothing) leaves images out. `far`
    draws before anything is timed, as `drawing` would. `journal`: a file that keeps what is done, line by line, so that
    a killed study goes on; it is for one kit, recipe and drawing.
    Layers without a name of their own cannot be told apart and are left out.
    """
    from ldm_deploy.progress import task

    layers = [layer for layer in kit.layers(recipe) if layer.name]
    names = [layer.name for layer in layers]
    known = _read(journal)
    base = kit.base(recipe)
    before: list[NodeTimes] = []
    reference: np.ndarray | None = None

    def alone(name: str) -> AnyRecipe:
        return replace(recipe, keep_float=tuple(other for other in names if other != name))

    if any(layer.name not in known for layer in layers) or not layers:
        reference = None if drawing is None else drawing.images(component, kit.open_spec(base))
        if far is not None and reference is not None:
            for name, quality in _drawn_far(component, kit, alone, names, known, folder, far, reference, seed):
                _note(journal, known, _IMAGES + name, quality)
        before = kit.node_times(base, feeds, RUNS)
    latency_ms = known.get("", {}).get("latency_ms") or float(np.median([sum(run.values()) for run in before]))
    _note(journal, known, "", {"latency_ms": latency_ms})
    with task(f"one {component} layer at a time", len(layers), done=sum(name in known for name in names)) as advance:
        for layer in layers:
            if layer.name in known:
                continue
            only = alone(layer.name)
            path = folder / f"alone{kit.suffix}"
            entry: dict[str, Any] = {"image_psnr_db": None, "time_won_ms": None, "relative_error": None, "reason": None}
            try:
                kit.build(path, only)
                engine = kit.open(path, only)
                error = compare_outputs(engine, probes, np.inf).relative_error
                entry["relative_error"] = error if np.isfinite(error) else None
                if drawing is not None and reference is not None:
                    entry["image_psnr_db"] = known.get(_IMAGES + layer.name) or image_quality(
                        reference, drawing.images(component, engine), seed=seed
                    )
                else:
                    entry["reason"] = "the component is not part of a model that draws"
                entry["time_won_ms"] = time_won(before, kit.node_times(kit.spec(path, only), feeds, RUNS), seed=seed)
            except LdmDeployError as failure:
                entry["reason"] = str(failure)
            _note(journal, known, layer.name, entry)
            advance()
    return [LayerStudy(layer.name, layer.op, **known[layer.name]) for layer in layers], latency_ms


_IMAGES = "images of "  # before a layer's name: a line of the journal whose layer was not timed yet


def _drawn_far(
    component: str,
    kit: Kit,
    alone: Callable[[str], AnyRecipe],
    names: Sequence[str],
    known: Mapping[str, Any],
    folder: Path,
    far: Far,
    reference: np.ndarray,
    seed: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(layer, quality of its images), drawn on a cluster. What cannot be had there is left for here."""
    from ldm_deploy.progress import task

    todo = [name for name in names if name not in known and _IMAGES + name not in known]
    paths = {name: folder.resolve() / f"far{index}{kit.suffix}" for index, name in enumerate(todo)}

    def engines() -> Iterator[tuple[str, Spec]]:
        for name, path in paths.items():
            try:
                kit.build(path, alone(name))
            except LdmDeployError:
                advance()  # it is said where the layer is timed
                continue
            yield name, kit.spec(path, alone(name))

    with task(f"drawing for {component} on {far.address}", len(todo)) as advance:
        for name, images in far.images(component, engines()):
            for file in kit.files(paths[name]):
                file.unlink()
            if images is not None:
                yield name, image_quality(reference, images, seed=seed)
            advance()


def time_won(before: Sequence[NodeTimes], after: Sequence[NodeTimes], *, seed: int = 0) -> dict[str, Any]:
    """Milliseconds per call that kernels which are in one of two engines only take less in the second: median, ci95."""
    common = set(before[0]) & set(after[0])
    first, second = (
        np.array([sum(ms for key, ms in run.items() if key not in common) for run in runs]) for runs in (before, after)
    )
    draw = np.random.default_rng(seed)
    # The two engines did not take turns: their runs are resampled apart.
    medians = [np.median(draw.choice(times, (1000, len(times))), axis=1) for times in (first, second)]
    low, high = np.percentile(medians[0] - medians[1], [2.5, 97.5])
    return {"median": float(np.median(first) - np.median(second)), "ci95": [float(low), float(high)]}


def describe_study(
    component: str,
    kit: Kit,
    recipe: AnyRecipe,
    layers: Sequence[LayerStudy],
    latency_ms: float,
    quantized: Sequence[str] | None = None,
) -> dict[str, Any]:
    """An entry of `studies` in sensitivity.json. `quantized`: the layers of the assignment that was chosen."""
    return {
        "component": component,
        "runtime": kit.runtime,
        "device": "cpu",
        "precision": "int8",
        "versus": getattr(recipe, "rest", "fp32"),
        "latency_ms": latency_ms,
        "layers": [layer.to_dict(None if quantized is None else layer.name in quantized) for layer in layers],
    }


def _read(journal: Path | None) -> dict[str, dict[str, Any]]:
    """What is done. A last line that was cut off is dropped."""
    found: dict[str, dict[str, Any]] = {}
    if journal is not None and journal.is_file():
        for line in journal.read_text(encoding="utf-8").splitlines():
            try:
                name, entry = json.loads(line)
            except ValueError:
                break
            found[name] = entry
    return found


def _note(journal: Path | None, known: dict[str, dict[str, Any]], name: str, entry: dict[str, Any]) -> None:
    known[name] = entry
    if journal is not None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        # Whole each time: a line cut off by a kill must not be joined to the next.
        text = "".join(json.dumps([key, value]) + "\n" for key, value in known.items())
        from ldm_deploy.artifact import atomic_write_bytes

        atomic_write_bytes(journal, text.encode())
