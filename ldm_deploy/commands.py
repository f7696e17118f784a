"""What the command line does besides calling a stage: check words, explain errors, draw, show a bundle."""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_deploy.errors import ConfigError, StageMissingError

TARGETS = (
    "onnxruntime-cpu",
    "openvino-cpu",
    "onnxruntime-cuda",
    "tensorrt-cuda",
    "torch-tensorrt-cuda",
    "aoti-cuda",
)
COMPONENTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder", "pipeline")
PRECISIONS = ("fp32", "fp16", "bf16")
LAYOUTS = ("bundle", "optimum")
RECIPES = ("steps", "decoder", "prune", "int8")  # of distillation
IMAGE_FORMATS = {".png": "PNG", ".bmp": "BMP"}


def check_words(
    targets: list[str] | None = None,
    components: list[str] | None = None,
    precisions: list[str] | None = None,
    layouts: list[str] | None = None,
    recipes: list[str] | None = None,
) -> None:
    """Raises `ConfigError` for a word nobody knows."""
    for kind, given, known in (
        ("target", targets, TARGETS),
        ("component", components, COMPONENTS),
        ("precision", precisions, PRECISIONS),
        ("layout", layouts, LAYOUTS),
        ("recipe", recipes, RECIPES),
    ):
        for word in given or ():
            if word not in known:
                near = difflib.get_close_matches(word, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
                raise ConfigError(f"{kind} {word!r} is unknown; {hint}")


def check_ray(address: str | None, builds: int) -> None:
    """Raises `ConfigError` for a cluster that has nothing to do."""
    if address is not None and not builds:
        raise ConfigError(f"--ray {address} draws for the search, and nothing is searched; add --builds N")


def is_function(source: str) -> bool:
    """Whether a source is `module:function`, one of the user's own."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) is not None and not Path(source).exists()


def stage_function(module: str, name: str) -> Callable[..., Any]:
    """`name` of `module`, imported now. Raises `StageMissingError` if this version does not have the module."""
    import importlib

    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise StageMissingError(f"{name} is not built yet; `ldm-deploy --help` lists what there is") from None
    return found


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`"64x96"` -> (64, 96): height and width in pixels."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise ConfigError(f"--size is {text!r}; give height and width in pixels, as 64x64")
    return int(match[1]), int(match[2])


def explain(error: Exception) -> str | None:
    """One line with the remedy where the machine lacks space, rights, memory or a package; None for a bug."""
    from ldm_deploy.artifact import is_full_disk

    link: BaseException | None = error
    while link is not None:  # libraries wrap it
        if is_full_disk(link):
            name = getattr(link, "filename", None)
            where = f" (writing {name})" if name else ""
            return f"the disk is full{where}; free some space and run the same command again"
        link = link.__cause__ or link.__context__
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}; check the path and its permissions"
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or use a smaller size"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("ldm_deploy"):
        package = error.name.partition(".")[0]
        return f"the package {package!r} is not installed; install what is missing: pip install 'ldm-deploy[all-cpu]'"
    return None


def read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def show_bundle(bundle: Path) -> dict[str, Any]:
    """Print what a bundle holds, after the same checks that `load` makes; returns its bundle.json."""
    from ldm_deploy.runtime.bundle import read_bundle

    data = read_bundle(bundle).data
    print(f"{data['name']} (format {data['format']}, {data['created']})")
    if data["model"] is not None:
        _show_model(data["model"], data["schedule"])
    print("variants" if data["variants"] else "no variant: components only")
    for variant in data["variants"]:
        default = "  (default)" if variant["name"] == data["default_variant"] else ""
        count = "1 step" if variant["steps"] == 1 else f"{variant['steps']} steps"
        drawing = f"{variant['sampler']}, {count}, guidance {variant['guidance_scale']:g}"
        print(f"  {variant['name']:32} {drawing}{default}")
    print("engines")
    for engine in data["engines"]:
        size = sum(data["files"][file]["size"] for file in engine["files"]) / 1e6
        found = ", ".join(f"{count} {name}" for name, count in (engine.get("precision_found") or {}).items())
        parity = engine.get("parity") or {}
        error = parity.get("relative_error")
        against = "not compared" if error is None else f"error {error:.1e} of {parity['limit']:.1e} allowed"
        print(f"  {engine['id']:40} {size:7.2f} MB  {found or engine['precision']}; {against}")
    for refused in data.get("refused") or ():
        print(f"refused: {refused['name']}: {refused['reason']}")
    total = sum(entry["size"] for entry in data["files"].values()) / 1e6
    print(f"{len(data['files'])} files, {total:.2f} MB; every digest matches")
    return data


def show_quantized(data: dict[str, Any], target: str, precision: str = "int8") -> bool:
    """Print what quantization for `target` kept and refused, `data` being bundle.json; whether it kept anything."""
    ending = f"-{precision}-{target}"
    made = [engine for engine in data["engines"] if engine["id"].endswith(ending)]
    for engine in made:
        found = ", ".join(f"{count} {name}" for name, count in engine["precision_found"].items())
        ratios = ", ".join(
            f"{one['median']:.2f}x {one['versus']} ({one['ci95_low']:.2f} to {one['ci95_high']:.2f})"
            for one in engine.get("comparisons") or [engine["speedup"]]
            if one is not None
        )
        parity = engine["parity"]
        name = f" ({engine['recipe']['name']})" if engine.get("recipe") else ""
        print(
            f"{engine['id']}{name}: {ratios or 'not timed'}; "
            f"error {parity['relative_error']:.2g} of {parity['limit']:.2g} allowed; "
            f"{engine['size_bytes'] / 1e6:.2f} MB; {found}"
        )
        for other, reason in (engine.get("recipes_refused") or {}).items():
            print(f"  refused: {other}: {reason}")
    for refused in data.get("refused") or ():
        if ending in refused["name"]:
            print(f"refused: {refused['name']}: {refused['reason']}")
    if not made:
        print(f"no {precision} engine keeps its limits; the closest are above")
    return bool(made)


def _show_model(model: dict[str, Any], schedule: dict[str, Any]) -> None:
    height, width = model["default_size"]
    print(
        f"  {model['kind']} (licence: {model['license']}), {height}x{width} pixels by default, "
        f"any multiple of {model['size_multiple']}; "
        f"prompts of up to {model['context_length']} tokens; {schedule['prediction_type']}, "
        f"{schedule['num_train_timesteps']} timesteps"
    )


def draw(
    bundle: Path, prompt: str, out: Path, variant: str | None, threads: int | None, request: dict[str, Any]
) -> dict[str, Any]:
    """Draw one image and write it, whole or not at all. `request`: the pipeline's keyword arguments."""
    if out.suffix.lower() not in IMAGE_FORMATS:
        raise ConfigError(f"--out is {str(out)!r}; write to a file that ends in {' or '.join(IMAGE_FORMATS)}")
    import io

    from PIL import Image

    import ldm_deploy
    from ldm_deploy.artifact import atomic_write_bytes
    from ldm_deploy.progress import task

    started = time.perf_counter()
    pipeline = ldm_deploy.load(bundle, variant=variant, threads=threads)
    loaded = time.perf_counter()
    given = {key: value for key, value in request.items() if value is not None}
    if pipeline.at_once:
        pixels = pipeline(prompt, **given)[0]
    else:
        with task("drawing", given.get("steps", pipeline.steps)) as advance:
            pixels = pipeline(prompt, on_step=lambda *_: advance(), **given)[0]
    drawn = time.perf_counter()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=IMAGE_FORMATS[out.suffix.lower()])
    atomic_write_bytes(out, buffer.getvalue())
    print(out)
    return {
        "format": 1,
        "image": str(out),
        "bundle": str(bundle),
        "prompt": prompt,
        **request,
        "size": list(pixels.shape[:2]),
        "load_ms": 1000 * (loaded - started),
        "latency_ms": 1000 * (drawn - loaded),
    }
