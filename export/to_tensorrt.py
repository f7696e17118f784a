"""An ONNX file to a TensorRT engine: strongly typed, so that every precision is the one the graph names.

Written for TensorRT 10.13 and later and 11, with what both have: no calibrator, no precision flag. Its calls are
checked against NVIDIA's own Python bindings (tests/contract/test_tensorrt.py); that an engine works can be shown
only on a machine with a GPU, and has not been yet.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_deploy.errors import ConfigError, ExportError
from ldm_deploy.export.traced import Shapes

OLDEST = (10, 13)
NAMES = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8", "FP8": "fp8"}
ARITHMETIC = ("conv", "gemm", "matmul", "matrix", "matrixmultiply", "deconv", "myelin", "kgen", "mha")


@dataclass(frozen=True)
class TensorRtOptions:
    """`workspace_bytes`: the most a layer may use while running. `timing_cache`: read if there, and written.

    `refit`: weights can be exchanged later. `strip_plan`: the plan holds no weights, they are taken from the ONNX file
    beside it when it is loaded. `version_compatible`, `hardware_compatible`: loads on later versions, and on other GPUs
    from Ampere on, for some loss of speed.
    """

    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    refit: bool = False
    strip_plan: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False


def read_options(words: Sequence[str]) -> TensorRtOptions:
    """Options as they are typed: "refit", "strip-plan", "version-compatible", "hardware-compatible",
    "workspace=2GB". The timing cache lies in the user's cache. Raises `ConfigError`."""
    from ldm_deploy.cache import parse_size, user_cache

    switches = {"refit", "strip-plan", "version-compatible", "hardware-compatible"}
    chosen: dict[str, Any] = {}
    for word in words:
        name, equals, size = word.partition("=")
        if name == "workspace" and equals and (workspace := parse_size(size)) is not None:
            chosen["workspace_bytes"] = workspace
        elif word in switches:
            chosen[word.replace("-", "_")] = True
        else:
            raise ConfigError(f"option {word!r} is unknown; TensorRT has {', '.join(sorted(switches))}, workspace=2GB")
    folder = user_cache().compiled("tensorrt")
    return TensorRtOptions(timing_cache=None if folder is None else folder / "timings", **chosen)


def to_tensorrt(onnx: Path, plan: Path, shapes: Shapes, options: TensorRtOptions | None = None) -> dict[str, Any]:
    """Write `plan`; returns `precision_found` (layers that multiply or convolve, by precision) and `built_for`.

    `shapes`: the optimization profile, for every input with a symbolic axis. Raises `ExportError`, which names the
    nodes that the parser refuses.
    """
    trt = import_tensorrt()
    options = options or TensorRtOptions()
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise ExportError(f"{onnx.stem}: TensorRT cannot read the graph: {'; '.join(_parser_errors(parser))}")
    config = builder.create_builder_config()
    _configure(trt, config, options)
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"{onnx.stem}: TensorRT does not take the sizes {dict(shapes)}; smallest <= usual <= largest")
    cache = _timing_cache(config, options)
    config.progress_monitor = _progress(trt)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise ExportError(f"{onnx.stem}: TensorRT built no engine: {log.last or 'it gave no reason'}")
    plan.write_bytes(bytes(built))
    if cache is not None and options.timing_cache is not None:
        from ldm_deploy.artifact import atomic_write_bytes

        atomic_write_bytes(options.timing_cache, bytes(cache.serialize()))
    return {"precision_found": inspect_precision(trt, log, bytes(built)), "built_for": built_for(shapes, options)}


def import_tensorrt() -> Any:
    """The module. Raises `ExportError` if it is not there, or too old."""
    try:
        import tensorrt
    except ImportError as error:
        raise ExportError(
            f"TensorRT is not installed ({error}); on a machine with an NVIDIA GPU: pip install 'ldm-deploy[tensorrt]'"
        ) from None
    version = tuple(int(part) for part in tensorrt.__version__.split(".")[:2])
    if version < OLDEST:
        raise ExportError(f"TensorRT is {tensorrt.__version__}; this version builds with 10.13 and later: upgrade it")
    return tensorrt


def built_for(shapes: Shapes, options: TensorRtOptions) -> dict[str, Any]:
    """What an engine needs of the machine that loads it, and the sizes it takes."""
    from ldm_deploy.runtime.cuda import device_properties

    tensorrt = import_tensorrt()
    return {
        "tensorrt": tensorrt.__version__,
        **device_properties(),
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "shapes": {name: [list(sizes) for sizes in given] for name, given in shapes.items()},
    }


def make_log(trt: Any) -> Any:
    """A logger that keeps quiet and remembers the last error."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.last = msg.splitlines()[0] if msg else ""

    return Log()


def _configure(trt: Any, config: Any, options: TensorRtOptions) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: "fp32" would have the mantissa of fp16
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector tells no types
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.strip_plan:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _timing_cache(config: Any, options: TensorRtOptions) -> Any:
    if options.timing_cache is None:
        return None
    stored = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
    cache = config.create_timing_cache(stored)
    # False: measured on another GPU or version is not taken over.
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _parser_errors(parser: Any) -> list[str]:
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(f"node {error.node_name() or '?'} ({error.node_operator() or '?'}): {error.desc()}")
    return found or ["it gave no reason"]


def _progress(trt: Any) -> Any:
    """TensorRT's outermost phase as one of our progress bars; Ctrl-C ends the build."""
    from ldm_deploy.progress import note

    class Progress(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                note(f"TensorRT: {phase_name}, {num_steps} steps")

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Progress()


def inspect_precision(trt: Any, log: Any, plan: bytes) -> dict[str, int]:
    """Layers that multiply or convolve, by precision, as the engine inspector tells them."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(f"TensorRT cannot load what it has just built: {log.last or 'it gave no reason'}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return count_precisions(json.loads(text))


def count_precisions(information: Mapping[str, Any]) -> dict[str, int]:
    """From the inspector's JSON: {"Layers": [{"Name", "LayerType", "Outputs": [{"Format/Datatype"}]}]}."""
    found: Counter[str] = Counter()
    for layer in information.get("Layers", []):
        if not isinstance(layer, Mapping):
            raise ExportError("the inspector tells no types: the engine was built without detailed verbosity")
        kind = str(layer.get("LayerType", "")).lower()
        if any(word in kind for word in ARITHMETIC):
            types = [str(value.get("Format/Datatype", "")) for value in layer.get("Outputs", [])]
            name = next(
                (NAMES[word] for kind in types for word in kind.replace("/", " ").split() if word in NAMES), None
            )
            found[name or "unknown"] += 1
    return dict(sorted(found.items()))
