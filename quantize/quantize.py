"""A bundle of fp32 engines goes in, the same with INT8 engines that proved themselves comes out.

What fails to prove itself is in the bundle's `refused`, with the reason and the ops that cost.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.errors import QuantizationError, StageMissingError
from ldm_deploy.quantize.calibration import (
    CalibrationSet,
    collect,
    is_calibration_set,
    read_arrays,
    read_calibration,
    write_calibration,
)

if TYPE_CHECKING:
    from ldm_deploy.eval.budget import Budget
    from ldm_deploy.eval.parity import Probe
    from ldm_deploy.quantize.candidates import Candidate
    from ldm_deploy.quantize.images import ImageGate
    from ldm_deploy.quantize.kit import Kit
    from ldm_deploy.runtime.bundle import Bundle

TARGETS = ("onnxruntime-cpu", "openvino-cpu")
DRAWING = ("unet", "vae_decoder")  # what images depend on: with both of them in INT8 the variant is called int8
# Of students of few steps. A U-Net passes on more of any disturbance at sizes that it was not trained for: of noise of
# 1 % the shipped student's prediction has 0.2 % at its own size and 0.3 to 0.7 % at others. Where fifty guided steps
# follow, each amplifies what the one before erred: with as much allowed the shipped teacher drew at 30 dB, not 33.
OTHER_SIZES = 2.0
COMPONENTS = (*DRAWING, "vae_encoder")  # of a whole model; a text encoder is small


def quantize_bundle(
    source: Path,
    out: Path,
    *,
    target: str = TARGETS[0],
    budget: Budget | Path | None = None,
    calibration: Path | None = None,
    components: Sequence[str] | None = None,
    builds: int = 0,
    ray: str | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Bundle:
    """Copy the bundle `source` to `out` and add INT8 engines of U-Net, decoder and encoder for `target`.

    `calibration`: a set written earlier; None collects one from the bundle's own fp32 pipeline and leaves it beside
    `out` as `<out>.calibration.npz`. For one component it may be a plain .npz file, its arrays named after the inputs,
    the samples on the first axis; a bundle of single components takes nothing else. `builds` above 0: beyond the fixed
    recipes every layer is studied alone (sensitivity.json; the Ray cluster at `ray` draws for that) and that many
    assignments at most are searched per component; what is done lies in `<out>.search/`, and a killed search goes on
    from there. New variant: `int8-<target>` if U-Net and decoder survive, else `mixed-<target>` with what does;
    timestep_error.json comes with it. Raises `QuantizationError` for a set that does not fit.
    """
    from ldm_deploy.artifact import staged_directory
    from ldm_deploy.eval.budget import Budget, load_budget
    from ldm_deploy.eval.parity import read_probes
    from ldm_deploy.progress import note, task
    from ldm_deploy.quantize import cpu
    from ldm_deploy.quantize.candidates import batched, quantize_component
    from ldm_deploy.quantize.refine import BundleSearch
    from ldm_deploy.quantize.sizes import size_limit
    from ldm_deploy.runtime.bundle import read_bundle, write_bundle

    if target not in TARGETS:
        raise StageMissingError(f"quantization for {target!r} is not built yet; there is: {', '.join(TARGETS)}")
    limits = budget if isinstance(budget, Budget) else load_budget(budget)
    bundle = read_bundle(source)
    records = _records(bundle.data, target, "fp32")
    wanted = _wanted(bundle, source, target, records, components)
    data = _calibration(bundle, source, out, wanted, records, calibration, seed, threads)
    if components is None and bundle.data["model"] is not None:  # sets of earlier versions have no images
        wanted = [name for name in wanted if name in data.arrays or name in DRAWING]
    for name in wanted:
        data.samples(name)  # refuses a set that has nothing for it before anything is built

    if cpu.has_vnni() is False:
        note("this CPU has no VNNI: products of 8 bits would saturate, weights get 7 bits")
    sizes = {name: record["size_bytes"] for name, record in records.items()}
    baseline_bytes, of_variant = sum(sizes.values()), limits.limits_for(f"int8-{target}")
    # The largest last: what the others saved is its own.
    order = sorted(wanted, key=sizes.__getitem__)
    search = None
    searched = wanted if bundle.data["model"] is None else [name for name in wanted if name in DRAWING]
    if builds and searched:
        search = BundleSearch(bundle, target, limits, data, out, searched, builds=builds, seed=seed, threads=threads,
                              ray=ray)  # fmt: skip
    gate = _image_gate(bundle, target, of_variant.limits.get("psnr_db_min"), data, wanted, seed, threads)
    new_engines: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    with staged_directory(out) as staging, task(f"quantizing for {target}", 3 * len(wanted)) as advance:
        for file in bundle.data["files"]:
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, staging / file)
        for place, name in enumerate(order):
            folder = staging / "candidates"
            kit = make_kit(bundle, name, target, threads=threads)
            probes = read_probes(source / "probes" / f"{name}.safetensors")
            probes, limit = with_allowances(probes, bundle.data["model"]), limits.parity_limit("int8", name)
            batch = 2 if name == "unet" and _guided(bundle.data) else 1
            refine = None
            if search is not None and name in searched:
                feeds = batched(data.samples(name), batch)
                refine = functools.partial(search.refine, name, kit, folder, probes, limit, feeds)
            kept, losers = quantize_component(
                name, kit, folder, data.samples(name), probes, limit, batch=batch, seed=seed, refine=refine,
                gate=gate if name in DRAWING else None,
                size_limit=size_limit(of_variant, sizes, baseline_bytes, order[place:]), advance=advance,
            )  # fmt: skip
            if kept is None:
                refused += [_refusal(name, target, loser) for loser in losers]
            else:
                files = [file.replace(staging / "engines" / file.name) for file in kit.files(kept.path)]
                layers = [layer.name for layer in kit.layers(kept.recipe)]
                new_engines.append(_engine_entry(records[name], target, kept, losers, files, layers, staging))
                sizes[name] = kept.size_bytes
            shutil.rmtree(folder)
        drawn = any(engine["component"] in DRAWING for engine in new_engines)
        if components is None and bundle.data["model"] is not None and not drawn:
            for file in [file for engine in new_engines for file in engine["files"]]:
                (staging / file).unlink()  # an encoder alone makes no image faster
            new_engines = []
        new_engines.sort(key=lambda engine: wanted.index(engine["component"]))
        content = {**bundle.data, "parents": {**bundle.data["parents"], "calibration": data.digest}}
        content["engines"] = [*bundle.data["engines"], *new_engines]
        content["refused"] = [*bundle.data.get("refused", []), *refused]
        variant = _variant(bundle.data, target, new_engines)
        if variant is not None:
            content["variants"] = [*bundle.data["variants"], variant]
            content["default_variant"] = variant["name"]
        if search is not None:
            content["refused"] += search.refused
            search.write(staging, new_engines)
        made = write_bundle(staging, content)
        if variant is not None:
            _write_timestep_error(made, target, seed, threads)
            write_bundle(staging, content)
    return read_bundle(out)


def _image_gate(
    bundle: Bundle,
    target: str,
    psnr_db_min: Any,
    data: CalibrationSet,
    wanted: Sequence[str],
    seed: int,
    threads: int | None,
) -> ImageGate | None:
    """None where no images are drawn, nothing is asked of them, or they take hours: the report alone judges then."""
    from ldm_deploy.quantize.drawing import studio_of
    from ldm_deploy.quantize.images import PROMPTS, ImageGate
    from ldm_deploy.quantize.kit import LARGE_BYTES

    drawn = [name for name in wanted if name in DRAWING]
    large = any(record["size_bytes"] > LARGE_BYTES for record in _records(bundle.data, target, "fp32").values())
    if bundle.data["model"] is None or psnr_db_min is None or not drawn or large:
        return None
    drawing = studio_of(bundle, target, data, threads, prompts=PROMPTS).open()
    return ImageGate(drawing, float(psnr_db_min), len(drawn), seed=seed)


def _write_timestep_error(bundle: Bundle, target: str, seed: int, threads: int | None) -> None:
    """timestep_error.json for every quantized variant of the bundle, against the fp32 one of the same target."""
    from ldm_deploy.quantize.timestep_error import measure_timestep_error, write_study

    quantized = [name for name in bundle.variants if name.startswith(("int8-", "mixed-"))]
    content = measure_timestep_error(bundle, quantized, versus=f"fp32-{target}", seed=seed, threads=threads)
    if content["series"]:
        write_study("timestep_error", content, bundle.root)


def with_allowances(probes: Sequence[Probe], model: Mapping[str, Any] | None) -> list[Probe]:
    """Of a student of few steps, probes of another size than it draws may err `OTHER_SIZES` times the limit."""
    if model is None or "distilled" not in model:
        return list(probes)
    height, width = model["default_size"]
    factor = model["downsampling"]
    own = {(height, width), (height // factor, width // factor)}
    return [
        probe
        if all(value.shape[2:] in own for value in probe.inputs.values() if value.ndim == 4)
        else replace(probe, allowance=OTHER_SIZES)
        for probe in probes
    ]


def make_kit(bundle: Bundle, component: str, target: str, *, threads: int | None = None) -> Kit:
    """What quantizes the fp32 engine that the bundle has of a component for a target."""
    path = bundle.root / _records(bundle.data, target, "fp32")[component]["files"][0]
    if target == "openvino-cpu":
        from ldm_deploy.quantize.openvino_cpu import OpenVinoKit

        half = _records(bundle.data, target, "bf16").get(component)
        return OpenVinoKit(path, bf16=None if half is None else bundle.root / half["files"][0], threads=threads)
    from ldm_deploy.quantize.onnxruntime_cpu import OnnxRuntimeKit

    return OnnxRuntimeKit(path, threads=threads)


def _wanted(
    bundle: Bundle, source: Path, target: str, records: Mapping[str, Any], components: Sequence[str] | None
) -> list[str]:
    """The components to quantize. Raises `QuantizationError` for one that cannot be."""
    single = bundle.data["model"] is None
    wanted = list(components or (records if single else [name for name in COMPONENTS if name in records]))
    for name in wanted or [""]:
        if name not in records or not (single or name in COMPONENTS):
            raise QuantizationError(
                f"{name or 'nothing'} cannot be quantized: bundle {source} has fp32 engines for {target} of "
                f"{', '.join(records) or 'nothing'}"
                + ("" if single else f", and there are recipes for {', '.join(COMPONENTS)}")
                + ("" if records else f"; export it with --target {target}")
            )
    return wanted


def _records(data: Mapping[str, Any], target: str, precision: str) -> dict[str, dict[str, Any]]:
    return {
        record["component"]: record
        for record in data["engines"]
        if record["precision"] == precision and f"{record['runtime']}-{record['device']}" == target
    }


def _baseline(data: Mapping[str, Any], target: str, precision: str = "fp32") -> dict[str, Any] | None:
    name = f"{precision}-{target}"
    return next((variant for variant in data["variants"] if variant["name"] == name), None)


def _guided(data: Mapping[str, Any]) -> bool:
    """With guidance the pipeline calls the U-Net on both halves at once."""
    if data["model"] is None or "distilled" in data["model"]:
        return False
    return any(variant["guidance_scale"] != 1 for variant in data["variants"])


def _calibration(
    bundle: Bundle,
    source: Path,
    out: Path,
    wanted: Sequence[str],
    records: Mapping[str, Mapping[str, Any]],
    given: Path | None,
    seed: int,
    threads: int | None,
) -> CalibrationSet:
    parents = bundle.data["parents"]
    digest = parents.get("reference") or parents["module"]
    if given is not None and is_calibration_set(given):
        data = read_calibration(given)
        data.check_source(digest)
        return data
    if given is not None:
        if len(wanted) != 1:
            raise QuantizationError(
                f"{given} has arrays for one component (there is no {given.with_suffix('.json').name} beside it); "
                f"say with --component which of {', '.join(wanted)} it is for"
            )
        return read_arrays(given, wanted[0], records[wanted[0]]["inputs"], digest)
    if bundle.data["model"] is None:
        raise QuantizationError(
            f"bundle {source} holds single components and draws nothing to calibrate with; give real inputs: "
            "--calibration FILE.npz, arrays named after the inputs, the samples on the first axis"
        )
    from ldm_deploy.runtime.pipeline import load

    # The same set for every target where it can be.
    drawing = next((target for target in TARGETS if _baseline(bundle.data, target) is not None), None)
    if drawing is None:
        raise QuantizationError(
            f"bundle {source} has no fp32 variant to draw calibration data with; export all components, "
            "or give --calibration"
        )
    data = collect(load(source, variant=f"fp32-{drawing}", threads=threads), digest, seed=seed)
    write_calibration(data, out.with_name(f"{out.name}.calibration.npz"))
    return data


def _engine_entry(
    original: Mapping[str, Any],
    target: str,
    kept: Candidate,
    losers: Sequence[Candidate],
    files: Sequence[Path],
    layers: Sequence[str],
    root: Path,
) -> dict[str, Any]:
    recipe = kept.recipe.to_dict()
    return {
        **original,
        "id": f"{original['component']}-int8-{target}",
        "precision": "int8",
        **({"rest": recipe["rest"]} if "rest" in recipe else {}),
        "files": [file.relative_to(root).as_posix() for file in files],
        "size_bytes": sum(file.stat().st_size for file in files),
        "precision_found": kept.found,
        "parity": kept.parity.to_dict(),
        "speedup": kept.speedup,
        "comparisons": kept.comparisons,
        "recipe": {"name": kept.name, **recipe},
        "layers": list(layers),
        "recipes_refused": {loser.name: loser.refused for loser in losers},
    }


def _refusal(component: str, target: str, candidate: Candidate) -> dict[str, Any]:
    runtime, _, device = target.partition("-")
    return {
        "name": f"{component}-int8-{target} ({candidate.name})",
        "component": component,
        "runtime": runtime,
        "device": device,
        "precision": "int8",
        "reason": candidate.refused,
        "parity": candidate.parity.to_dict(),
        "speedup": candidate.speedup,
        "comparisons": candidate.comparisons,
        "costly_ops": candidate.costly_ops,
    }


def _variant(data: Mapping[str, Any], target: str, new_engines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The bf16 variant where there is one, else the fp32 one, with INT8 engines in; None if there are none."""
    base = _baseline(data, target, "bf16") or _baseline(data, target)
    if base is None or not new_engines:
        return None
    components = {record["id"]: record["component"] for record in data["engines"]}
    new = {engine["component"]: engine["id"] for engine in new_engines}
    engines = [new.get(components[identifier], identifier) for identifier in base["engines"]]
    precision = "int8" if new.keys() >= set(DRAWING) else "mixed"
    return {**base, "name": f"{precision}-{target}", "engines": engines}
