"""A torch module to an AOTInductor package: compiled kernels that C++ loads without Python."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldm_deploy.errors import ExportError
from ldm_deploy.export.graph import root_cause
from ldm_deploy.export.program import count_precisions, to_program

if TYPE_CHECKING:
    from ldm_deploy.eval.parity import Arrays
    from ldm_deploy.export.to_onnx import Axes


def to_aoti(
    module: nn.Module, inputs: Arrays, axes: Axes, path: Path, *, component: str, device: str = "cuda"
) -> dict[str, Any]:
    """Write the package `path` (.pt2); returns `precision_found` and `built_for`.

    Sizes are free as `axes` has them. In fp32, TF32 is off in what is compiled; convolutions ask for it again when
    they run (`runtime.engine_torch` says no; in C++: `at::globalContext().setAllowTF32CuDNN(false)`). Raises
    `ExportError`, also where there is no GPU.
    """
    from ldm_deploy.runtime.engine_torch import torch_properties

    made_for = torch_properties(device)
    program = to_program(module, inputs, axes, device=device, component=component)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        raise ExportError(f"{component}: AOTInductor compiled nothing: {root_cause(error)}") from error
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    check_standard_library(path, component)
    return {"precision_found": count_precisions(program), "built_for": made_for}


def check_standard_library(path: Path, component: str) -> None:
    """Raises `ExportError` for a package whose code has a C++ standard library of its own in it.

    torch has loaded another one by then; with two, the package ends the process that loads it. Compilers link it in
    where they find libstdc++.a and no libstdc++.so.
    """
    with zipfile.ZipFile(path) as package:
        for name in package.namelist():
            if name.endswith(".so") and b"libstdc++.so" not in package.read(name):
                raise ExportError(
                    f"{component}: the C++ compiler linked its standard library into the package, which would end the "
                    "process that loads it; put a link libstdc++.so to libstdc++.so.6 beside the file that "
                    "`g++ -print-file-name=libstdc++.a` names, or name another compiler in CXX"
                )
