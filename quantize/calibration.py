"""Calibration sets: what U-Net and autoencoder really meet while the model draws images, and encodes them again.

Seeded sampler trajectories of the fp32 pipeline, with and without guidance, stratified over all timesteps, in memory
that does not depend on how many trajectories are drawn. Stored as `.npz` (no pickle) with a small JSON beside it, and
named by the digest of its content, so that every engine built from it can say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.errors import PromptError, QuantizationError

if TYPE_CHECKING:
    from ldm_deploy.runtime.pipeline import Pipeline

FORMAT = 1
Arrays = dict[str, np.ndarray]

# Captions that are not among the report's prompts: what is judged must not have been seen. Of all lengths, as what the
# text encoder says of the last of a long one, or of padding, no short one shows.
PROMPTS = (
    "green apple",
    "a dog's face, close up",
    "hot dog",
    "an airplane above the clouds at sunset, photograph",
    "blue heart",
    "portrait of an old fisherman, oil on canvas",
    "snowflake",
    "a small wooden house beside a frozen lake, mountains behind it, early morning, soft light, highly detailed",
    "crying face",
    "three cups of tea on a table",
    "city",
    "a red bicycle leaning against a yellow wall",
    "watercolor of a lighthouse in a storm",
    "black and white photo of a street musician",
    "tree",
    "isometric drawing of a tiny kitchen with plants, cutlery and a cat asleep on the window sill, pastel colors, 3d",
    "a bowl of ramen",
    "an astronaut riding a horse",
    "logo of a coffee shop, flat, minimal",
    "forest path in autumn",
    "a child's drawing of a dragon",
    "macro shot of a bee on a purple flower, shallow depth of field",
    "stained glass window",
    "a train crossing a stone bridge, steam, wide angle, cinematic, dramatic sky, seen from the valley below",
    "pencil sketch of hands",
    "a pile of old books",
    "neon sign in the rain at night",
    "a glass of water",
    "map of an imaginary island with rivers, roads, three harbors and a volcano, ink on parchment, ornate border",
    "sand dunes",
    "a robot watering tomatoes",
    "white cat",
)
PER_WALK = 8  # prompts that a trajectory is drawn for; the next one takes the next
TIMESTEP_BINS = 10
PER_STRATUM = 2  # samples kept per timestep bin and kind of call
DECODER_SAMPLES = 16
ENCODER_SAMPLES = 8
# Steps and whether guidance is used. Few-step trajectories pass through other latents than long ones.
TRAJECTORIES = ((25, True), (20, False), (10, True), (5, False))


class Samples:
    """Feeds of batch 1, made when asked for; may be iterated any number of times."""

    def __init__(self, arrays: Mapping[str, np.ndarray], indices: Sequence[int] | None = None) -> None:
        self.arrays = dict(arrays)
        self.indices = range(len(next(iter(self.arrays.values())))) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Arrays]:
        for index in self.indices:
            yield {name: value[index : index + 1] for name, value in self.arrays.items()}


@dataclass
class CalibrationSet:
    """`arrays[component][input]` has the samples on its first axis. `source`: digest of the model they come from."""

    source: str
    arrays: dict[str, Arrays]
    details: dict[str, Any]  # seed, prompts, trajectories: how it was collected

    @property
    def digest(self) -> str:
        """sha256 over names, dtypes, shapes and values (not over the zip, whose bytes depend on the zlib at hand)."""
        content = hashlib.sha256()
        for component, arrays in sorted(self.arrays.items()):
            for name, value in sorted(arrays.items()):
                content.update(f"{component}.{name} {value.dtype.str} {value.shape}\n".encode())
                content.update(np.ascontiguousarray(value).tobytes())
        return f"sha256:{content.hexdigest()}"

    def samples(self, component: str, indices: Sequence[int] | None = None) -> Samples:
        """Raises `QuantizationError` if the set has nothing for this component, or nothing one could calibrate with."""
        arrays = self.arrays.get(component, {})
        count = min((len(value) for value in arrays.values()), default=0)
        if count == 0:
            raise QuantizationError(
                f"the calibration set has no samples for {component}; it has {', '.join(self.arrays) or 'nothing'}: "
                "collect it again"
            )
        for name, value in arrays.items():
            if len(value) != count:
                raise QuantizationError(
                    f"calibration of {component}: {name!r} has {len(value)} samples, others {count}; "
                    "give every input the same number"
                )
            if not np.isfinite(value).all():
                bad = int((~np.isfinite(value.reshape(count, -1)).all(axis=1)).argmax())
                raise QuantizationError(
                    f"calibration of {component}: {name!r} is not finite in sample {bad}; collect it again"
                )
            if np.issubdtype(value.dtype, np.floating) and value.size and (value == value.flat[0]).all():
                raise QuantizationError(
                    f"calibration of {component}: {name!r} is {value.flat[0]:g} everywhere; "
                    "a constant says nothing about ranges: give real inputs"
                )
        return Samples(arrays, indices)

    def check_source(self, source: str) -> None:
        """Raises `QuantizationError` if the set was collected from another model."""
        if self.source != source:
            raise QuantizationError(
                f"the calibration set was collected from another model ({self.source[:19]}…, this one is "
                f"{source[:19]}…); leave --calibration out and it is collected from this one"
            )


class Reservoir:
    """Keeps `size` of any number of rows, each with the same chance (Vitter 1985, algorithm R)."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size = size
        self.rng = rng
        self.seen = 0
        self.rows: list[Arrays] = []

    def offer(self, row: Mapping[str, np.ndarray]) -> None:
        self.seen += 1
        if len(self.rows) < self.size:
            self.rows.append({name: np.array(value) for name, value in row.items()})
            return
        index = int(self.rng.integers(self.seen))
        if index < self.size:
            self.rows[index] = {name: np.array(value) for name, value in row.items()}


