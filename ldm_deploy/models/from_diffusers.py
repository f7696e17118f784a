"""Checkpoints in the layout of diffusers: Stable Diffusion 1.x, 2.x and XL, with their own or a tiny autoencoder.

U-Net and autoencoder are diffusers' own modules; text encoders are ours (`models.clip`), equal to transformers'.
Weights are read from safetensors only. What the runtime cannot do is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.errors import ArtifactError, ConfigError
from ldm_deploy.models.clip import ClipTextEncoder, load_clip, load_clip_tokenizer, read_clip_config
from ldm_deploy.models.components import SIGNATURES, Signature

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "LatentConsistencyModelPipeline": "sd",
}
# diffusers' schedulers by the sampler that is theirs here; guidance and steps are those of its pipelines.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmsolver++",
    "UniPCMultistepScheduler": "dpmsolver++",
    "LCMScheduler": "lcm",
}
GUIDANCE_SCALE = {"sd": 7.5, "sdxl": 5.0}
SDXL_SIGNATURES: dict[str, Signature] = {
    **SIGNATURES,
    "text_encoder": (("input_ids",), ("encoder_hidden_states", "text_embeds")),
    "unet": (("sample", "timestep", "encoder_hidden_states", "text_embeds"), ("prediction",)),
}
CONVERT = "convert it: load the pipeline in diffusers and save_pretrained(..., safe_serialization=True)"


@dataclass
class Checkpoint:
    """A source, see `models.sources`."""

    directory: Path
    model: dict[str, Any]
    modules: dict[str, nn.Module]
    signatures: Mapping[str, Signature]
    tokenizer: Tokenizer

    @property
    def schedule(self) -> Schedule:
        return Schedule.from_dict(self.model["schedule"])

    def components(self) -> dict[str, nn.Module]:
        return self.modules

    def tokenizer_text(self) -> str:
        return str(self.tokenizer.to_str())


class Denoiser(nn.Module):
    """diffusers' U-Net with the inputs and outputs of a component.

    With `text_embeds` (SDXL) the sizes it also wants are those of the image: no crop (Podell et al. 2023,
    arXiv:2307.01952, section 2.2).
    """

    def __init__(self, unet: nn.Module, downsampling: int) -> None:
        super().__init__()
        self.unet: Any = unet
        self.downsampling = downsampling

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor | None = None
    ) -> Tensor:
        added = {}
        if text_embeds is not None:
            zeros = torch.zeros_like(timestep)
            height, width = zeros + self.downsampling * sample.shape[2], zeros + self.downsampling * sample.shape[3]
            sizes = torch.stack([height, width, zeros, zeros, height, width], dim=1).to(sample.dtype)
            added = {"added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": sizes}}
        output: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False, **added)[0]
        return output


class Encoder(nn.Module):
    """image -> latent_mean, latent_logvar. A tiny autoencoder has no spread: its variance is the least there is."""

    def __init__(self, vae: nn.Module, tiny: bool) -> None:
        super().__init__()
        self.vae: Any = vae
        self.tiny = tiny

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.tiny:
            latents = self.vae.encode(image, return_dict=False)[0]
            return latents, torch.full_like(latents, -30.0)
        posterior = self.vae.encode(image, return_dict=False)[0]
        return posterior.mean, posterior.logvar


class Decoder(nn.Module):
    """latent, unscaled -> image."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(latent, return_dict=False)[0]
        return image


