"""One component of the user's own, on the user's own inputs; and what is wrong with those is said in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ldm_deploy import progress
from ldm_deploy.errors import QuantizationError
from ldm_deploy.eval.parity import Probe, write_probes
from ldm_deploy.eval.studies import read_studies
from ldm_deploy.onnx_graph import load_model, read_signature
from ldm_deploy.quantize import candidates, cpu, onnxruntime_cpu, openvino_cpu
from ldm_deploy.quantize.calibration import Samples, read_arrays
from ldm_deploy.quantize.candidates import quantize_component
from ldm_deploy.quantize.onnxruntime_cpu import OnnxRuntimeKit
from ldm_deploy.quantize.openvino_cpu import OpenVinoKit
from ldm_deploy.quantize.quantize import quantize_bundle
from ldm_deploy.runtime.bundle import verify_bundle, write_bundle
from ldm_deploy.runtime.engines import OnnxRuntimeEngine
from tests.quantize.conftest import make_feeds

Made = Callable[..., Any]
RUNTIMES = ("onnxruntime", "openvino")


def stacked(count: int) -> dict[str, np.ndarray]:
    feeds = [make_feeds(seed) for seed in range(count)]
    return {name: np.concatenate([one[name] for one in feeds]) for name in feeds[0]}


def write_component(directory: Path, denoiser: Path, runtime: str) -> Path:
    """What `ldm-deploy export module:function --component vae_decoder` writes, without torch."""
    (directory / "engines").mkdir(parents=True)
    (directory / "probes").mkdir()
    files = ["engines/vae_decoder-fp32.onnx"]
    if runtime == "openvino":
        openvino = pytest.importorskip("openvino")
        pytest.importorskip("nncf")
        files = ["engines/vae_decoder-fp32.xml", "engines/vae_decoder-fp32.bin"]
        openvino.save_model(openvino.Core().read_model(denoiser), directory / files[0], compress_to_fp16=False)
    else:
        (directory / files[0]).write_bytes(denoiser.read_bytes())
    engine = OnnxRuntimeEngine(denoiser, threads=1)
    probes = [Probe(feeds, engine.run(feeds)) for feeds in (make_feeds(1), make_feeds(2, batch=3, height=4, width=20))]
    write_probes(directory / "probes" / "vae_decoder.safetensors", probes)
    inputs, outputs = ([value.to_dict() for value in values] for values in read_signature(load_model(denoiser)))
    record = {
        "id": f"vae_decoder-fp32-{runtime}-cpu", "component": "vae_decoder", "precision": "fp32", "runtime": runtime,
        "runtime_versions": ">=1", "device": "cpu", "built_for": None, "files": files, "inputs": inputs,
        "outputs": outputs, "size_bytes": 1, "precision_found": {"fp32": 8},
        "parity": {"relative_error": 0.0, "limit": 1e-4, "passed": True},
    }  # fmt: skip
    whole = dict.fromkeys(("model", "schedule", "tokenizer", "default_variant"))
    parents = {"module": "sha256:" + "1" * 64}
    data = {"format": 1, "name": "own", "created": "", "parents": parents, "engines": [record], "variants": []}
    write_bundle(directory, {**data, **whole, "refused": []})
    return directory


@pytest.fixture(params=RUNTIMES)
def component(request: pytest.FixtureRequest, tmp_path: Path, denoiser: Path) -> tuple[Path, str]:
    return write_component(tmp_path / "own", denoiser, request.param), f"{request.param}-cpu"


def plant(monkeypatch: pytest.MonkeyPatch, speed: float) -> None:
    def compare(specs: dict[str, Any], feeds: object, **options: object) -> dict[str, Any]:
        first = next(iter(specs))
        samples = {name: [1.0 if name == first else 1 / speed] * 8 for name in specs}
        samples |= {name: [1.0] * 8 for name in specs if name.startswith("bf16")}
        ratio = {"versus": first, "median": speed, "ci95_low": speed, "ci95_high": speed}
        return {"failed": {}, "samples_ms": samples, "speedup": dict.fromkeys(specs, ratio)}

    monkeypatch.setattr(candidates, "compare_engines", compare)


def test_it_is_quantized_on_its_own_inputs(
    component: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ldm_deploy_cli: Made
) -> None:
    plant(monkeypatch, 2.0)
    directory, target = component
    np.savez(tmp_path / "inputs.npz", **stacked(6))
    ran = ldm_deploy_cli(
        "quantize", directory, "--component", "vae_decoder", "--calibration", tmp_path / "inputs.npz", "--target",
        target, "--out", tmp_path / "out", "--threads", 1, "--quiet",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert f"vae_decoder-int8-{target} (" in ran.out
    data = verify_bundle(tmp_path / "out").data
    engine = data["engines"][-1]
    assert engine["precision_found"]["int8"] >= 1
    assert engine["parity"]["passed"]
    assert data["variants"] == []
    assert data["parents"] == {"module": "sha256:" + "1" * 64, "calibration": data["parents"]["calibration"]}


def test_a_slow_one_is_refused_with_exit_3_and_listed(
    component: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ldm_deploy_cli: Made
) -> None:
    plant(monkeypatch, 0.8)
    directory, target = component
    np.savez(tmp_path / "inputs.npz", **stacked(4))
    ran = ldm_deploy_cli(
        "quantize", directory, "--calibration", tmp_path / "inputs.npz", "--target", target, "--out", tmp_path / "out",
        "--threads", 1, "--quiet",
    )  # fmt: skip
    assert ran.code == 3, ran.err
    assert "is not faster than fp32: 0.80x (0.80 to 0.80)" in ran.out
    assert "no int8 engine keeps its limits" in ran.out
    verify_bundle(tmp_path / "out")


INPUTS = [
    {"name": "sample", "dtype": "float32", "shape": ["batch", 4, "height", "width"]},
    {"name": "timestep", "dtype": "int64", "shape": ["batch"]},
    {"name": "encoder_hidden_states", "dtype": "float32", "shape": ["batch", "sequence", 8]},
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sample": None},
            "has encoder_hidden_states, timestep; vae_decoder takes sample, timestep, enc.*one array for",
        ),
        ({"other": np.zeros(6)}, "has encoder_hidden_states, other, sample, timestep; vae_decoder takes"),
        (
            {"sample": np.zeros((6, 5, 8, 8), np.float32)},
            r"'sample' has shape \(6, 5, 8, 8\); .*takes \(samples, 4, he",
        ),
        ({"sample": np.zeros((6, 1, 4, 8, 8), np.float32)}, r"\(6, 1, 4, 8, 8\); .* each sample by itself"),
        ({"sample": np.zeros((6, 4, 8, 8), complex)}, "'sample' is complex128; vae_decoder takes float32"),
        ({"timestep": np.zeros(6)}, "'timestep' is float64; vae_decoder takes int64"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {name: value for name, value in (stacked(6) | change).items() if value is not None}
    np.savez(tmp_path / "inputs.npz", **arrays)
    with pytest.raises(QuantizationError, match=message):
        read_arrays(tmp_path / "inputs.npz", "vae_decoder", INPUTS, "")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({name: value[:0] for name, value in stacked(2).items()}, "no samples for vae_decoder"),
        (stacked(3) | {"sample": np.full((3, 4, 8, 12), 0.5, np.float32)}, "'sample' is 0.5 everywhere; a constant"),
        (
            stacked(3) | {"timestep": np.arange(2)},
            "'timestep' has 2 samples, others 2|'sample' has 3 samples, others 2",
        ),
        (stacked(3) | {"sample": np.full((3, 4, 8, 12), np.nan, np.float32)}, "'sample' is not finite in sample 0"),
    ],
)
def test_samples_that_say_nothing(denoiser: Path, tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    directory = write_component(tmp_path / "own", denoiser, "onnxruntime")
    np.savez(tmp_path / "inputs.npz", **arrays)
    with pytest.raises(QuantizationError, match=message):
        quantize_bundle(directory, tmp_path / "out", calibration=tmp_path / "inputs.npz")
    assert not (tmp_path / "out").exists()


def test_what_else_is_missing(denoiser: Path, tmp_path: Path) -> None:
    directory = write_component(tmp_path / "own", denoiser, "onnxruntime")
    with pytest.raises(QuantizationError, match=r"draws nothing to calibrate with; give real inputs: --calibration"):
        quantize_bundle(directory, tmp_path / "out")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(QuantizationError, match=r"text\.npz cannot be read .*; write it with np.savez"):
        quantize_bundle(directory, tmp_path / "out", calibration=tmp_path / "text.npz")
    with pytest.raises(
        QuantizationError, match=r"unet cannot be quantized: .* fp32 engines for onnxruntime-cpu of vae"
    ):
        quantize_bundle(directory, tmp_path / "out", components=["unet"])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_graph_of_ops_that_cannot_be_quantized_is_said(tmp_path: Path, runtime: str) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Tanh", ["x"], ["y"], "tanh")], "g", [value("x", TensorProto.FLOAT, ["batch", 4])],
        [value("y", TensorProto.FLOAT, ["batch", 4])],
    )  # fmt: skip
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    samples = Samples({"x": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)})
    probes = [Probe(feeds, OnnxRuntimeEngine(path, threads=1).run(feeds)) for feeds in samples]
    kit: Any = OnnxRuntimeKit(path, threads=1)
    if runtime == "openvino":
        openvino = pytest.importorskip("openvino")
        pytest.importorskip("nncf")
        openvino.save_model(openvino.Core().read_model(path), tmp_path / "g.xml", compress_to_fp16=False)
        kit = OpenVinoKit(tmp_path / "g.xml", threads=1)
    with pytest.raises(
        QuantizationError, match=r"has nothing that a recipe could quantize|NNCF cannot quantize g\.xml"
    ):
        quantize_component("unet", kit, tmp_path / "candidates", samples, probes, 0.1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_without_vnni_weights_have_seven_bits_and_it_is_said(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runtime: str
) -> None:
    plant(monkeypatch, 2.0)
    progress.set_quiet(False)
    for module in (onnxruntime_cpu, openvino_cpu, cpu):
        monkeypatch.setattr(module, "has_vnni", lambda: False)
    directory = write_component(tmp_path / "own", denoiser, runtime)
    np.savez(tmp_path / "inputs.npz", **stacked(4))
    data = quantize_bundle(
        directory, tmp_path / "out", target=f"{runtime}-cpu", calibration=tmp_path / "inputs.npz", threads=1
    ).data
    engine = data["engines"][-1]
    assert engine["recipe"]["reduce_range"] is True
    assert "this CPU has no VNNI" in capsys.readouterr().err
    largest = 0
    if runtime == "openvino":
        openvino = pytest.importorskip("openvino")
        for node in openvino.Core().read_model(tmp_path / "out" / engine["files"][0]).get_ops():
            if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i8:
                largest = max(largest, int(np.abs(node.data.astype(int)).max()))
    else:
        for tensor in load_model(tmp_path / "out" / engine["files"][0]).graph.initializer:
            if tensor.data_type == TensorProto.INT8:
                largest = max(largest, int(np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max()))
    assert 32 < largest <= 64


# A sample is 4 MiB: those of the longer run, kept, would be seen beside the libraries.
MEASURE = """
import sys
from pathlib import Path
import numpy as np
from ldm_deploy.eval.memory import peak_memory_bytes
from ldm_deploy.quantize.calibration import Samples
from ldm_deploy.quantize.onnxruntime_cpu import observe_graph
from ldm_deploy.quantize.openvino_cpu import quantize_file
from ldm_deploy.quantize.scheme import OpenVinoRecipe
path, runtime, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rng = np.random.default_rng(0)
class Drawn(Samples):
    def __init__(self): pass
    def __len__(self): return count
    def __iter__(self):
        for _ in range(count):
            yield {"sample": rng.standard_normal((1, 4, 512, 512), np.float32), "timestep": rng.integers(0, 1000, 1),
                   "encoder_hidden_states": rng.standard_normal((1, 5, 8), np.float32)}