class Tap:
    """An engine that shows its feeds, row by row, to `offer` before it runs them."""

    def __init__(self, engine: Any, offer: Any) -> None:
        self.engine = engine
        self.offer = offer
        self.inputs, self.outputs = getattr(engine, "inputs", []), getattr(engine, "outputs", [])

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        batch = len(next(iter(feeds.values())))
        for index in range(batch):
            self.offer({name: value[index] for name, value in feeds.items()}, index, batch)
        outputs: Arrays = self.engine.run(feeds)
        return outputs


class Collector:
    """Stratified reservoirs behind the taps of a pipeline's U-Net and decoder, and one for the images drawn."""

    def __init__(self, num_train_timesteps: int, seed: int, per_stratum: int = PER_STRATUM) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.seed = seed
        self.per_stratum = per_stratum
        self.guided = False
        self.unet: dict[tuple[int, str], Reservoir] = {}
        self.decoder = Reservoir(DECODER_SAMPLES, np.random.default_rng([seed, 1]))
        self.encoder = Reservoir(ENCODER_SAMPLES, np.random.default_rng([seed, 2]))

    def offer_unet(self, row: Arrays, index: int, batch: int) -> None:
        # With guidance the batch is [unconditional, conditional] (CONTRACTS); the halves see different captions.
        kind = "plain" if not self.guided else ("unconditional" if index < batch // 2 else "conditional")
        stratum = int(row["timestep"]) * TIMESTEP_BINS // self.num_train_timesteps
        key = (stratum, kind)
        if key not in self.unet:
            salt = ("plain", "unconditional", "conditional").index(kind)
            self.unet[key] = Reservoir(self.per_stratum, np.random.default_rng([self.seed, 0, stratum, salt]))
        self.unet[key].offer(row)

    def offer_decoder(self, row: Arrays, index: int, batch: int) -> None:
        self.decoder.offer(row)

    def arrays(self) -> dict[str, Arrays]:
        rows = {
            "unet": [row for key in sorted(self.unet) for row in self.unet[key].rows],
            "vae_decoder": self.decoder.rows,
            "vae_encoder": self.encoder.rows,
        }
        return {
            component: {name: np.stack([row[name] for row in kept]) for name in kept[0]}
            for component, kept in rows.items()
            if kept
        }


def collect(
    pipeline: Pipeline,
    source: str,
    *,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    trajectories: Sequence[tuple[int, bool]] = TRAJECTORIES,
    per_stratum: int = PER_STRATUM,
    decode: bool = True,
) -> CalibrationSet:
    """Draw seeded trajectories with an fp32 pipeline and keep a stratified choice of what its engines were fed.

    `source`: digest of the model. `prompts`: None takes `general_prompts`. `trajectories`: steps
    and whether guidance is used; a student of few steps is drawn in those that it was distilled for. Each is drawn for
    `PER_WALK` prompts, in turn: samples of one prompt would let a range fit that prompt. Memory: at most
    per_stratum x 3 x TIMESTEP_BINS U-Net rows, DECODER_SAMPLES latents and, of a model with an encoder, ENCODER_SAMPLES
    of the images drawn, whatever `prompts` and `trajectories` are. The same arguments give the same set. `decode` False
    leaves decoder and encoder out.
    """
    from ldm_deploy.progress import task
    from ldm_deploy.runtime.pipeline import scaled_images

    prompts = fitting_prompts(pipeline, prompts or general_prompts(pipeline.model))
    student, guidance = pipeline.model.get("distilled"), pipeline.guidance_scale
    walks = [(steps, guidance if guided else 1.0) for steps, guided in trajectories]
    if student is not None:  # it knows its own steps only, and one kind of call: the guidance is an input
        low, high = student["guidance_range"] or (1.0, 1.0)
        walks = [(steps, scale) for steps in student["steps"] for scale in sorted({low, guidance, high})]
        per_stratum *= 3
    collector = Collector(pipeline.schedule.num_train_timesteps, seed, per_stratum)
    taps = {"unet": Tap(pipeline.components["unet"], collector.offer_unet)}
    if decode:
        taps["vae_decoder"] = Tap(pipeline.components["vae_decoder"], collector.offer_decoder)
    tapped = pipeline.with_engines(taps)
    with task("collecting calibration data", sum(steps for steps, _ in walks)) as advance:
        for number, (steps, scale) in enumerate(walks):
            collector.guided = scale != 1.0 and student is None
            first, count = PER_WALK * number, min(PER_WALK, len(prompts))
            chosen = [prompts[(first + index) % len(prompts)] for index in range(count)]
            seeds = [10_000 + 1000 * seed + 100 * number + index for index in range(count)]
            draw = tapped if decode else tapped.sample_latents
            drawn = draw(
                chosen, seed=seeds, steps=steps, guidance_scale=scale,
                on_step=lambda *_: advance(),
            )  # fmt: skip
            if decode and "vae_encoder" in pipeline.components:
                for image in scaled_images(drawn):
                    collector.encoder.offer({"image": image})
    details = {
        "seed": seed,
        "prompts": list(prompts),
        "trajectories": [{"steps": steps, "guidance_scale": scale} for steps, scale in walks],
    }
    return CalibrationSet(source, collector.arrays(), details)


def general_prompts(model: Mapping[str, Any]) -> list[str]:
    """What the model's training left for this and, where that is little, `PROMPTS`; none that a report draws."""
    known = model.get("prompts", {})
    own = list(known.get("calibration", ()))
    more = [text for text in PROMPTS if text not in own and text not in known.get("report", ())]
    return own + more[: max(0, len(PROMPTS) - len(own))]


def fitting_prompts(pipeline: Pipeline, prompts: Sequence[str]) -> list[str]:
    """The prompts that the model's context can hold; the empty one if it holds none of them."""
    fitting = []
    for prompt in prompts:
        with contextlib.suppress(PromptError):
            pipeline.tokenizer.encode([prompt])
            fitting.append(prompt)
    return fitting or [""]


def write_calibration(calibration: CalibrationSet, path: Path) -> None:
    """Write `path` (.npz) and, last, the JSON beside it."""
    from ldm_deploy.artifact import atomic_write_bytes, atomic_write_json

    flat = {
        f"{component}.{name}": value
        for component, arrays in calibration.arrays.items()
        for name, value in arrays.items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **flat)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, buffer.getvalue())
    record = {
        "format": FORMAT,
        "digest": calibration.digest,
        "source": calibration.source,
        "samples": {component: len(next(iter(arrays.values()))) for component, arrays in calibration.arrays.items()},
        **calibration.details,
    }
    atomic_write_json(path.with_suffix(".json"), record)


