"""A checkpoint's engines in the layout that optimum's ONNX Runtime pipelines load: one folder per component, no torch.

The graphs are those of a bundle, under optimum's names: `unet/model.onnx` takes a single timestep for the whole batch,
`vae_encoder` returns mean and log-variance in one tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.errors import ConfigError
from ldm_deploy.eval.parity import Arrays, Probe, check_parity, read_probes

if TYPE_CHECKING:
    import onnx_ir as ir

    from ldm_deploy.cache import Cache
    from ldm_deploy.runtime.engines import Engine

# kind of component -> our names for its inputs and outputs -> optimum's
NAMES: Mapping[str, Mapping[str, str]] = {
    "text_encoder": {"encoder_hidden_states": "last_hidden_state"},
    "unet": {"prediction": "out_sample"},
    "vae_encoder": {"image": "sample"},
    "vae_decoder": {"latent": "latent_sample", "image": "sample"},
    "tiny vae_encoder": {"image": "sample", "latent_mean": "latent_sample"},
}
COPIED = ("scheduler", "tokenizer", "feature_extractor")
CONFIGS = {"text_encoder": "text_encoder", "unet": "unet", "vae_encoder": "vae", "vae_decoder": "vae"}


def export_optimum(
    source: str | Path,
    out: Path,
    *,
    precision: str = "fp32",
    target: str = "onnxruntime-cpu",
    options: Sequence[str] = (),
    seed: int = 0,
    threads: int | None = None,
    cache: Cache | None = None,
) -> dict[str, Any]:
    """Export a Stable Diffusion 1.x or 2.x checkpoint to `out`, for `ORTDiffusionPipeline.from_pretrained(out)`.

    Every graph is compared with torch twice: as an engine of ours, and once more under its new names. Returns what
    manifest.json says. Raises `ConfigError` for a source that has no such layout, otherwise as `export_source`.
    """
    from ldm_deploy.artifact import content_key, read_manifest, staged_directory, write_manifest
    from ldm_deploy.eval.budget import load_budget
    from ldm_deploy.export.export import export_source
    from ldm_deploy.models.sources import INDEX, resolve_source
    from ldm_deploy.runtime.engines import OnnxRuntimeEngine

    checkpoint = resolve_source(source)
    if not (checkpoint / INDEX).is_file() or not target.startswith("onnxruntime-"):
        raise ConfigError(
            f"--layout optimum writes a checkpoint of diffusers for ONNX Runtime; {source} for {target} is not that: "
            "leave --layout out"
        )
    index = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))
    if "text_encoder_2" in index:
        raise ConfigError(
            f"{source} has two text encoders, which are one engine here and two in optimum; leave --layout out"
        )
    with staged_directory(out) as staging:
        made = staging / "bundle"
        bundle = export_source(
            checkpoint, made, variants=[(precision, target)], options=options, seed=seed, threads=threads, cache=cache
        )
        limits = load_budget(None)
        for engine in bundle.engines.values():
            folder, kind = staging / engine.component, engine.component
            folder.mkdir()
            if kind == "vae_encoder" and index["vae"][1] == "AutoencoderTiny":
                kind = "tiny vae_encoder"
            rename(made / engine.files[0], folder / "model.onnx", kind)
            shutil.copyfile(checkpoint / CONFIGS[engine.component] / "config.json", folder / "config.json")
            opened = OnnxRuntimeEngine(folder / "model.onnx", device=engine.device, threads=threads, spinning=False)
            probes = fitting(read_probes(made / "probes" / f"{engine.component}.safetensors"), kind)
            limit = limits.parity_limit(precision, engine.component)
            check_parity(_Renamed(opened, kind), probes, limit, component=engine.component, name="for optimum")
        for name in COPIED:
            if (checkpoint / name).is_dir():
                shutil.copytree(checkpoint / name, staging / name)
        shutil.copyfile(checkpoint / INDEX, staging / INDEX)
        shutil.rmtree(made)
        write_manifest(staging, "optimum", content_key(bundle.data["files"]), bundle.data["parents"])
    return read_manifest(out)


def fitting(probes: list[Probe], kind: str) -> list[Probe]:
    """What the graph of a `kind` can answer: one timestep a batch, no spread of a tiny autoencoder."""
    if kind == "tiny vae_encoder":
        return [Probe(probe.inputs, {"latent_mean": probe.outputs["latent_mean"]}) for probe in probes]
    return [probe for probe in probes if len(np.unique(probe.inputs.get("timestep", 0))) == 1]


def rename(onnx: Path, made: Path, kind: str) -> None:
    """Write `made`, the graph of `onnx` under the names of a `kind`; weights that lie beside it are copied."""
    import onnx_ir as ir

    model = ir.load(onnx)
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    if kind == "unet":
        _one_timestep(model, values["sample"], values["timestep"])
    if kind == "vae_encoder":
        _one_output(model, values["latent_mean"], values["latent_logvar"])
    if kind == "tiny vae_encoder":
        model.graph.outputs[:] = [values["latent_mean"]]
    taken = {value.name: value for node in model.graph.all_nodes() for value in node.outputs if value.name}
    for ours, theirs in NAMES[kind].items():
        if theirs in taken:
            taken[theirs].name = f"{theirs}_inside"
        values[ours].name = theirs
    ir.save(model, made, external_data="model.onnx.data" if onnx.with_name(f"{onnx.name}.data").exists() else None)


def _one_timestep(model: ir.Model, sample: ir.Value, timestep: ir.Value) -> None:
    """A scalar goes in and is expanded to the batch."""
    import onnx_ir as ir

    each = ir.Node("", "Shape", [sample], [ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)], name="batch_of_sample")
    scalar = ir.Value(name="timestep", type=timestep.type, shape=ir.Shape([]))
    expand = ir.Node("", "Expand", [scalar, each.outputs[0]], name="timestep_of_each")
    each.outputs[0].name, expand.outputs[0].name = "batch_size", "timesteps"
    ir.convenience.replace_all_uses_with(timestep, expand.outputs[0])
    model.graph.inputs[list(model.graph.inputs).index(timestep)] = scalar
    model.graph.insert_before(model.graph[0], [each, expand])


def _one_output(model: ir.Model, mean: ir.Value, logvar: ir.Value) -> None:
    """Mean and log-variance side by side, as diffusers' own encoder returns them."""
    import onnx_ir as ir

    joined = ir.Node("", "Concat", [mean, logvar], [ir.AttrInt64("axis", 1)], name="parameters")
    joined.outputs[0].name, joined.outputs[0].type = "latent_parameters", mean.type
    assert mean.shape is not None
    batch, channels, height, width = mean.shape
    assert isinstance(channels, int)
    joined.outputs[0].shape = ir.Shape([batch, 2 * channels, height, width])
    model.graph.append(joined)
    model.graph.outputs[:] = [joined.outputs[0]]


class _Renamed:
    """An engine of optimum's layout under our names, so that our probes fit."""

    def __init__(self, engine: Engine, kind: str) -> None:
        self.engine, self.kind = engine, kind

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        names = NAMES[self.kind]
        given = {names.get(name, name): value for name, value in feeds.items()}
        if self.kind == "unet":
            given["timestep"] = np.array(given["timestep"][0])
        found = self.engine.run(given)
        if self.kind == "vae_encoder":
            mean, logvar = np.split(found["latent_parameters"], 2, axis=1)
            return {"latent_mean": mean, "latent_logvar": logvar}
        ours = {theirs: name for name, theirs in names.items()}
        return {ours.get(name, name): value for name, value in found.items()}