if runtime == "onnxruntime":
    observe_graph(path, Drawn(), threads=1)
else:
    quantize_file(path, path.with_name("q.xml"), Drawn(), OpenVinoRecipe(smooth_quant_alpha=0.5))
print(peak_memory_bytes())
"""


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_samples(denoiser: Path, tmp_path: Path, runtime: str) -> None:
    path = tmp_path / "unet.onnx"
    path.write_bytes(denoiser.read_bytes())
    if runtime == "openvino":
        openvino = pytest.importorskip("openvino")
        pytest.importorskip("nncf")
        openvino.save_model(openvino.Core().read_model(path), tmp_path / "unet.xml", compress_to_fp16=False)
        path = tmp_path / "unet.xml"

    def peak(count: int) -> int:
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), runtime, str(count)], capture_output=True, text=True, check=True
        )
        return int(ran.stdout.splitlines()[-1])

    assert peak(40) < 1.1 * peak(4)


def test_a_bundle_that_was_searched_says_it_for_a_component_too(
    denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No images: outputs on the probes stand for them, and there is no sensitivity.json, which is about images."""
    from ldm_deploy.quantize import mixed

    plant(monkeypatch, 2.0)
    monkeypatch.setattr(mixed, "compare_engines", candidates.compare_engines)
    directory = write_component(tmp_path / "own", denoiser, "onnxruntime")
    np.savez(tmp_path / "inputs.npz", **stacked(4))
    quantize_bundle(directory, tmp_path / "out", calibration=tmp_path / "inputs.npz", builds=3, threads=1)
    studies = read_studies(tmp_path / "out")
    assert set(studies) == {"search"}
    (search,) = studies["search"]["searches"]
    assert search["psnr_db_min"] == pytest.approx(20.0)  # the parity limit of 0.1
    assert search["measured"]