def is_calibration_set(path: Path) -> bool:
    """Whether a .npz file was written by `write_calibration`: it is not one's own arrays."""
    return path.with_suffix(".json").is_file() or not path.is_file()


def read_arrays(path: Path, component: str, inputs: Sequence[Mapping[str, Any]], source: str) -> CalibrationSet:
    """A .npz file of one's own: an array for each input of a component, named after it, the samples on the first axis.

    `inputs`: as bundle.json describes them (name, dtype, shape). Raises `QuantizationError` for what does not fit.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QuantizationError(f"calibration file {path} cannot be read ({reason}); write it with np.savez") from None
    names = [value["name"] for value in inputs]
    wrong = sorted(set(arrays) ^ set(names))
    if wrong:
        raise QuantizationError(
            f"calibration file {path} has {', '.join(sorted(arrays)) or 'no array'}; {component} takes "
            f"{', '.join(names)}: give one array for each, by these names"
        )
    for value in inputs:
        name, shape = value["name"], value["shape"]
        array = arrays[name]
        fixed = [None if isinstance(size, str) else size for size in shape]
        fits = array.ndim == len(fixed) > 0 and all(
            size is None or size == found for size, found in zip(fixed[1:], array.shape[1:], strict=True)
        )
        if not fits or fixed[0] not in (None, 1):
            wanted = ", ".join(["samples", *map(str, shape[1:])])
            raise QuantizationError(
                f"calibration file {path}: {name!r} has shape {array.shape}; {component} takes ({wanted}), "
                "each sample by itself"
            )
        if not np.can_cast(array.dtype, value["dtype"], "same_kind"):
            raise QuantizationError(
                f"calibration file {path}: {name!r} is {array.dtype}; {component} takes {value['dtype']}"
            )
        arrays[name] = array.astype(value["dtype"])
    return CalibrationSet(source, {component: arrays}, {"file": path.name})


def read_calibration(path: Path) -> CalibrationSet:
    """Read what `write_calibration` wrote. Raises `QuantizationError` if a file is missing, damaged or changed."""
    beside = path.with_suffix(".json")
    try:
        record = json.loads(beside.read_text(encoding="utf-8"))
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            flat = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QuantizationError(
            f"calibration set {path} with {beside.name} cannot be read ({reason}); "
            "leave --calibration out and it is collected anew"
        ) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise QuantizationError(
            f"calibration record {beside} has format {found!r}; this version reads {FORMAT}: upgrade ldm_deploy"
        )
    arrays: dict[str, Arrays] = {}
    for key, value in flat.items():
        component, _, name = key.partition(".")
        arrays.setdefault(component, {})[name] = value
    details = {key: value for key, value in record.items() if key not in ("format", "digest", "source", "samples")}
    calibration = CalibrationSet(str(record.get("source")), arrays, details)
    if calibration.digest != record.get("digest"):
        raise QuantizationError(
            f"calibration set {path} does not have the digest that {beside.name} records; collect it again"
        )
    return calibration
