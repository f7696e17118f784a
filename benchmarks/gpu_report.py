"""Every engine for a GPU beside torch fp32 with TF32 off: is it built, is it right, how fast is it?

    make gpu-report     or     python3 benchmarks/gpu_report.py [--models reference 71m] [--build-limit S] [--out DIR]

Two models: the shipped reference, and one with random weights and the layout of Stable Diffusion 1.x (U-Net of 71 M
parameters with latents of 32x32, decoder of 12 M to 256x256 pixels). Of each, U-Net and decoder; of each, a row for
torch eager and compiled in fp32, fp16 and bf16, and for every target and precision of `ldm-deploy export` on the
device. Every row is compared with torch fp32 on the CPU on real sampler inputs; latency is with the copies to and from
the device, interleaved with the baseline, one worker process per row. What cannot be had here is a row that says so.

Needs torch and what `pyproject.toml` lists under `export`; the other runtimes where they are installed, and no network.
Everything is built first, then measured. Writes DIR/gpu.json and DIR/gpu.md (build/gpu) after each of the four; what
gpu.json has already is not measured again. Give it half an hour. Where a machine is had for minutes only, --build-limit
ends the building, and what is not built by then is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm_deploy.artifact import atomic_write_bytes, atomic_write_json, tool_versions  # noqa: E402
from ldm_deploy.errors import LdmDeployError  # noqa: E402
from ldm_deploy.progress import note  # noqa: E402

COMPONENTS = ("unet", "vae_decoder")
TORCH_ROWS = (("fp32", False), ("fp16", False), ("bf16", False), ("fp32", True), ("fp16", True))
CORES_PER_BUILD = 2
PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch-tensorrt", "onnx", "triton")
Row = dict[str, Any]
Work = tuple[Row, Callable[..., Row], tuple[Any, ...]]


def model_71m(folder: Path) -> Path:
    """A reference directory with random weights, the same ones every time."""
    import torch

    from ldm_deploy.config import AutoencoderConfig, Config, StageConfig, UNetConfig
    from ldm_deploy.models.reference import build_modules, describe, save_reference
    from ldm_deploy.models.sources import resolve_source

    shipped = resolve_source("reference")
    if (folder / "model.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    untrained = StageConfig(1, 1, 1e-3)
    config = Config(
        "71m", untrained, untrained, resolution=256, autoencoder=AutoencoderConfig(64, (1, 2, 4, 4), 2, 4, 32, "sd1"),
        unet=UNetConfig((128, 256, 512), 2, (0, 1), (8, 8, 8), 32, "sd1"),
    )  # fmt: skip
    own = json.loads((shipped / "model.json").read_text("utf-8"))
    text_encoder = {**own["text_encoder"], "width": 256, "head_channels": 32}
    model = describe(config, 0.18215, text_encoder, own["prompts"])
    torch.manual_seed(0)
    modules = build_modules(model)
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():  # residual branches start as zero
                torch.nn.init.normal_(parameter, std=0.02)
    (folder / "tokenizer.json").write_bytes((shipped / "tokenizer.json").read_bytes())
    save_reference(folder, model, {name: module.state_dict() for name, module in modules.items()})
    return folder


def row(name: str, precision: str, runtime: str) -> Row:
    return {
        "name": name, "runtime": runtime, "precision": precision, "status": "ok", "reason": None, "build_s": None,
        "size_bytes": None, "precision_found": None, "parity": None, "latency_ms": None, "speedup": None, "spec": None,
    }  # fmt: skip


def empty_torch_row(precision: str, compiled: bool) -> Row:
    return row(f"{precision}-torch{'.compile' if compiled else ''}", precision, "torch")


def torch_row(source: Path, component: str, probes: Path, device: str, precision: str, compiled: bool) -> Row:
    """torch itself, eager or compiled. `probes`: a file of `write_probes`."""
    from ldm_deploy.eval.budget import load_budget
    from ldm_deploy.eval.parity import compare_outputs, read_probes
    from ldm_deploy.eval.worker import open_module

    made = empty_torch_row(precision, compiled)
    note(f"{component}: {made['name']}")
    spec = {"kind": "module", "path": str(source), "component": component, "precision": precision,
            "device": device, "compile": compiled}  # fmt: skip
    start = time.monotonic()
    try:
        limit = load_budget(None).parity_limit(precision, component)
        # Compiled for the size that is timed: every further one is compiled anew.
        result = compare_outputs(open_module(spec), read_probes(probes)[: 1 if compiled else None], limit)
    except Exception as error:  # of torch's compiler, whatever it is
        lines = str(error).splitlines() or [type(error).__name__]
        return made | {"status": "failed", "reason": lines[0]}
    made |= {"parity": result.to_dict(), "build_s": time.monotonic() - start, "spec": spec}
    return made if result.reason is None else made | {"status": "failed", "reason": result.reason, "spec": None}


def engine_row(source: Path, component: str, target_name: str, precision: str, folder: Path, threads: int) -> Row:
    """An engine of a target in a precision, built here."""
    from ldm_deploy.export.export import export_source
    from ldm_deploy.export.targets import TARGETS

    target = TARGETS[target_name]
    made, out = row(f"{precision}-{target_name}", precision, target.runtime), folder / target_name / precision
    absent = [name for name, version in tool_versions(*target.packages).items() if version == "absent"]
    if absent:
        return made | {"status": "not measured", "reason": f"{absent[0]} is not installed"}
    note(f"{component}: {made['name']}")
    start = time.monotonic()
    try:
        bundle = export_source(source, out / component, variants=[(precision, target_name)], components=[component],
                               threads=threads)  # fmt: skip
    except LdmDeployError as error:
        return made | {"status": "not measured", "reason": str(error)}
    (engine,) = bundle.data["engines"]
    made |= {key: engine[key] for key in ("size_bytes", "precision_found", "parity")}
    spec = {"kind": "engine", "bundle": str(out / component), "engine": engine["id"]}
    return made | {"build_s": time.monotonic() - start, "spec": spec}


def work_of(source: Path, component: str, device: str, folder: Path, threads: int) -> list[Work]:
    """All rows of a component, in order: what stands there if it cannot be had, the function that makes it, and its
    arguments."""
    from ldm_deploy.eval.parity import write_probes
    from ldm_deploy.export.probes import make_probes
    from ldm_deploy.export.targets import TARGETS
    from ldm_deploy.models.sources import load_source

    probes = folder / f"{component}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if not probes.is_file():  # minutes of a slow processor
        write_probes(probes, make_probes(load_source(source), components=[component])[component])
    work: list[Work] = []
    for precision, compiled in TORCH_ROWS:
        given = (source, component, probes, device, precision, compiled)
        work.append((empty_torch_row(precision, compiled), torch_row, given))
    for target in TARGETS.values():
        for precision in target.precisions if target.device == device else ():
            empty = row(f"{precision}-{target.name}", precision, target.runtime)
            work.append((empty, engine_row, (source, component, target.name, precision, folder, threads)))
    return work


def build_all(work: Mapping[str, list[Work]], jobs: int, limit_s: float) -> dict[str, list[Row]]:
    """The rows by component, `jobs` at once, as compilers keep few processors busy. First comes torch as it is, which
    the others are compared with, last torch.compile, which is no engine."""

    def turn(made: Row) -> int:
        return 0 if made["name"].endswith("-torch") else 2 if made["name"].endswith(".compile") else 1

    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(CORES_PER_BUILD))  # or one for every core, each time
    end = time.monotonic() + limit_s
    entries = [(key, index, *entry) for key, rows in work.items() for index, entry in enumerate(rows)]
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            (key, index): pool.submit(isolated, empty, end, function, given)
            for key, index, empty, function, given in sorted(entries, key=lambda entry: turn(entry[2]))
        }
    return {key: [futures[key, index].result() for index in range(len(rows))] for key, rows in work.items()}


def isolated(empty: Row, end: float, function: Callable[..., Row], arguments: tuple[Any, ...]) -> Row:
    """`function(*arguments)` in a process of its own: what crashes or never ends there is a row, not the end of all."""
    late = empty | {"status": "not measured", "reason": "not built within --build-limit"}
    if time.monotonic() > end:
        return late
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(max(0.0, end - time.monotonic())):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(cast(int, process.pid), signal.SIGKILL)  # compilers have processes of their own
            process.kill()
            return late
        found: Row = receiver.recv()
    except EOFError:
        process.join()
        return empty | {"status": "failed", "reason": f"its process ended with code {process.exitcode}"}
    finally:
        process.join()
    return found


def _send(sender: Connection, function: Callable[..., Row], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    faulthandler.enable()
    sender.send(function(*arguments))


def measure(rows: list[Row], component: str, probes: Path, rounds: int) -> list[Row]:
    """Time what was built. Without the first row, what torch itself does, there is nothing to compare with."""
    from ldm_deploy.eval.latency import compare_engines
    from ldm_deploy.eval.measure import component_feeds
    from ldm_deploy.eval.parity import read_probes

    baseline = rows[0]
    if baseline["spec"] is None:
        for made in rows:
            if made["status"] == "ok":
                made |= {"status": "not measured", "reason": f"there is no {baseline['name']} to compare with"}
            del made["spec"]
        return rows
    specs = {made["name"]: made["spec"] for made in rows if made["spec"] is not None}
    feeds = component_feeds(component, read_probes(probes))
    found = compare_engines(specs, feeds, rounds=rounds, time_limit_s=20.0 * len(specs))
    for made in rows:
        name = made["name"]
        made["latency_ms"], made["speedup"] = found["latency_ms"].get(name), found["speedup"].get(name)
        if name in found["failed"]:
            made |= {"status": "failed", "reason": found["failed"][name]}
        del made["spec"]
    return rows


def to_markdown(report: dict[str, Any]) -> str:
    """The tables, with their conditions."""
    machine, versions = report["machine"], report["versions"]
    lines = [
        f"{report['device']}: {report['device_name']}; {machine['cpu']}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")
        + f". Not installed: {', '.join(name for name, version in versions.items() if version == 'absent') or 'none'}.",
        "Latency with the copies to and from the device, median (5 % to 95 %); speed against torch fp32 (TF32 off) of "
        "the same rounds, 95 % interval.",
    ]
    for key, rows in report["components"].items():
        lines += ["", f"### {key}", "", "| row | ms | speed | relative error | computes in | MB | build s |"]
        lines += ["|---|---:|---:|---:|---|---:|---:|"]
        for made in rows:
            lines.append(f"| {made['name']} | {' | '.join(_cells(made))} |")
    return "\n".join(lines) + "\n"


def _cells(made: Row) -> list[str]:
    if made["status"] != "ok":
        return [f"{made['status']}: {made['reason']}".replace("|", "/"), "", "", "", "", ""]
    latency, speedup, parity = made["latency_ms"], made["speedup"], made["parity"]
    error = parity["relative_error"]
    wrong = "" if parity["passed"] else f" **above {parity['limit']:g}**"
    return [
        f"{latency['median']:.2f} ({latency['p5']:.2f}–{latency['p95']:.2f})",
        "1" if speedup is None else f"{speedup['median']:.2f} ({speedup['ci95_low']:.2f}–{speedup['ci95_high']:.2f})",
        ("not finite" if error is None else f"{error:.1e}") + wrong,
        ", ".join(f"{count} {name}" for name, count in (made["precision_found"] or {}).items()) or "as asked",
        "" if made["size_bytes"] is None else f"{made['size_bytes'] / 1e6:.1f}",
        "" if made["build_s"] is None else f"{made['build_s']:.0f}",
    ]


def device_name(device: str) -> str | None:
    """None where there is no such device."""
    import torch

    if device == "cpu":
        return "the processor"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def run(models: list[str], device: str, out: Path, rounds: int, build_limit_s: float) -> dict[str, Any]:
    """Measure what `out`/gpu.json does not have yet; writes it after every component."""
    from ldm_deploy.eval.machine import machine, usable_threads
    from ldm_deploy.models.sources import resolve_source

    file = out / "gpu.json"
    conditions = {"format": 1, "device": device, "device_name": device_name(device), "machine": machine(),
                  "versions": tool_versions(*PACKAGES)}  # fmt: skip
    report: dict[str, Any] = {**conditions, "components": {}}
    if file.is_file():
        earlier = json.loads(file.read_text("utf-8"))
        if all(earlier.get(key) == conditions[key] for key in ("device_name", "versions")):
            report["components"] = earlier["components"]
    jobs = max(1, usable_threads() // CORES_PER_BUILD)
    work: dict[str, list[Work]] = {}
    probes: dict[str, Path] = {}
    for model in models:
        source, folder = model_71m(out / "71m") if model == "71m" else resolve_source(model), out / "engines" / model
        for component in COMPONENTS:
            key = f"{component} of {model}"
            if key not in report["components"]:
                work[key] = work_of(source, component, device, folder, usable_threads() // jobs)
                probes[key] = folder / f"{component}.safetensors"
    for key, rows in build_all(work, jobs, build_limit_s).items():
        report["components"][key] = measure(rows, key.partition(" ")[0], probes[key], rounds)
        atomic_write_json(file, report)
        atomic_write_bytes(out / "gpu.md", to_markdown(report).encode())
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["reference", "71m"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this command out")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--build-limit", type=float, default=1200.0, metavar="S", help="seconds for all")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    given = parser.parse_args()
    if device_name(given.device) is None:
        print("error: not measured: torch finds no NVIDIA GPU here; run it on a machine that has one", file=sys.stderr)
        return 4
    print(to_markdown(run(given.models, given.device, given.out, given.rounds, given.build_limit)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
