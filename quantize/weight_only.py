"""Weights in 8 or 4 bits, arithmetic as before: for where memory and download size count, not speed.

`w8`: every weight, symmetric, a scale per output channel. `w4`: products' weights in blocks of 32 with a scale each
(block-wise as in Frantar et al. 2022, arXiv:2210.17323, section 4, rounded to nearest), all others as in `w8`. ONNX
Runtime multiplies 4-bit products as they are stored (MatMulNBits); what it holds in 8 bits it widens when it loads.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.errors import ConfigError, QuantizationError
from ldm_deploy.eval.latency import compare_engines
from ldm_deploy.eval.parity import compare_outputs, explain, read_probes
from ldm_deploy.onnx_graph import load_model
from ldm_deploy.quantize.openvino_cpu import _import_nncf, _silent
from ldm_deploy.quantize.qdq import select_nodes, store_weights
from ldm_deploy.quantize.scheme import Recipe
from ldm_deploy.runtime.bundle import EngineRecord, read_bundle, write_bundle
from ldm_deploy.runtime.engines import open_engine

if TYPE_CHECKING:
    from ldm_deploy.eval.budget import Budget
    from ldm_deploy.runtime.bundle import Bundle

PRECISIONS = ("w8", "w4")
BLOCK = 32
SMALLEST = 1024  # values; what has fewer stays as it is
LARGEST_SHARE = 0.9  # of the fp32 engine's size: an engine that is not clearly smaller has no use
TIME_LIMIT_S = 8.0


def quantize_weights(
    source: Path,
    out: Path,
    *,
    precision: str,
    target: str,
    budget: Budget,
    components: Sequence[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> Bundle:
    """Copy the bundle `source` to `out` and add engines whose weights alone are narrower; no calibration.

    An engine that is not the reference, or not smaller, is in `refused` with the reason. Its speed against fp32 is
    measured and told, and is no reason. New variant: `<precision>-<target>`, other components as in fp32.
    """
    from ldm_deploy.artifact import staged_directory
    from ldm_deploy.progress import task

    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown; allowed: int8, {', '.join(PRECISIONS)}")
    bundle = read_bundle(source)
    records = {
        record["component"]: record
        for record in bundle.data["engines"]
        if record["precision"] == "fp32" and f"{record['runtime']}-{record['device']}" == target
    }
    wanted = list(components or records)
    missing = next((name for name in wanted if name not in records), None)
    if missing is not None or not wanted:
        raise QuantizationError(
            f"{missing or 'nothing'} cannot be quantized: bundle {source} has fp32 engines for {target} of "
            f"{', '.join(records) or 'nothing'}; export it with --target {target}"
        )
    made: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    with staged_directory(out) as staging, task(f"{precision} for {target}", len(wanted)) as advance:
        for file in bundle.data["files"]:
            (staging / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, staging / file)
        for name in wanted:
            entry, reason = _engine(records[name], precision, target, staging, budget, seed, threads)
            if reason is None:
                made.append(entry)
            else:
                for file in entry["files"]:
                    (staging / file).unlink()
                kept = ("component", "runtime", "device", "precision", "parity", "speedup", "size_bytes")
                refused.append({"name": entry["id"], "reason": reason, **{key: entry[key] for key in kept}})
            advance()
        content = {**bundle.data, "engines": [*bundle.data["engines"], *made]}
        content["refused"] = [*bundle.data.get("refused", []), *refused]
        base = next((one for one in bundle.data["variants"] if one["name"] == f"fp32-{target}"), None)
        if base is not None and made:
            swapped = {records[entry["component"]]["id"]: entry["id"] for entry in made}
            engines = [swapped.get(name, name) for name in base["engines"]]
            content["variants"] = [
                *bundle.data["variants"],
                {**base, "name": f"{precision}-{target}", "engines": engines},
            ]
        write_bundle(staging, content)
    return read_bundle(out)


def _engine(
    record: Mapping[str, Any],
    precision: str,
    target: str,
    root: Path,
    budget: Budget,
    seed: int,
    threads: int | None,
) -> tuple[dict[str, Any], str | None]:
    """(entry of bundle.json, why it is refused or None). The files lie in `root`."""
    component = record["component"]
    before = root / record["files"][0]
    stem = f"{component}-{precision}"
    if record["runtime"] == "openvino":
        files = openvino_weights(before, root / "engines" / f"{stem}-openvino.xml", precision)
    else:
        files = onnxruntime_weights(before, root / "engines" / f"{stem}.onnx", precision)
    entry = {
        **record,
        "id": f"{component}-{precision}-{target}",
        "precision": precision,
        "files": [file.relative_to(root).as_posix() for file in files],
        "size_bytes": sum(file.stat().st_size for file in files),
        "weights_found": stored_weights(files[0]),
    }
    fields = {name: entry[name] for name in EngineRecord.__dataclass_fields__ if name in entry}
    fields |= {name: tuple(fields[name]) for name in ("files", "inputs", "outputs")}
    engine = open_engine(EngineRecord(**fields), root, threads=threads)
    probes = read_probes(root / "probes" / f"{component}.safetensors")
    parity = compare_outputs(engine, probes, budget.parity_limit(precision, component))
    specs = {
        f"{which['precision']}-{target}": {
            "kind": "engine", "runtime": record["runtime"], "path": str(root / which["files"][0]),
            "precision": which["precision"],
        }
        for which in (record, entry)
    }  # fmt: skip
    measured = compare_engines(specs, probes[0].inputs, threads=threads, seed=seed, time_limit_s=TIME_LIMIT_S)
    entry |= {"parity": parity.to_dict(), "speedup": measured["speedup"].get(f"{precision}-{target}")}
    if not parity.passed:
        return entry, explain(parity, component, entry["id"])
    share = entry["size_bytes"] / sum((root / file).stat().st_size for file in record["files"])
    if share > LARGEST_SHARE:
        return entry, (
            f"{component}: {entry['size_bytes']} bytes in {precision} are {share:.2f} times those in fp32, and "
            f"{LARGEST_SHARE} is asked for: its weights are few or small; the fp32 engine is used"
        )
    return entry, None


def onnxruntime_weights(model_path: Path, out_path: Path, precision: str) -> list[Path]:
    """Write the ONNX file with narrower weights; returns its files. Raises `QuantizationError` if it has none."""
    import onnx

    model = load_model(model_path)
    nodes = select_nodes(model, Recipe(op_types=("Conv", "MatMul", "Gemm"), min_channels=1))
    if precision == "w4":
        model = _in_blocks(model, [node.name for node in nodes if node.op_type == "MatMul" and node.name])
        nodes = select_nodes(model, Recipe(op_types=("Conv", "MatMul", "Gemm"), min_channels=1))
    store_weights(model, nodes, SMALLEST)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    large = model.ByteSize() > 2**31 - 2**24
    onnx.save(model, str(out_path), save_as_external_data=large, location=f"{out_path.name}.data" if large else None)
    if not set(stored_weights(out_path)) & {"int8", "int4"}:
        raise QuantizationError(f"{model_path.name} has no weights of {SMALLEST} values or more; use the fp32 engine")
    return [file for file in (out_path, out_path.with_name(f"{out_path.name}.data")) if file.exists()]


def _in_blocks(model: Any, names: Sequence[str]) -> Any:
    """Replace products whose inner size is a multiple of the block by ONNX Runtime's MatMulNBits."""
    from onnx import numpy_helper
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    shapes = {tensor.name: numpy_helper.to_array(tensor).shape for tensor in model.graph.initializer}
    fitting = [
        node.name
        for node in model.graph.node
        if node.name in names and shapes[node.input[1]][0] % BLOCK == 0 and _size(shapes[node.input[1]]) >= SMALLEST
    ]
    if not fitting:
        return model
    quantizer = MatMulNBitsQuantizer(
        model, bits=4, block_size=BLOCK, is_symmetric=True, accuracy_level=4, nodes_to_include=fitting
    )
    quantizer.process()
    return quantizer.model.model


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def openvino_weights(model_path: Path, out_path: Path, precision: str) -> list[Path]:
    """Write the OpenVINO file with narrower weights; returns its files. Raises `QuantizationError` with the reason."""
    import openvino

    nncf = _import_nncf()
    modes = nncf.CompressWeightsMode
    options: dict[str, Any] = {"mode": modes.INT8_SYM}
    if precision == "w4":
        adjust = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        options = {"mode": modes.INT4_SYM, "ratio": 1.0, "group_size": BLOCK, "advanced_parameters": adjust}
    try:
        with _silent():
            model = nncf.compress_weights(openvino.Core().read_model(model_path), **options)
    except (RuntimeError, nncf.ValidationError, nncf.InternalError, nncf.UnsupportedModelError) as error:
        reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
        raise QuantizationError(f"NNCF cannot narrow the weights of {model_path.name}: {reason}") from None
    openvino.save_model(model, out_path, compress_to_fp16=False)
    if not set(stored_weights(out_path)) & {"int8", "int4"}:
        raise QuantizationError(f"{model_path.name} has no weights that NNCF narrows; use the fp32 engine")
    return [out_path, out_path.with_suffix(".bin")]


def stored_weights(path: Path) -> dict[str, int]:
    """How many values of weights a file stores in which type, read back from it."""
    found: Counter[str] = Counter()
    if path.suffix == ".xml":
        import openvino

        names = {"i8": "int8", "u8": "int8", "i4": "int4", "u4": "int4", "f32": "fp32", "f16": "fp16", "bf16": "bf16"}
        for node in openvino.Core().read_model(path).get_ops():
            if node.get_type_name() == "Constant":
                kind = node.get_element_type().get_type_name()
                if kind in names:
                    found[names[kind]] += _size(list(node.get_output_shape(0)))
    else:
        from onnx import TensorProto

        model = load_model(path)
        packed = {node.input[1] for node in model.graph.node if node.op_type == "MatMulNBits"}
        kinds = {TensorProto.FLOAT: "fp32", TensorProto.INT8: "int8", TensorProto.UINT8: "int8"}
        for tensor in model.graph.initializer:
            if tensor.name in packed:
                found["int4"] += 2 * _size(tensor.dims)  # two to a byte
            elif tensor.data_type in kinds:
                found[kinds[tensor.data_type]] += _size(tensor.dims)
    return {name: count for name, count in sorted(found.items()) if count}
