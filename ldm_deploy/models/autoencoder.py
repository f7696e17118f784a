"""The autoencoder, KL or VQ: images to latents that a diffusion model can be trained on, and back.

Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G; Kingma and Welling 2014, arXiv:1312.6114; van den
Oord et al. 2017, arXiv:1711.00937.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm_deploy.models.layers import (
    Downsample,
    DownsampleAsymmetric,
    Dropout,
    ResidualBlock,
    SpatialAttention,
    Upsample,
    normalization,
)
from ldm_deploy.models.small_decoder import SmallDecoder, SmallEncoder
from ldm_deploy.models.vq import VectorQuantizer

LOGVAR_RANGE = (-30.0, 20.0)
EPS = {"compact": 1e-5, "sd1": 1e-6}  # of every normalisation, by layout


class Middle(nn.Sequential):
    """Residual block, self-attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int, layout: str) -> None:
        super().__init__(
            ResidualBlock(channels, channels, groups, eps=EPS[layout]),
            SpatialAttention(channels, groups, layout),
            ResidualBlock(channels, channels, groups, eps=EPS[layout]),
        )


class Encoder(nn.Module):
    """image (batch, 3, H, W) in [-1, 1] -> moments (batch, outputs, H/f, W/f), f = 2^(levels - 1).

    `widths`: channels per level, from the image's resolution down.
    """

    def __init__(self, widths: Sequence[int], num_res_blocks: int, outputs: int, groups: int, layout: str) -> None:
        super().__init__()
        width = widths[0]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for level, level_width in enumerate(widths):
            if level:
                layers.append(Downsample(width) if layout == "compact" else DownsampleAsymmetric(width))
            for _ in range(num_res_blocks):
                layers.append(ResidualBlock(width, level_width, groups, eps=EPS[layout]))
                width = level_width
        layers += [Middle(width, groups, layout), normalization(width, groups, EPS[layout]), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class Decoder(nn.Module):
    """latent (batch, z, h, w) -> image (batch, 3, h·f, w·f), about [-1, 1] and not clamped.

    One residual block more per level than the encoder, as in Rombach et al.'s released code.
    """

    def __init__(self, widths: Sequence[int], num_res_blocks: int, z_channels: int, groups: int, layout: str) -> None:
        super().__init__()
        width = widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(z_channels, width, 3, padding=1), Middle(width, groups, layout)]
        for level, level_width in enumerate(reversed(widths)):
            if level:
                layers.append(Upsample(width))
            for _ in range(num_res_blocks + 1):
                layers.append(ResidualBlock(width, level_width, groups, eps=EPS[layout]))
                width = level_width
        layers += [normalization(width, groups, EPS[layout]), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))

    @property
    def last_layer(self) -> Tensor:
        """The weight that an adversary's loss is balanced at."""
        return cast("nn.Conv2d", self.layers[-1]).weight

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(latent)


class Autoencoder(nn.Module):
    """Encoder and decoder around a diagonal Gaussian posterior, or around a codebook.

    With `kind` "vq" there is no Gaussian: the log-variance is its lower limit, and the decoder begins with a codebook
    of `codebook_size` entries (`models/vq.py`). Level i has ch · ch_mult[i] channels, from the image's resolution down;
    downsampling factor f = 2^(levels - 1). Heights and widths must be multiples of f.
    `small_encoder`, `small_decoder`: the arguments of a distilled one that takes the place of the full one
    (`models/small_decoder.py`); outside it there are no 1x1 convolutions then.
    """

    def __init__(
        self,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        norm_groups: int,
        layout: str,
        kind: str = "kl",
        codebook_size: int = 8192,
        dropout: float = 0.0,
        small_encoder: Mapping[str, Any] | None = None,
        small_decoder: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        widths = tuple(ch * factor for factor in ch_mult)
        self.widths, self.num_res_blocks, self.z_channels = widths, num_res_blocks, z_channels
        self.norm_groups, self.layout, self.kind = norm_groups, layout, kind
        moments = z_channels if kind == "vq" else 2 * z_channels
        compact = layout == "compact"
        self.encoder: Encoder | SmallEncoder
        self.decoder: Decoder | SmallDecoder
        if small_encoder is None:
            self.encoder = Encoder(widths, num_res_blocks, moments, norm_groups, layout)
        else:
            self.encoder = SmallEncoder(moments, **small_encoder)
        self.quant_conv = nn.Identity() if compact or small_encoder else nn.Conv2d(moments, moments, 1)
        self.quantizer = VectorQuantizer(codebook_size, z_channels) if kind == "vq" else nn.Identity()
        self.post_quant_conv = nn.Identity() if compact or small_decoder else nn.Conv2d(z_channels, z_channels, 1)
        if small_decoder is None:
            self.decoder = Decoder(widths, num_res_blocks, z_channels, norm_groups, layout)
        else:
            self.decoder = SmallDecoder(z_channels, **small_decoder)
        for module in self.modules():
            if isinstance(module, Dropout):
                module.rate = dropout

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (batch, 3, H, W) in [-1, 1] -> posterior mean and log-variance, each (batch, z, H/f, W/f), unscaled."""
        moments = self.quant_conv(self.encoder(image))
        if self.kind == "vq":
            return moments, torch.full_like(moments, LOGVAR_RANGE[0])
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, latent: Tensor) -> Tensor:
        """latent (batch, z, H/f, W/f), unscaled and not quantized -> image (batch, 3, H, W) in [-1, 1]."""
        return self.render(self.quantizer(latent)).clamp(-1, 1)

    def render(self, latent: Tensor) -> Tensor:
        """The decoder on a latent that is quantized already; not clamped, so that gradients flow."""
        return self.decoder(self.post_quant_conv(latent))

    def forward(self, image: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct through mean + exp(logvar / 2) · noise (Kingma and Welling 2014, section 2.4).

        Returns the reconstruction (not clamped), the mean and the log-variance. `noise` has the latent's shape; None
        reconstructs from the mean.
        """
        mean, logvar = self.encode(image)
        latent = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return self.render(self.quantizer(latent)), mean, logvar
