"""A reference: a trained latent diffusion model as a directory of safetensors, `model.json` and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.artifact import atomic_write_bytes, atomic_write_json
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import ArtifactError
from ldm_deploy.models.shared_files import place_of
from ldm_deploy.models.sources import resolve_source

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm_deploy.config import Config
    from ldm_deploy.models.autoencoder import Autoencoder
    from ldm_deploy.models.clip import ClipTextEncoder
    from ldm_deploy.models.components import Signature
    from ldm_deploy.models.text_encoder import TextEncoder
    from ldm_deploy.models.unet import UNet

FORMAT = 1
WEIGHTS = ("autoencoder", "text_encoder", "unet")
MODEL_FILES = ("model.json", "tokenizer.json", *(f"{name}.safetensors" for name in WEIGHTS))


@dataclass
class Reference:
    """Modules in evaluation mode, fp32; `model` is the content of model.json."""

    directory: Path
    model: dict[str, Any]
    autoencoder: Autoencoder
    text_encoder: TextEncoder | ClipTextEncoder
    unet: UNet

    @property
    def schedule(self) -> Schedule:
        return Schedule.from_dict(self.model["schedule"])

    @property
    def signatures(self) -> Mapping[str, Signature]:
        from ldm_deploy.models.components import signatures_of

        return signatures_of(self.model)

    def components(self) -> dict[str, nn.Module]:
        """component name -> module in evaluation mode."""
        from ldm_deploy.models.components import VaeDecoder, VaeEncoder

        return {
            "text_encoder": self.text_encoder,
            "unet": self.unet,
            "vae_encoder": VaeEncoder(self.autoencoder).eval(),
            "vae_decoder": VaeDecoder(self.autoencoder).eval(),
        }

    def tokenizer_text(self) -> str:
        return place_of(self.directory, self.model, "tokenizer.json").read_text(encoding="utf-8")


def read_model(path: Path) -> dict[str, Any]:
    """The content of model.json. Raises `ArtifactError` if it does not parse or has another format."""
    try:
        model = json.loads((path / "model.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path / 'model.json'} does not parse ({error}); restore the directory") from None
    if not isinstance(model, dict) or model.get("format") != FORMAT:
        found = model.get("format") if isinstance(model, dict) else model
        raise ArtifactError(
            f"{path / 'model.json'} has format {found!r}; this version reads format {FORMAT}: upgrade ldm_deploy"
        )
    return model


def model_files(path: Path) -> list[str]:
    """The files a reference is made of, the model card left out, and those that model.json says it shares with another
    one, whose digests it holds. Raises `ArtifactError` if one is missing."""
    shared = read_model(path).get("shared", {}) if (path / "model.json").is_file() else {}
    missing = [name for name in MODEL_FILES if name not in shared and not (path / name).is_file()]
    if missing:
        raise ArtifactError(f"reference {path} has no {missing[0]}; restore the directory")
    return sorted(set(MODEL_FILES) - set(shared))


def build_modules(model: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Untrained modules from the architecture recorded in model.json."""
    from ldm_deploy.models.autoencoder import Autoencoder
    from ldm_deploy.models.clip import ClipTextEncoder
    from ldm_deploy.models.text_encoder import TextEncoder
    from ldm_deploy.models.unet import UNet

    kinds: dict[str, Callable[..., nn.Module]] = {"own": TextEncoder, "clip": ClipTextEncoder}
    text_encoder = dict(model["text_encoder"])
    return {
        "autoencoder": Autoencoder(**model["autoencoder"]),
        "text_encoder": kinds[text_encoder.pop("kind", "own")](**text_encoder),
        "unet": UNet(**model["unet"]),
    }


def load_reference(source: str | Path) -> Reference:
    """Load "reference" or a directory. Weights are computed in fp32 whatever they are stored as.

    Raises `ArtifactError` naming the file that is missing, damaged or does not fit the architecture.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = resolve_source(source)
    if not (path / "model.json").is_file():
        raise ArtifactError(
            f"{path} is a checkpoint of diffusers; it can be exported, evaluated and optimized, and "
            "what was asked for needs a reference: 'reference' or a directory written by `ldm-deploy train`"
        )
    model = read_model(path)
    try:
        with torch.random.fork_rng(devices=[]):
            modules = build_modules(model)
    except (KeyError, TypeError) as error:
        where = path / "model.json"
        raise ArtifactError(f"{where} does not describe a model ({error}); restore the directory") from None
    for name, module in modules.items():
        file = place_of(path, model, f"{name}.safetensors")
        try:
            weights = {key: value.float() for key, value in load_file(file).items()}
            module.load_state_dict(weights)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"weights {file} cannot be read ({error}); restore the directory") from None
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise ArtifactError(f"weights {file} do not fit model.json: {first}") from None
        module.eval().requires_grad_(False)
    return Reference(path, model, **modules)  # type: ignore[arg-type]


def describe(
    config: Config, scale_factor: float, text_encoder: Mapping[str, Any], prompts: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The content of model.json.

    `text_encoder`: its kind and arguments; `prompts`: see `choose_prompts` in `training/conditioning.py`.
    """
    autoencoder, unet = config.autoencoder, config.unet
    guidance_scale = 1.0 if config.conditioning == "none" else 5.0  # without a condition there is none to follow
    return {
        "format": FORMAT,
        "kind": "latent-diffusion",
        "name": config.name,
        "license": "Apache-2.0",
        "downsampling": autoencoder.downsampling,
        "latent_channels": autoencoder.z_channels,
        "scale_factor": scale_factor,
        "default_size": [config.resolution, config.resolution],
        "size_multiple": config.size_multiple,
        "context_length": text_encoder["context_length"],
        "conditioning": config.conditioning,
        "prompts": dict(prompts),
        "autoencoder": asdict(autoencoder),
        "text_encoder": dict(text_encoder),
        "unet": {**asdict(unet), "in_channels": autoencoder.z_channels, "context_channels": text_encoder["width"]},
        "schedule": config.schedule.to_dict(),
        "sampling": {"sampler": "ddim", "steps": 50, "guidance_scale": guidance_scale},
    }


def save_reference(path: Path, model: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write model.json and the weights, rounded to fp16, into the existing directory `path`.

    The rounded model, computed in fp32, is the reference. The tokenizer is written by the caller.
    """
    import torch
    from safetensors.torch import save

    for name in WEIGHTS:
        halves = {key: value.detach().to(torch.float16).contiguous() for key, value in weights[name].items()}
        atomic_write_bytes(path / f"{name}.safetensors", save(halves))
    atomic_write_json(path / "model.json", dict(model))
