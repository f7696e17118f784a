"""The denoiser: a U-Net over latents, told the timestep and the caption.

Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239, appendix B; cross-attention as in
Rombach et al. 2022, arXiv:2112.10752, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm_deploy.models.layers import (
    Downsample,
    ResidualBlock,
    SpatialTransformer,
    Upsample,
    normalization,
    timestep_embedding,
    zero_initialized,
)

# A guidance scale of 10 is as far from 0 in its sinusoids as the last of 1000 timesteps.
GUIDANCE_UNIT = 100.0


class Stage(nn.Module):
    """A residual block and, where the level has attention, a spatial transformer."""

    def __init__(self, block: ResidualBlock, transformer: SpatialTransformer | None) -> None:
        super().__init__()
        self.block = block
        self.transformer = transformer

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        x = self.block(x, embedding)
        return x if self.transformer is None else self.transformer(x, context)


class UNet(nn.Module):
    """sample (batch, in_channels, h, w), timestep int64 (batch), encoder_hidden_states (batch, sequence,
    context_channels) -> prediction (batch, in_channels, h, w).

    `channels`, `num_heads`: one width and number of heads per level. `attention_levels`: the levels with a transformer,
    0 is the highest resolution.
    The middle always has one. h and w must be multiples of 2^(levels - 1).
    `guidance_embedding`: there is a fourth input, guidance_scale float (batch), what a student of guided predictions is
    told (Meng et al. 2023, arXiv:2210.03142, section 3.1). It enters beside the timestep, through a projection that
    starts at zero: an untrained one changes nothing.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[int],
        num_heads: Sequence[int],
        norm_groups: int,
        layout: str,
        context_channels: int,
        guidance_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.num_heads = tuple(channels), tuple(num_heads)
        self.num_res_blocks, self.attention_levels = num_res_blocks, tuple(attention_levels)
        self.norm_groups, self.layout, self.context_channels = norm_groups, layout, context_channels
        embedding_channels = 4 * channels[0]
        self.timestep_channels = channels[0]
        self.time_embedding = nn.Sequential(
            nn.Linear(channels[0], embedding_channels), nn.SiLU(), nn.Linear(embedding_channels, embedding_channels)
        )

        self.guidance_embedding = None
        if guidance_embedding:
            self.guidance_embedding = zero_initialized(nn.Linear(channels[0], channels[0], bias=False))

        def stage(level: int, inputs: int, outputs: int, attention: bool) -> Stage:
            block = ResidualBlock(inputs, outputs, norm_groups, embedding_channels)
            if not attention:
                return Stage(block, None)
            heads = num_heads[level]
            return Stage(block, SpatialTransformer(outputs, outputs // heads, context_channels, norm_groups, layout))

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        width, skips = channels[0], [channels[0]]
        for level, level_channels in enumerate(channels):
            if level:
                self.down.append(Downsample(width))
                skips.append(width)
            for _ in range(num_res_blocks):
                self.down.append(stage(level, width, level_channels, level in attention_levels))
                width = level_channels
                skips.append(width)

        lowest = len(channels) - 1
        self.middle = nn.ModuleList([stage(lowest, width, width, True), stage(lowest, width, width, False)])

        self.up = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for _ in range(num_res_blocks + 1):
                self.up.append(stage(level, width + skips.pop(), channels[level], level in attention_levels))
                width = channels[level]
            if level:
                self.up.append(Upsample(width))
        self.out = nn.Sequential(
            normalization(width, norm_groups), nn.SiLU(), zero_initialized(nn.Conv2d(width, in_channels, 3, padding=1))
        )

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, guidance_scale: Tensor | None = None
    ) -> Tensor:
        when = timestep_embedding(timestep, self.timestep_channels).to(sample.dtype)
        if self.guidance_embedding is not None:
            if guidance_scale is None:
                raise ValueError("this U-Net was distilled with guidance and needs guidance_scale")
            scaled = GUIDANCE_UNIT * guidance_scale
            when = when + self.guidance_embedding(timestep_embedding(scaled, self.timestep_channels).to(sample.dtype))
        embedding = self.time_embedding(when)
        x = self.conv_in(sample)
        skips = [x]
        for layer in self.down:
            x = layer(x, embedding, encoder_hidden_states) if isinstance(layer, Stage) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, embedding, encoder_hidden_states)
        for layer in self.up:
            if isinstance(layer, Stage):
                x = layer(torch.cat([x, skips.pop()], dim=1), embedding, encoder_hidden_states)
            else:
                x = layer(x)
        return self.out(x)
