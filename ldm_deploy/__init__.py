"""Deployment toolchain for latent diffusion: a model goes in, a bundle of engines that proved themselves comes out.

An application needs `load`, and `LdmDeployError` to catch what can go wrong; importing this package loads no engine
library and no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm_deploy.errors import LdmDeployError

if TYPE_CHECKING:
    from pathlib import Path

    from ldm_deploy.runtime.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["LdmDeployError", "load"]


def load(
    path: str | Path, *, variant: str | None = None, threads: int | None = None, spinning: bool = True
) -> Pipeline:
    """Check a bundle and make its default variant, or the one named, ready to draw; see `runtime.pipeline.load`."""
    from ldm_deploy.runtime.pipeline import load

    return load(path, variant=variant, threads=threads, spinning=spinning)
