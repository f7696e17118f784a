"""A small decoder, and the encoder that mirrors it: convolutions and ReLU, no attention, no normalisation.

In the spirit of TAESD, the tiny autoencoder of Stable Diffusion (Bohan 2023, github.com/madebyollin/taesd): what
runtimes fuse and INT8 bears well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_deploy.models.layers import Upsample, zero_initialized

SIGMAS = 3.0  # a latent is bent so that it stays within this many standard deviations


class PlainBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))), the same width throughout; starts as the identity of what is not negative."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = zero_initialized(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.conv2(functional.relu(self.conv1(x))))


def bounded(latent: Tensor, scale: float) -> Tensor:
    """`latent`, times `scale`, bent softly into (-3, 3): 3 tanh(x / 3), as TAESD clamps its latents.

    A value that a sampler overshoots to then costs no quality elsewhere, and a quantized input has a known range.
    """
    return SIGMAS * torch.tanh(latent * (scale / SIGMAS))


class SmallDecoder(nn.Module):
    """latent (batch, z, h, w) -> image (batch, 3, h·f, w·f), about [-1, 1] and not clamped; f = 2^len(widths).

    `widths`, `blocks`: channels and residual blocks per level, from the latent's resolution up. Between two levels the
    size doubles by nearest neighbours and a convolution. The last level has half the image's size: each of its pixels
    becomes four of the image (sub-pixel convolution: Shi et al. 2016, arXiv:1609.05158, section 2.2), so that no layer
    works at full resolution. `scale`: 1 / standard deviation of latents.
    """

    def __init__(self, z_channels: int, widths: Sequence[int], blocks: Sequence[int], scale: float) -> None:
        super().__init__()
        self.scale = scale
        layers: list[nn.Module] = [nn.Conv2d(z_channels, widths[0], 3, padding=1), nn.ReLU()]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            if level:
                layers += [Upsample(widths[level - 1], width), nn.ReLU()]
            layers += [PlainBlock(width) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 12, 3, padding=1), nn.PixelShuffle(2))

    @property
    def last_layer(self) -> Tensor:
        """The weight that an adversary's loss is balanced at."""
        return cast("nn.Conv2d", self.layers[-2]).weight

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(bounded(latent, self.scale))


class SmallEncoder(nn.Module):
    """image (batch, 3, H, W) in [-1, 1] -> moments (batch, outputs, H/f, W/f), the decoder mirrored.

    `widths`, `blocks` as the decoder's, from the latent's resolution up.
    """

    def __init__(self, outputs: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[-1], 3, padding=1), nn.ReLU()]
        for level in reversed(range(len(widths))):
            layers += [PlainBlock(widths[level]) for _ in range(blocks[level])]
            if level:
                layers += [nn.Conv2d(widths[level], widths[level - 1], 3, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[0], outputs, 3, padding=1))

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)
