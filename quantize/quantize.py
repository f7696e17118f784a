"""A bundle of fp32 engines goes in, the same with INT8 engines that proved themselves comes out.

What fails to prove itself is in the bundle's `refused`, with the reason and the ops that cost.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.errors import QuantizationError, StageMissingError
from ldm_deploy.quantize.calibration import CalibrationSet, collect, read_calibration, write_calibration

if TYPE_CHECKING:
    from ldm_deploy.eval.budget import Budget
    from ldm_deploy.quantize.candidates import Candidate
    from ldm_deploy.runtime.bundle import Bundle

TARGET = "onnxruntime-cpu"
BASELINE = f"fp32-{TARGET}"
COMPONENTS = ("unet", "vae_decoder")


def quantize_bundle(
    source: Path,
    out: Path,
    *,
    target: str = TARGET,
    budget: Budget | Path | None = None,
    calibration: Path | None = None,
    components: Sequence[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Bundle:
    """Copy the bundle `source` to `out` and add INT8 engines of U-Net and decoder for `target`.

    `calibration`: a set written earlier; None collects one from the bundle's own fp32 pipeline and leaves it beside
    `out` as `<out>.calibration.npz`. New variant: `int8-onnxruntime-cpu` if both components survive, else
    `mixed-onnxruntime-cpu` with the one that does. Raises `QuantizationError` for a set that does not fit.
    """
    from ldm_deploy.artifact import staged_directory
    from ldm_deploy.eval.budget import Budget, load_budget
    from ldm_deploy.eval.parity import read_probes
    from ldm_deploy.progress import task
    from ldm_deploy.quantize.candidates import quantize_component
    from ldm_deploy.runtime.bundle import read_bundle, write_bundle

    if target != TARGET:
        raise StageMissingError(f"quantization for {target!r} is not built yet; there is: {TARGET}")
    limits = budget if isinstance(budget, Budget) else load_budget(budget)
    bundle = read_bundle(source)
    if bundle.data["model"] is None:
        raise QuantizationError(f"bundle {source} holds single components; calibration needs a whole model that draws")
    records = _fp32_records(bundle.data)
    wanted = list(components or COMPONENTS)
    for name in wanted:
        if name not in COMPONENTS or name not in records:
            raise QuantizationError(
                f"{name} cannot be quantized: bundle {source} has fp32 engines of {', '.join(records) or 'nothing'}, "
                f"and there are recipes for {', '.join(COMPONENTS)}"
            )
    data = _calibration(bundle, source, out, calibration, seed, threads)

    new_engines: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    with staged_directory(out) as staging, task("quantizing", 3 * len(wanted)) as advance:
        for file in bundle.data["files"]:
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, staging / file)
        for name in wanted:
            folder = staging / "candidates"
            kept, losers = quantize_component(
                name,
                source / records[name]["files"][0],
                folder,
                data.samples(name),
                read_probes(source / "probes" / f"{name}.safetensors"),
                limits.parity_limit("int8", name),
                batch=2 if name == "unet" and _guided(bundle.data) else 1,
                seed=seed,
                threads=threads,
                advance=advance,
            )
            if kept is None:
                refused += [_refusal(name, loser) for loser in losers]
            else:
                path = staging / "engines" / f"{name}-int8.onnx"
                kept.path.replace(path)
                new_engines.append(_engine_entry(records[name], kept, losers, path, staging))
            shutil.rmtree(folder)
        content = {**bundle.data, "parents": {**bundle.data["parents"], "calibration": data.digest}}
        content["engines"] = [*bundle.data["engines"], *new_engines]
        content["refused"] = [*bundle.data.get("refused", []), *refused]
        variant = _variant(bundle.data, records, new_engines)
        if variant is not None:
            content["variants"] = [*bundle.data["variants"], variant]
            content["default_variant"] = variant["name"]
        write_bundle(staging, content)
    return read_bundle(out)


def _fp32_records(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        record["component"]: record
        for record in data["engines"]
        if (record["precision"], record["runtime"], record["device"]) == ("fp32", "onnxruntime", "cpu")
    }


def _baseline(data: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((variant for variant in data["variants"] if variant["name"] == BASELINE), None)


def _guided(data: Mapping[str, Any]) -> bool:
    """With guidance the pipeline calls the U-Net on both halves at once."""
    variant = _baseline(data)
    return variant is not None and variant["guidance_scale"] != 1 and "distilled" not in data["model"]


def _calibration(
    bundle: Bundle, source: Path, out: Path, given: Path | None, seed: int, threads: int | None
) -> CalibrationSet:
    digest = bundle.data["parents"]["reference"]
    if given is not None:
        data = read_calibration(given)
        data.check_source(digest)
        return data
    from ldm_deploy.runtime.pipeline import load

    if _baseline(bundle.data) is None:
        raise QuantizationError(
            f"bundle {source} has no variant {BASELINE} to draw calibration data with; export all components, "
            "or give --calibration"
        )
    data = collect(load(source, variant=BASELINE, threads=threads), digest, seed=seed)
    write_calibration(data, out.with_name(f"{out.name}.calibration.npz"))
    return data


def _engine_entry(
    original: Mapping[str, Any], kept: Candidate, losers: Sequence[Candidate], path: Path, root: Path
) -> dict[str, Any]:
    return {
        **original,
        "id": f"{original['component']}-int8-{TARGET}",
        "precision": "int8",
        "files": [path.relative_to(root).as_posix()],
        "size_bytes": path.stat().st_size,
        "precision_found": kept.found,
        "parity": kept.parity.to_dict(),
        "speedup": kept.speedup,
        "recipe": {"name": kept.name, **kept.recipe.to_dict()},
        "recipes_refused": {loser.name: loser.refused for loser in losers},
    }


def _refusal(component: str, candidate: Candidate) -> dict[str, Any]:
    return {
        "name": f"{component}-int8-{TARGET} ({candidate.name})",
        "component": component,
        "runtime": "onnxruntime",
        "device": "cpu",
        "precision": "int8",
        "reason": candidate.refused,
        "parity": candidate.parity.to_dict(),
        "speedup": candidate.speedup,
        "costly_ops": candidate.costly_ops,
    }


def _variant(
    data: Mapping[str, Any], records: Mapping[str, Any], new_engines: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The fp32 variant with its engines replaced where there is an INT8 one; None if there is none."""
    base = _baseline(data)
    if base is None or not new_engines:
        return None
    swapped = {records[engine["component"]]["id"]: engine["id"] for engine in new_engines}
    engines = [swapped.get(identifier, identifier) for identifier in base["engines"]]
    precision = "int8" if len(new_engines) == len(COMPONENTS) else "mixed"
    return {**base, "name": f"{precision}-{TARGET}", "engines": engines}
