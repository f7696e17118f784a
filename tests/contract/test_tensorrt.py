"""What we ask of TensorRT exists, in 10.13 and in 11.4: our code runs against NVIDIA's own Python bindings.

The bindings are fetched into a temporary folder; the libraries they want are stood in for by empty ones. Every class,
method, signature, property and enum member is read from them, and our code is run on a module that has nothing else.
That proves that the API is used as it is, not that an engine works.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ldm_deploy.cache import user_cache
from ldm_deploy.errors import ConfigError, EngineError, ExportError
from ldm_deploy.eval.parity import Probe
from ldm_deploy.export import to_tensorrt as module
from ldm_deploy.export.targets import choose_target
from ldm_deploy.export.to_tensorrt import TensorRtOptions, count_precisions, to_tensorrt
from ldm_deploy.export.traced import Traced
from ldm_deploy.runtime import engine_tensorrt
from ldm_deploy.runtime.engine_tensorrt import TensorRtEngine, check_built_for
from tests.contract.simulated import simulate
from tests.tiny_bundle import tiny_models

VERSIONS = {"10.13": "10.13.3.9", "11.4": "11.4.0.106"}
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
LAYERS = {"Layers": [
    {"Name": "a", "LayerType": "CaskConvolution", "Outputs": [{"Name": "x", "Format/Datatype": "Half"}]},
    {"Name": "b", "LayerType": "gemm", "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP16/Half"}]},
    {"Name": "c", "LayerType": "Reformat", "Outputs": [{"Name": "z", "Format/Datatype": "Float"}]},
]}  # fmt: skip
HERE = {"gpu": "A GPU", "compute_capability": "9.0"}


@pytest.fixture(scope="module", params=VERSIONS)
def description(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The API of one version."""
    version = VERSIONS[request.param]
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("not checked: stand-ins for TensorRT's libraries need gcc on Linux")
    folder = tmp_path_factory.mktemp("tensorrt")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    fetched = subprocess.run(
        [*command, "--target", str(folder), f"tensorrt_cu13_bindings=={version}"], capture_output=True, text=True
    )
    if fetched.returncode:
        pytest.skip(f"not checked: TensorRT's bindings {version} cannot be fetched")
    major = version.partition(".")[0]
    source = folder / "empty.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in FUNCTIONS))
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = f"lib{name}.so.{major}"
        subprocess.run(
            [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source], check=True
        )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
    script = Path(__file__).with_name("describe_bindings.py")
    told = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    found: dict[str, Any] = json.loads(told.stdout)
    assert found["version"] == version
    return found


ANSWERS: dict[str, Any] = {
    "OnnxParser.num_errors": 0,
    "Builder.build_serialized_network": b"plan",
    "ITimingCache.serialize": b"timings",
    "EngineInspector.get_engine_information": json.dumps(LAYERS),
}


def install(monkeypatch: pytest.MonkeyPatch, description: dict[str, Any], **answers: Any) -> Any:
    trt: ModuleType = simulate(description, {**ANSWERS, **{key.replace("__", "."): v for key, v in answers.items()}})
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr("ldm_deploy.runtime.cuda.device_properties", lambda: dict(HERE))
    monkeypatch.setattr(engine_tensorrt, "device_properties", lambda: dict(HERE))
    return trt


SHAPES = {"sample": ((1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 32, 32))}


def build(tmp_path: Path, options: TensorRtOptions | None = None) -> dict[str, Any]:
    return to_tensorrt(tmp_path / "unet.onnx", tmp_path / "unet.plan", SHAPES, options)


def test_a_build_uses_what_is_there(
    monkeypatch: pytest.MonkeyPatch, description: dict[str, Any], tmp_path: Path
) -> None:
    trt = install(monkeypatch, description)
    cache = tmp_path / "timings"
    options = TensorRtOptions(2**30, cache, True, True, True, True)
    found = build(tmp_path, options)
    assert found["precision_found"] == {"fp16": 2}
    assert found["built_for"] == {
        "tensorrt": description["version"], **HERE, "version_compatible": True, "hardware_compatible": True,
        "shapes": {"sample": [[1, 4, 8, 8], [2, 4, 16, 16], [4, 4, 32, 32]]},
    }  # fmt: skip
    assert (tmp_path / "unet.plan").read_bytes() == b"plan"
    assert cache.read_bytes() == b"timings"
    calls = dict(trt.calls)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert calls["Builder.create_network"] == (typed,)
    assert calls["IBuilderConfig.clear_flag"] == (trt.BuilderFlag.TF32,)
    assert calls["IOptimizationProfile.set_shape"] == ("sample", *SHAPES["sample"])
    flags = [arguments[0].name for name, arguments in trt.calls if name == "IBuilderConfig.set_flag"]
    assert flags == ["REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE"]


