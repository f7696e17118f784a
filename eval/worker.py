"""One engine or variant in a process of its own: `python -m ldm_deploy.eval.worker`, driven by `latency.Worker`.

Requests and answers are JSON, one per line; arrays travel as .npy and .npz files. A failed request is answered with
{"error": one line} and the process lives on; what libraries print goes to stderr, away from the answers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_deploy.errors import EvaluationError, LdmDeployError
from ldm_deploy.eval.clock import clock_of, host_clock
from ldm_deploy.eval.memory import MemoryLog
from ldm_deploy.eval.placement import huge_page_bytes, pin, pin_threads, thread_times


class Subject:
    """What a worker holds: `draw` for a whole pipeline, `engine` for one component."""

    def __init__(self, spec: dict[str, Any], threads: int) -> None:
        self.pipeline: Any = None
        self.single: Any = None
        kind = spec["kind"]
        if kind == "variant":
            import ldm_deploy

            self.pipeline = ldm_deploy.load(spec["bundle"], variant=spec["variant"], threads=threads, spinning=False)
            for component in DRAWING:
                if component in self.pipeline.components:
                    self.pipeline.components[component]
        elif kind == "reference":
            from ldm_deploy.models.sources import load_source
            from ldm_deploy.models.torch_engine import torch_pipeline

            self.pipeline = torch_pipeline(load_source(spec["path"]), threads)
        elif kind == "engine":
            self.single = open_file(spec, threads)
        elif kind == "module":
            self.single = open_module(spec, threads)
        elif kind == "factory":
            made = _call(spec["file"], spec["function"], spec.get("arguments", {}))
            self.pipeline, self.single = (None, made) if hasattr(made, "run") else (made, None)
        else:
            raise ValueError(f"worker kind {kind!r} is unknown; allowed: variant, reference, engine, module, factory")

    def engine(self, component: str | None) -> Any:
        if self.single is not None:
            return self.single
        return self.pipeline.components[component]

    def draw(self, request: dict[str, Any]) -> tuple[float, np.ndarray]:
        """(milliseconds, uint8 (H, W, 3)). `request`: the pipeline's arguments; None leaves its default."""
        arguments = {key: value for key, value in request.items() if value is not None}
        if "size" in arguments:
            arguments["size"] = tuple(arguments["size"])
        milliseconds, images = host_clock(lambda: self.pipeline(**arguments))
        return milliseconds, images[0]


# What a runtime's engines are opened by: importing it is no part of loading a model.
MODULES = {"openvino": "openvino", "tensorrt": "tensorrt", "aoti": "torch", "torch-tensorrt": "torch_tensorrt"}
DRAWING = ("text_encoder", "unet", "vae_decoder", "pipeline")  # what a variant needs to draw; it opens engines late


def requirements(spec: Mapping[str, Any]) -> tuple[list[str], str]:
    """(modules that a subject imports, its device: "cpu" or "cuda")."""
    if spec["kind"] in ("reference", "module"):
        return ["ldm_deploy.models.sources", "ldm_deploy.models.torch_engine", "torch"], spec.get("device", "cpu")
    modules, device = {"ldm_deploy.runtime.pipeline"}, "cpu"
    for engine in _records(spec):
        modules.add(MODULES.get(engine["runtime"], "onnxruntime"))
        device = "cuda" if "cuda" in (device, engine["device"]) else "cpu"
    return sorted(modules), device


