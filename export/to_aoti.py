"""A torch module to an AOTInductor package: compiled kernels that C++ loads without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldm_deploy.errors import ExportError
from ldm_deploy.export.graph import root_cause
from ldm_deploy.export.program import count_precisions, to_program
from ldm_deploy.progress import note

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
    compiler = find_compiler(component)
    program = to_program(module, inputs, axes, device=device, component=component)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch._inductor.config.patch({"cpp.cxx": (None, compiler)}):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        raise ExportError(f"{component}: AOTInductor compiled nothing: {root_cause(error)}") from error
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return {"precision_found": count_precisions(program), "built_for": made_for}


def find_compiler(component: str) -> str:
    """The C++ compiler that CXX names, or else one in PATH, that links its standard library as a shared one.

    Compilers that come without libstdc++.so link libstdc++.a into what they make. torch has loaded another standard
    library by then; with two, a package ends the process that loads it. Raises `ExportError` if there is none.
    """
    named = os.environ.get("CXX")
    found = [shutil.which(name) for name in (*([named] if named else []), "g++", "c++", "clang++")]
    compilers = list(dict.fromkeys(path for path in found if path))
    refused = [compiler for compiler in compilers if not shares_standard_library(compiler)]
    for compiler in compilers:
        if compiler not in refused:
            if refused:
                note(f"{component}: {refused[0]} links its standard library into packages; {compiler} is taken instead")
            return compiler
    tried = ", ".join(compilers) or "g++, c++ and clang++, none of which is here"
    raise ExportError(
        f"{component}: AOTInductor needs a C++ compiler that links libstdc++.so; tried: {tried}; "
        "install g++, or name one in CXX"
    )


def shares_standard_library(compiler: str) -> bool:
    """Whether a library that `compiler` makes leaves the standard library out."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "code.cpp"), Path(folder, "code.so")
        source.write_text("#include <iostream>\nvoid speak() { std::cout << 1; }\n", encoding="utf-8")
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library)]
        made = subprocess.run(command, capture_output=True, check=False)
        return made.returncode == 0 and b"libstdc++.so" in library.read_bytes()