def test_options_are_typed_as_words(
    monkeypatch: pytest.MonkeyPatch, description: dict[str, Any], tmp_path: Path
) -> None:
    """From the words of the command line to the files of an engine: a stripped plan has its weights beside it."""
    trt = install(monkeypatch, description)
    folder = tmp_path / "traced"
    folder.mkdir()
    (folder / "unet-fp32.onnx").write_bytes(tiny_models()["unet"].SerializeToString())
    traced = Traced(
        None, [Probe({"sample": np.zeros((2, 4, 8, 8), np.float32)}, {})], ({}, {}), "unet", {}, folder,
        {"fp32": folder / "unet-fp32.onnx"},
    )  # fmt: skip
    (tmp_path / "engines").mkdir()
    target = choose_target("tensorrt-cuda", "fp32", ["strip-plan", "refit", "workspace=1.5GB"])
    built = target.build(traced, "fp32", tmp_path / "engines" / "unet-fp32")
    assert [file.name for file in built.files] == ["unet-fp32.plan", "unet-fp32.onnx"]
    assert built.files[1].read_bytes() == (folder / "unet-fp32.onnx").read_bytes()
    flags = {arguments[0].name for name, arguments in trt.calls if name == "IBuilderConfig.set_flag"}
    assert flags == {"REFIT", "STRIP_PLAN"}
    pools = [arguments for name, arguments in trt.calls if name == "IBuilderConfig.set_memory_pool_limit"]
    assert pools == [(trt.MemoryPoolType.WORKSPACE, 1_500_000_000)]
    timings = user_cache().compiled("tensorrt")
    assert timings is not None
    assert (timings / "timings").read_bytes() == b"timings"