class TwoTextEncoders(nn.Module):
    """SDXL's: input_ids int64 (batch, sequence) -> encoder_hidden_states (batch, sequence, both widths), the states
    before the last block of both; text_embeds (batch, width), the second one's projected end-of-text state.

    Both tokenizers have the same tokens and differ in what they pad with, so the second one's ids follow from the
    first's. `zero_empty`: the empty text gives zeros (`force_zeros_for_empty_prompt` of diffusers).
    """

    def __init__(
        self, first: ClipTextEncoder, second: ClipTextEncoder, projection: Tensor, end: int, pad: int, zero_empty: bool
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.projection = nn.Linear(projection.shape[1], projection.shape[0], bias=False)
        self.projection.weight = nn.Parameter(projection, requires_grad=False)
        self.end, self.pad, self.zero_empty = end, pad, zero_empty

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        at_end = (input_ids == self.end).long()
        ends_before = at_end.cumsum(dim=1) - at_end
        ids = torch.where(ends_before > 0, self.pad, input_ids)
        states = [self.first.penultimate(input_ids), self.second.penultimate(ids)]
        last = self.second.norm(self.second.blocks[-1](states[1]))
        at = (at_end * (ends_before == 0)).to(last.dtype)  # one at the first end of text, else zero
        pooled = self.projection((last * at[:, :, None]).sum(dim=1))
        context = torch.cat(states, dim=-1)
        if self.zero_empty:
            kept = (input_ids[:, 1] != self.end).to(context.dtype)
            context, pooled = context * kept[:, None, None], pooled * kept[:, None]
        return context, pooled


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises `ArtifactError` naming what is missing, damaged, or not to be had in an engine."""
    model = describe_checkpoint(path)
    checkpoint_files(path)  # refuses a pickle before anything is loaded
    kind = model["layout"]
    unet = _load(path / "unet", "UNet2DConditionModel")
    vae = _load(path / "vae", model["autoencoder"]["kind"])
    tokenizer = load_clip_tokenizer(path / "text_encoder", model["context_length"])
    text_encoder: nn.Module = load_clip(path / "text_encoder")
    if kind == "sdxl":
        text_encoder = _two_text_encoders(path, text_encoder, tokenizer, model["context_length"])
    modules = {
        "text_encoder": text_encoder,
        "unet": Denoiser(unet, model["downsampling"]),
        "vae_encoder": Encoder(vae, model["autoencoder"]["kind"] == "AutoencoderTiny"),
        "vae_decoder": Decoder(vae),
    }
    for module in modules.values():
        module.eval().requires_grad_(False)
    return Checkpoint(path, model, modules, SDXL_SIGNATURES if kind == "sdxl" else SIGNATURES, tokenizer)


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """What model.json says of a reference, from a checkpoint's configuration files; no weight is loaded."""
    index = _read(path / "model_index.json")
    kind = PIPELINES.get(index.get("_class_name", ""))
    if kind is None:
        raise ArtifactError(
            f"{path} is a {index.get('_class_name')}; this version reads {', '.join(PIPELINES)}: "
            "export its components one by one, as module:function"
        )
    for part in ("text_encoder", "text_encoder_2")[: 1 + (kind == "sdxl")]:
        if not (path / part / "config.json").is_file():
            raise ArtifactError(
                f"{path} has no {part}; complete the checkpoint, or export the others as module:function"
            )
    unet, vae = _read(path / "unet" / "config.json"), _read(path / "vae" / "config.json")
    if unet.get("time_cond_proj_dim") is not None:
        raise ArtifactError(f"{path / 'unet'} takes the guidance as an input; this version has no such U-Net")
    if unet["in_channels"] != vae["latent_channels"]:
        raise ArtifactError(
            f"{path / 'unet'} has {unet['in_channels']} input channels and the autoencoder {vae['latent_channels']} of "
            "latents; models for inpainting or depth are not read by this version"
        )
    if vae.get("shift_factor") or vae.get("latents_mean"):
        raise ArtifactError(f"{path / 'vae'} shifts its latents; this version only scales them")
    tiny = vae["_class_name"] == "AutoencoderTiny"
    widths = vae["decoder_block_out_channels" if tiny else "block_out_channels"]
    downsampling = 2 ** (len(widths) - 1)
    clip = read_clip_config(path / "text_encoder")
    sample_size = unet["sample_size"]
    sizes = [sample_size, sample_size] if isinstance(sample_size, int) else list(sample_size)
    sampler, schedule = _schedule(path / "scheduler" / "scheduler_config.json")
    lcm = sampler == "lcm"
    return {
        "format": 1,
        "kind": "latent-diffusion",
        "layout": kind,
        "name": path.resolve().name,
        "license": "that of the checkpoint",
        "downsampling": downsampling,
        "latent_channels": vae["latent_channels"],
        "scale_factor": vae["scaling_factor"],
        "default_size": [downsampling * size for size in sizes],
        "size_multiple": downsampling * 2 ** (len(unet["block_out_channels"]) - 1),
        "context_length": clip["context_length"],
        "conditioning": "captions",
        "autoencoder": {"kind": vae["_class_name"]},
        "text_encoder": clip,
        "schedule": schedule.to_dict(),
        "sampling": {
            "sampler": sampler,
            "steps": 4 if lcm else 50,
            "guidance_scale": 1.0 if lcm else GUIDANCE_SCALE[kind],
        },
    }


def checkpoint_files(path: Path) -> list[str]:
    """The files that make the model, sorted, relative to `path`. Raises `ArtifactError` where weights are a pickle."""
    found = ["model_index.json"]
    for folder in ("scheduler", "tokenizer", "text_encoder", "text_encoder_2", "unet", "vae"):
        if not (path / folder).is_dir():
            continue
        found += [f"{folder}/{file.name}" for file in (path / folder).glob("*.json")]
        found += [f"{folder}/{file.name}" for file in (path / folder).glob("merges.txt")]
        if folder not in ("scheduler", "tokenizer"):
            found += [f"{folder}/{name}" for name in _weights(path / folder)]
    return sorted(found)


def _weights(folder: Path) -> list[str]:
    """The safetensors of a component: those without a variant's name (fp16, non_ema), else those of fp16."""
    there = sorted(file.name for file in folder.glob("*.safetensors"))
    # name.safetensors or name-00001-of-00002.safetensors; a variant is one more word between dots
    plain = [name for name in there if name.count(".") == 1]
    halves = [name for name in there if ".fp16" in name]
    if plain or halves:
        return plain or halves
    pickled = next((file.name for kind in ("*.bin", "*.pt", "*.ckpt") for file in sorted(folder.glob(kind))), None)
    if pickled is not None:
        raise ArtifactError(f"weights {folder / pickled} are a pickle, never opened; {CONVERT}")
    raise ArtifactError(f"{folder} has no weights (*.safetensors); complete the checkpoint")


def _load(folder: Path, kind: str) -> nn.Module:
    try:
        import diffusers
    except ImportError:
        raise ArtifactError(
            f"{folder} needs diffusers to be read and it is not installed; pip install 'ldm-deploy[diffusers]'"
        ) from None
    if kind not in ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny"):
        raise ArtifactError(f"{folder} holds a {kind}; this version reads AutoencoderKL and AutoencoderTiny")
    variant = None if all(name.count(".") == 1 for name in _weights(folder)) else "fp16"
    try:
        module: nn.Module = getattr(diffusers, kind).from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, variant=variant,
            low_cpu_mem_usage=False,
        )  # fmt: skip
    except Exception as error:  # of diffusers, safetensors or torch: anything that a damaged file can cause
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtifactError(f"{folder} cannot be read ({reason}); restore the checkpoint") from None
    return module


