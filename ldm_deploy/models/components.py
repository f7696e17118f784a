"""The deployable components of a reference, each a module with the inputs and outputs that engines have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm_deploy.models.autoencoder import Autoencoder

Signature = tuple[tuple[str, ...], tuple[str, ...]]  # (input names, output names), in the order of the module's forward

SIGNATURES: dict[str, Signature] = {
    "text_encoder": (("input_ids",), ("encoder_hidden_states",)),
    "unet": (("sample", "timestep", "encoder_hidden_states"), ("prediction",)),
    "vae_encoder": (("image",), ("latent_mean", "latent_logvar")),
    "vae_decoder": (("latent",), ("image",)),
}


def signatures_of(model: Mapping[str, Any]) -> dict[str, Signature]:
    """The signatures of what model.json describes: a U-Net distilled with guidance takes `guidance_scale`, too."""
    inputs, outputs = SIGNATURES["unet"]
    guided = ("guidance_scale",) if model["unet"].get("guidance_embedding") else ()
    return {**SIGNATURES, "unet": ((*inputs, *guided), outputs)}


class VaeEncoder(nn.Module):
    """image float (batch, 3, H, W) in [-1, 1] -> latent_mean, latent_logvar (batch, z, H/f, W/f), unscaled."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.autoencoder.encode(image)


class VaeDecoder(nn.Module):
    """latent float (batch, z, H/f, W/f), unscaled -> image (batch, 3, H, W) in [-1, 1]."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor) -> Tensor:
        return self.autoencoder.decode(latent)