def test_an_option_that_is_not_there_is_refused() -> None:
    for words, message in (
        (["refits"], "option 'refits' is unknown; TensorRT has hardware-compatible, refit, strip-plan"),
        (["workspace=lots"], "option 'workspace=lots' is unknown"),
        (["workspace"], "option 'workspace' is unknown"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_target("tensorrt-cuda", "fp32", words)
    with pytest.raises(ConfigError, match="option 'refit' is for tensorrt-cuda; openvino-cpu has none"):
        choose_target("openvino-cpu", "fp32", ["refit"])


def test_what_the_parser_refuses_is_named(
    monkeypatch: pytest.MonkeyPatch, description: dict[str, Any], tmp_path: Path
) -> None:
    install(
        monkeypatch, description, OnnxParser__parse_from_file=False, OnnxParser__num_errors=1,
        ParserError__node_name="node_conv_3", ParserError__node_operator="Conv", ParserError__desc="no such padding",
    )  # fmt: skip
    with pytest.raises(ExportError, match=r"unet: TensorRT cannot read .*: node node_conv_3 \(Conv\): no such padding"):
        build(tmp_path)
    install(monkeypatch, description, Builder__build_serialized_network=None)
    with pytest.raises(ExportError, match="unet: TensorRT built no engine: it gave no reason"):
        build(tmp_path)
    assert not (tmp_path / "unet.plan").exists()


class Pointers:
    """CUDA's runtime as far as an engine uses it, with the names of the real one."""

    def __init__(self) -> None:
        import cuda.bindings.runtime as real

        self.real, self.memory, self.log = real, {}, []
        self.cudaMemcpyKind, self.cudaStreamCaptureMode = real.cudaMemcpyKind, real.cudaStreamCaptureMode

    def __getattr__(self, name: str) -> Any:
        assert hasattr(self.real, name), f"CUDA has no {name}"

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.log.append(name)
            success = self.real.cudaError_t.cudaSuccess
            gives = {"cudaMalloc": 4096 + len(self.log), "cudaStreamCreate": 7, "cudaStreamEndCapture": "recorded",
                     "cudaGraphInstantiate": "graph"}  # fmt: skip
            return (success, gives[name]) if name in gives else (success,)

        return call


class Kind:
    name = "FLOAT"


def test_an_engine_uses_what_is_there(
    monkeypatch: pytest.MonkeyPatch, description: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("cuda.bindings.runtime")
    trt = install(
        monkeypatch, description,
        ICudaEngine__num_io_tensors=2, ICudaEngine__get_tensor_name=lambda index: ("sample", "prediction")[index],
        ICudaEngine__get_tensor_dtype=lambda name: Kind(), IExecutionContext__get_tensor_shape=lambda name: (2, 4),
    )  # fmt: skip
    modes = {"sample": trt.TensorIOMode.INPUT, "prediction": trt.TensorIOMode.OUTPUT}
    trt.ICudaEngine.answers["ICudaEngine.get_tensor_mode"] = modes.__getitem__
    pointers = Pointers()
    monkeypatch.setattr(engine_tensorrt, "runtime", lambda: pointers)
    (tmp_path / "unet.plan").write_bytes(b"plan")
    (tmp_path / "unet.onnx").write_bytes(b"weights")
    needs = {"tensorrt": description["version"], **HERE, "version_compatible": True}
    engine = TensorRtEngine([tmp_path / "unet.plan", tmp_path / "unet.onnx"], needs)
    for _ in range(3):
        outputs = engine.run({"sample": np.zeros((2, 4), np.float32)})
    assert {name: value.shape for name, value in outputs.items()} == {"prediction": (2, 4)}
    assert [pointers.log.count(name) for name in ("cudaMalloc", "cudaStreamBeginCapture", "cudaGraphLaunch")] == [
        2,
        1,
        2,
    ]
    assert [name for name, _ in trt.calls].count("IExecutionContext.execute_async_v3") == 2  # plain, and recorded
    trt.ICudaEngine.answers["IExecutionContext.set_input_shape"] = False
    trt.ICudaEngine.answers["ICudaEngine.get_tensor_profile_shape"] = [(1, 4), (2, 4), (3, 4)]
    with pytest.raises(EngineError, match=r"sample of shape \(9, 4\); it was built for \(1, 4\) to \(3, 4\)"):
        engine.run({"sample": np.zeros((9, 4), np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensorrt": "1.2.3"}, "was built with TensorRT 1.2.3 and"),
        ({"gpu": "Another GPU"}, "was built on a Another GPU and this is A GPU"),
        ({"compute_capability": "8.0"}, "was built for compute capability 8.0 and this is 9.0"),
    ],
)
def test_a_wrong_engine_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    needs = {"tensorrt": "11.4.0.106", **HERE}
    check_built_for("unet-fp16", needs, {"tensorrt": "11.4.0.106", **HERE})
    with pytest.raises(EngineError, match=f"engine unet-fp16 {message}.*build it again here, or choose the portable"):
        check_built_for("unet-fp16", {**needs, **change}, {"tensorrt": "11.4.0.106", **HERE})


def test_a_compatible_engine_goes_where_it_may() -> None:
    found = {"tensorrt": "11.4.0.106", **HERE}
    old = {"tensorrt": "11.1.0.5", "gpu": "Another GPU", "compute_capability": "8.0"}
    check_built_for("unet", {**old, "version_compatible": True, "hardware_compatible": True}, found)
    with pytest.raises(EngineError, match=r"TensorRT 12.0 and 11.4.0.106 is installed"):
        check_built_for("unet", {**old, "tensorrt": "12.0", "version_compatible": True}, found)


def test_the_simulation_catches_what_is_not_there(monkeypatch: pytest.MonkeyPatch, description: dict[str, Any]) -> None:
    trt = install(monkeypatch, description)
    builder = trt.Builder(module.make_log(trt))
    for wrong, message in (
        (lambda: trt.IInt8EntropyCalibrator9, "no 'IInt8EntropyCalibrator9'"),
        (lambda: builder.build_cuda_engine(1), "no Builder.build_cuda_engine"),
        (lambda: builder.create_network("typed"), "Builder.create_network does not take"),
        (lambda: builder.create_builder_config(1), "does not take"),
        (lambda: setattr(builder.create_builder_config(), "max_workspace_size", 1), "does not let"),
        (lambda: trt.Builder(), "Builder.__init__ does not take"),
    ):
        with pytest.raises(AssertionError, match=message):
            wrong()  # type: ignore[no-untyped-call]
    if description["version"].startswith("11"):
        with pytest.raises(AttributeError):
            trt.BuilderFlag.FP16  # noqa: B018


def test_without_tensorrt_both_sides_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match=r"TensorRT is not installed .* pip install 'ldm-deploy\[tensorrt\]'"):
        build(tmp_path)
    with pytest.raises(EngineError, match="engine unet needs TensorRT, which is not installed"):
        TensorRtEngine([tmp_path / "unet.plan"], {})


def test_an_old_tensorrt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("tensorrt")
    old.__version__ = "10.12.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(ExportError, match=r"TensorRT is 10\.12\.0; this version builds with 10.13 and later"):
        build(tmp_path)


def test_precisions_are_counted_per_layer_that_multiplies() -> None:
    assert count_precisions(LAYERS) == {"fp16": 2}
    with pytest.raises(ExportError, match="without detailed verbosity"):
        count_precisions({"Layers": ["conv1"]})
