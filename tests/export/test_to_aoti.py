"""AOTInductor packages, compiled for the CPU and, where there is one, for a GPU: the same calls for both."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_deploy.errors import EngineError, ExportError
from ldm_deploy.eval.parity import compare_outputs
from ldm_deploy.export.foreign import ModuleEngine, make_probes
from ldm_deploy.export.to_aoti import find_compiler, to_aoti
from ldm_deploy.export.traced import Traced, read_module
from ldm_deploy.runtime.engine_torch import TorchEngine, torch_properties
from ldm_deploy.runtime.engines import OnnxRuntimeEngine

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("g++") is None, reason="not checked: AOTInductor needs g++, not found here"),
]
AXES = {"latent": {0: "batch", 2: "height", 3: "width"}, "timestep": {0: "batch"}}


class Net(nn.Module):
    """Two inputs, two outputs, a convolution, a linear layer, sizes that follow from the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 2, stride=2)
        self.time = nn.Linear(1, 8)

    def forward(self, latent: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        time = self.time(timestep[:, None].to(latent.dtype) / 1000)
        hidden = torch.nn.functional.silu(self.enter(latent) + time[:, :, None, None])
        return {"image": self.leave(hidden), "mean": hidden.mean(dim=(1, 2, 3))}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    torch.manual_seed(0)
    module = Net().eval().requires_grad_(False)
    inputs = {"latent": np.float32(np.random.default_rng(0).normal(size=(2, 4, 8, 6))), "timestep": np.array([3, 900])}
    probes = make_probes(ModuleEngine(module), inputs, AXES, "net")
    return Traced(module, probes, (AXES, {}), "unet", {}, tmp_path_factory.mktemp("traced"))


@pytest.fixture(scope="module", params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def package(traced: Traced, tmp_path_factory: pytest.TempPathFactory, device: str) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("aoti") / "unet-fp32.pt2"
    module = traced.module_in("fp32")
    try:
        return path, to_aoti(module, traced.probes[0].inputs, AXES, path, component="unet", device=device)
    finally:
        module.to("cpu")


def opened(path: Path, device: str, **needs: str) -> TorchEngine:
    built_for = {**torch_properties(device), **needs}
    return TorchEngine(path, "aoti", ["latent", "timestep"], ["image", "mean"], built_for, device=device)


def test_it_is_the_module_at_every_size(traced: Traced, package: tuple[Path, dict[str, Any]], device: str) -> None:
    result = compare_outputs(opened(package[0], device), traced.probes, 1e-5)
    assert result.passed
    assert len(traced.probes) == 4  # one size more for each of three symbols
    assert package[1] == {"precision_found": {"fp32": 3}, "built_for": torch_properties(device)}


def test_signature_without_a_graph(traced: Traced) -> None:
    inputs, outputs = read_module(traced)
    assert [(v.name, v.dtype, v.shape) for v in inputs] == [
        ("latent", "float32", ("batch", 4, "height", "width")),
        ("timestep", "int64", ("batch",)),
    ]
    assert [(v.name, v.shape) for v in outputs] == [("image", ("batch", 3, "image_2", "image_3")), ("mean", ("batch",))]


def test_another_torch_is_refused_by_name(package: tuple[Path, dict[str, Any]], device: str) -> None:
    with pytest.raises(EngineError, match=r"unet-fp32 was built with torch 2\.0\.0 and .* is installed"):
        opened(package[0], device, torch="2.0.0")


def test_a_damaged_package_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "unet.pt2").write_bytes(b"PK")
    with pytest.raises(EngineError, match=r"torch cannot load .*unet\.pt2: .*; build the engine again"):
        opened(tmp_path / "unet.pt2", "cpu")


def test_a_missing_input_is_named(package: tuple[Path, dict[str, Any]], device: str) -> None:
    with pytest.raises(EngineError, match="needs the input 'timestep'; given: latent"):
        opened(package[0], device).run({"latent": np.zeros((2, 4, 8, 8), np.float32)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_built_or_opened(
    traced: Traced, tmp_path: Path, package: tuple[Path, dict[str, Any]]
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: to_aoti(traced.module_in("fp32"), traced.probes[0].inputs, AXES, tmp_path / "x.pt2", component="unet"),
        lambda: TorchEngine(package[0], "aoti", ["latent", "timestep"], ["image", "mean"], torch_properties("cpu")),
    ]
    for call in calls:
        with pytest.raises(EngineError, match="torch finds no NVIDIA GPU here; choose a variant for the CPU"):
            call()
    assert not (tmp_path / "x.pt2").exists()


def test_what_cannot_be_traced_is_said(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, latent: Tensor) -> Tensor:
            return latent if latent.sum() > 0 else -latent

    with pytest.raises(ExportError, match=r"unet: torch.export failed: .*rewrite that part of forward"):
        to_aoti(
            Branching(),
            {"latent": np.zeros((2, 4), np.float32)},
            {},
            tmp_path / "x.pt2",
            component="unet",
            device="cpu",
        )


@pytest.fixture
def static_compiler(tmp_path: Path) -> Path:
    """As one that comes without libstdc++.so; what it makes crashes or throws `std::bad_cast` when it is loaded."""
    compiler = tmp_path / "static-g++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -static-libstdc++ "$@"\n', encoding="utf-8")
    compiler.chmod(0o755)
    return compiler


def test_a_compiler_with_a_standard_library_of_its_own_is_passed_over(
    static_compiler: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(static_compiler))
    assert find_compiler("unet") == shutil.which("g++")
    assert f"unet: {static_compiler} links its standard library into packages" in capfd.readouterr().err
    monkeypatch.delenv("CXX")
    assert find_compiler("unet") == shutil.which("g++")


def test_without_a_compiler_that_will_do_nothing_is_built(
    static_compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", str(static_compiler))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportError, match=r"unet: AOTInductor needs a C.* tried: .*static-g\+\+; install g"):
        find_compiler("unet")
    monkeypatch.delenv("CXX")
    with pytest.raises(ExportError, match="none of which is here; install g"):
        find_compiler("unet")


def test_onnxruntime_does_not_go_on_without_the_gpu(traced: Traced) -> None:
    """Asked for CUDA, it warns and runs on the CPU."""
    if "CUDAExecutionProvider" in __import__("onnxruntime").get_available_providers():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"ONNX Runtime finds no NVIDIA GPU here for .*; pip install"):
        OnnxRuntimeEngine(traced.graph("fp32"), device="cuda")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_library_of_cuda_that_is_not_there_is_named(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so.13\nFailed to load b"))
    with pytest.raises(EngineError, match=r"no NVIDIA GPU here for .* \(Failed to load libcublas.so.13\); pip"):
        OnnxRuntimeEngine(traced.graph("fp32"), device="cuda")


@pytest.mark.slow
def test_a_program_in_cpp_runs_the_package_without_python(
    traced: Traced, package: tuple[Path, dict[str, Any]], root: Path, tmp_path: Path, device: str
) -> None:
    torch_root = Path(torch.__file__).parent
    program = tmp_path / "run_aoti"
    command = [
        "g++", "-std=c++20", str(root / "examples" / "cpp" / "run_aoti.cpp"), "-o", str(program),
        f"-I{torch_root}/include", f"-I{torch_root}/include/torch/csrc/api/include", f"-L{torch_root}/lib",
        f"-Wl,-rpath,{torch_root}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10",
        *(["-ltorch_cuda", "-lc10_cuda"] if device == "cuda" else []),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    words: list[str] = []
    probe = traced.probes[-1]
    for name, value in probe.inputs.items():
        value.tofile(tmp_path / name)
        words += [str(value.dtype), ",".join(map(str, value.shape)), str(tmp_path / name)]
    output = tmp_path / "image.bin"
    environment = {"PATH": "/usr/bin:/bin"}
    subprocess.run([str(program), str(package[0]), device, str(output), *words], check=True, env=environment)
    expected = probe.outputs["image"]
    np.testing.assert_allclose(np.fromfile(output, np.float32).reshape(expected.shape), expected, atol=1e-5)
    failed = subprocess.run([str(program), "nowhere.pt2", device, str(output), *words], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