def _records(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What bundle.json says of the engines in question. It is checked when it is loaded, not here."""
    if "bundle" not in spec:
        return [{"runtime": spec["runtime"], "device": "cpu"}] if "runtime" in spec else []
    try:
        data = json.loads((Path(spec["bundle"]) / "bundle.json").read_text(encoding="utf-8"))
        wanted = [spec.get("engine")]
        for variant in data["variants"]:
            wanted += variant["engines"] if variant["name"] == spec.get("variant") else []
        return [engine for engine in data["engines"] if engine["id"] in wanted]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def open_file(spec: dict[str, Any], threads: int) -> Any:
    """An engine of a bundle, or the file of one; of OpenVINO's, "precision" and "rest" say what it computes in."""
    if "bundle" in spec:
        from ldm_deploy.runtime.bundle import read_bundle
        from ldm_deploy.runtime.engines import open_engine

        bundle = read_bundle(spec["bundle"])
        return open_engine(bundle.engines[spec["engine"]], bundle.root, threads=threads, spinning=False)
    runtime = spec.get("runtime", "onnxruntime")
    if runtime == "openvino":
        from ldm_deploy.runtime.engine_openvino import OpenVinoEngine

        return OpenVinoEngine(
            Path(spec["path"]), precision=spec.get("precision", "fp32"), rest=spec.get("rest"), threads=threads
        )
    if runtime != "onnxruntime":
        raise ValueError(f"runtime {runtime!r} is not built yet; there is: onnxruntime, openvino")
    from ldm_deploy.runtime.engines import OnnxRuntimeEngine

    return OnnxRuntimeEngine(Path(spec["path"]), threads=threads, spinning=False)


def open_module(spec: dict[str, Any], threads: int | None = None) -> Any:
    """A component of a source in torch itself. `spec`: "path", "component", "precision", "device", "compile".

    TF32, which cuDNN takes unasked, is off.
    """
    import torch

    from ldm_deploy.models.sources import load_source
    from ldm_deploy.models.torch_engine import torch_engines

    torch.backends.cudnn.allow_tf32 = False
    engine = torch_engines(load_source(spec["path"]), threads)[spec["component"]]
    engine.to(spec["device"], spec["precision"], compiled=spec["compile"])
    return engine


def _call(file: str, function: str, arguments: dict[str, Any]) -> Any:
    """A pipeline or an engine of one's own: `function(**arguments)` of a Python file."""
    import importlib.util  # not loaded by `import importlib`

    spec = importlib.util.spec_from_file_location("ldm_deploy_eval_factory", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return getattr(module, function)(**arguments)


class Session:
    """Answers requests. The subject is loaded by the first."""

    def __init__(self) -> None:
        self.subject: Subject | None = None
        self.memory, self.device = MemoryLog(), "cpu"
        self.processors: list[int] = []
        self.loaded: dict[int, int] = {}  # what every thread had spent by then
        self.feeds: dict[str, dict[str, np.ndarray]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        operation = request.pop("op")
        if operation == "load":
            return self.load(request["spec"], request["threads"])
        if self.subject is None:
            raise ValueError("nothing is loaded yet; send `load` first")
        if operation == "memory":
            return self.memory.report(self.device)
        if operation == "image":
            out = request.pop("out")
            milliseconds, image = self.subject.draw(request)
            np.save(out, image, allow_pickle=False)
            return {"latency_ms": milliseconds}
        if operation == "run":
            return self.run(request)
        if operation == "settle":
            pinned = pin_threads(self.processors, self.loaded)
            return {"threads": len(pinned), "huge_page_bytes": huge_page_bytes()}
        raise ValueError(f"operation {operation!r} is unknown; allowed: load, image, run, settle, memory, quit")

    def load(self, spec: dict[str, Any], threads: int) -> dict[str, Any]:
        """Import what the subject needs, then load it: milliseconds of both, and the time (s) when it began."""
        ready, start = time.time(), time.perf_counter()
        self.processors = pin(threads)
        modules, self.device = requirements(spec)
        for module in modules:
            with contextlib.suppress(ImportError):  # loading says what is missing
                importlib.import_module(module)
        imported = time.perf_counter()
        self.memory = MemoryLog(gpu=self.device == "cuda")
        self.subject = Subject(spec, threads)
        self.memory.loaded()
        self.loaded = thread_times()
        times = {"import_ms": imported - start, "load_ms": time.perf_counter() - imported}
        milliseconds = {name: 1000 * value for name, value in times.items()}
        return {"ready": ready, **milliseconds, "processors": self.processors}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Milliseconds of `repeats` calls of one engine on the feeds of a .npz file, which is read once."""
        assert self.subject is not None
        if request["feeds"] not in self.feeds:
            with np.load(request["feeds"], allow_pickle=False) as stored:
                self.feeds[request["feeds"]] = {name: stored[name] for name in stored.files}
        feeds, engine = self.feeds[request["feeds"]], self.subject.engine(request.get("component"))
        name, clock = clock_of(engine)
        timed = [clock(lambda: engine.run(feeds)) for _ in range(request["repeats"])]
        outputs = timed[-1][1]
        for output, value in outputs.items():
            if not np.isfinite(value).all():
                raise EvaluationError(f"output {output!r} holds NaN or infinity")
        return {"latency_ms": [milliseconds for milliseconds, _ in timed], "clock": name}


def one_line(error: BaseException) -> str:
    """`message` of our own errors, `Class: message` of others."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, LdmDeployError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            break
        try:
            answer = session.answer(request)
        except Exception as error:
            answer = {"error": one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
