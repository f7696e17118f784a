"""What can be exported and evaluated: a reference directory, or a checkpoint in the layout of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import ArtifactError

if TYPE_CHECKING:
    from torch import nn

    from ldm_deploy.models.components import Signature

INDEX = "model_index.json"  # of a diffusers checkpoint


class Source(Protocol):
    """A latent diffusion model in torch, fp32, in evaluation mode. `model`: what model.json says of a reference."""

    directory: Path
    model: dict[str, Any]

    @property
    def schedule(self) -> Schedule: ...

    @property
    def signatures(self) -> Mapping[str, Signature]:
        """component -> (input names, output names)."""
        ...

    def components(self) -> dict[str, nn.Module]:
        """component -> module with those inputs and outputs."""
        ...

    def tokenizer_text(self) -> str:
        """The content of a tokenizer.json that pads to the model's context length."""
        ...


SHIPPED = ("reference", "pruned", "few-steps")  # each made of the one before it; the last draws in 1 to 8 steps


def resolve_source(source: str | Path) -> Path:
    """The directory of a source; those in `SHIPPED` are in this package. Raises `ArtifactError` if it is none."""
    if str(source) in SHIPPED:
        return Path(str(resources.files("ldm_deploy") / "assets" / str(source)))
    path = Path(source)
    if not (path / "model.json").is_file() and not (path / INDEX).is_file():
        raise ArtifactError(
            f"{str(source)!r} is no model: there is no {path / 'model.json'} and no {path / INDEX}; give 'reference', "
            "'pruned' or 'few-steps' (the shipped ones), a directory written by `ldm-deploy train`, or a checkpoint in "
            "the layout of diffusers"
        )
    return path


def load_source(source: str | Path) -> Source:
    """Raises `ArtifactError` naming what is missing, damaged, or not to be had in an engine."""
    path = resolve_source(source)
    if (path / INDEX).is_file():
        from ldm_deploy.models.from_diffusers import load_checkpoint

        return load_checkpoint(path)
    from ldm_deploy.models.reference import load_reference

    return load_reference(path)


def read_sampling(path: Path) -> dict[str, Any]:
    """sampler, steps and guidance_scale of a source, without loading a weight."""
    if (path / INDEX).is_file():
        from ldm_deploy.models.from_diffusers import describe_checkpoint

        return dict(describe_checkpoint(path)["sampling"])
    from ldm_deploy.models.reference import read_model

    return dict(read_model(path)["sampling"])


def source_digest(path: Path) -> str:
    """sha256 over the names and digests of the files the model is made of (a model card is not among them)."""
    from ldm_deploy.artifact import content_key, file_digests
    from ldm_deploy.models.reference import model_files

    if (path / INDEX).is_file():
        from ldm_deploy.models.from_diffusers import checkpoint_files

        return content_key(file_digests(path, checkpoint_files(path)))
    return content_key(file_digests(path, model_files(path)))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a source."""
    if (path / INDEX).is_file():
        from ldm_deploy.models.from_diffusers import checkpoint_files

        return [path / name for name in checkpoint_files(path) if name.endswith(".safetensors")]
    from ldm_deploy.models.reference import WEIGHTS, read_model
    from ldm_deploy.models.shared_files import place_of

    own = sorted(path.glob("*.safetensors"))
    shared = {f"{name}.safetensors" for name in WEIGHTS} - {file.name for file in own}
    model = read_model(path) if shared else {}
    return [*own, *(place_of(path, model, name) for name in sorted(shared & set(model.get("shared", {}))))]