def _two_text_encoders(path: Path, first: nn.Module, tokenizer: Tokenizer, context_length: int) -> TwoTextEncoders:
    from safetensors.torch import load_file

    second = load_clip(path / "text_encoder_2")
    other = load_clip_tokenizer(path / "text_encoder_2", context_length, folder="tokenizer_2")
    if other.get_vocab() != tokenizer.get_vocab():
        raise ArtifactError(f"{path}: its two tokenizers have different tokens; this version reads those that agree")
    end = tokenizer.token_to_id("<|endoftext|>")
    folder = path / "text_encoder_2"
    projection = next(
        (found["text_projection.weight"] for found in (load_file(folder / name) for name in _weights(folder))
         if "text_projection.weight" in found),
        None,
    )  # fmt: skip
    if projection is None or end is None:
        what = "text_projection.weight" if projection is None else "an end-of-text token"
        raise ArtifactError(f"{folder} has no {what}; it is no second text encoder of SDXL")
    zero_empty = bool(_read(path / "model_index.json").get("force_zeros_for_empty_prompt", True))
    assert isinstance(first, ClipTextEncoder)
    pad = other.encode("").ids[-1]
    return TwoTextEncoders(first, second, projection.float(), end, pad, zero_empty)


def _schedule(path: Path) -> tuple[str, Schedule]:
    """(sampler, schedule) from a scheduler's configuration."""
    config = _read(path)
    name = config.get("_class_name", "")
    if name not in SAMPLERS:
        raise ArtifactError(f"{path}: {name} has no sampler here; there are those of {', '.join(SAMPLERS)}")
    for key in ("thresholding", "clip_sample", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(key, False):
            raise ArtifactError(f"{path}: {key} is on, which the runtime's samplers do not do; set it to false")
    values = {
        key: config[key]
        for key in (
            "beta_schedule", "num_train_timesteps", "beta_start", "beta_end", "prediction_type", "timestep_spacing",
            "steps_offset",
        )
        if key in config
    }  # fmt: skip
    values = {"prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 0, **values}
    try:
        return SAMPLERS[name], Schedule(**values, rescale_zero_terminal_snr=config.get("rescale_betas_zero_snr", False))
    except ConfigError as error:
        raise ArtifactError(f"{path}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); complete the checkpoint") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds no configuration; restore the checkpoint")
    return data
