"""The denoiser: a U-Net over latents, told the timestep and the caption.

Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239, appendix B; cross-attention as in
Rombach et al. 2022, arXiv:2112.10752, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

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


# What `removed` calls the lowest level as a whole, with the middle and the convolutions that lead there and back.
INNERMOST = "innermost"


class Shortcut(nn.Module):
    """What is left of a residual block when its branch is removed."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.shortcut(x)


class Removed(nn.Module):
    """Holds the place of a layer that is gone, so that those after it keep their names."""


class Stage(nn.Module):
    """A residual block and, where the level has attention, a spatial transformer.

    `alone`: on the way up, nothing comes from below and the input is the skip connection.
    """

    def __init__(self, block: ResidualBlock | Shortcut, transformer: SpatialTransformer | None) -> None:
        super().__init__()
        self.block = block
        self.transformer = transformer
        self.alone = False

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
    `removed`: what pruning took away, names as `removable` gives them.
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
        removed: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.removed: tuple[str, ...] = ()
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
        for name in removed:
            self.remove(name)

    def removable(self) -> list[str]:
        """What can be removed: the branch of a residual block ("down.0.block": its shortcut stays), a transformer
        ("down.2.transformer"), and, where there are levels above it, the lowest one ("innermost")."""
        found = []
        for side in ("down", "middle", "up"):
            for index, layer in enumerate(getattr(self, side)):
                if isinstance(layer, Stage):
                    found += [f"{side}.{index}.block"] if isinstance(layer.block, ResidualBlock) else []
                    found += [f"{side}.{index}.transformer"] if layer.transformer is not None else []
        return found + ([INNERMOST] if len(self.channels) > 1 and INNERMOST not in self.removed else [])

    def remove(self, name: str) -> None:
        """Take a part away, for good; what is left keeps its weights and their names.

        Raises `ValueError` if there is no such part.
        """
        if name not in self.removable():
            raise ValueError(f"the U-Net has no part {name!r} to remove; there are: {', '.join(self.removable())}")
        self.removed = (*self.removed, name)
        if name == INNERMOST:
            self._remove_innermost()
            return
        place, _, part = name.rpartition(".")
        stage = cast("Stage", self.get_submodule(place))
        if part == "transformer":
            stage.transformer = None
        else:
            stage.block = Shortcut(stage.block.shortcut)

    def _remove_innermost(self) -> None:
        """As Kim et al. 2023 (arXiv:2305.15798, section 3.1) do. The first stage above then reads its skip connection
        alone, with the weights that it read it with before."""
        own = self.num_res_blocks + 1  # layers of the level on either way, with the one that changes the size
        del self.down[-own:]
        self.middle = nn.ModuleList()
        for index in range(own + 1):
            self.up[index] = Removed()
        self.removed = tuple(name for name in self.removed if name == INNERMOST or self._is_there(name))
        above = cast("Stage", self.up[own + 1])
        above.alone = True
        skip = self.channels[-2]
        above.block.shortcut = _narrowed(cast("nn.Conv2d", above.block.shortcut), skip)
        if isinstance(above.block, ResidualBlock):
            norm, own_norm = above.block.norm1, normalization(skip, self.norm_groups)
            above.block.norm1 = own_norm.to(norm.weight.device)
            above.block.norm1.load_state_dict({key: value[-skip:] for key, value in norm.state_dict().items()})
            above.block.conv1 = _narrowed(above.block.conv1, skip)

    def _is_there(self, name: str) -> bool:
        side, index, *_ = name.split(".")
        layers = getattr(self, side)
        return int(index) < len(layers) and not isinstance(layers[int(index)], Removed)

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
            if isinstance(layer, Removed):
                continue
            if isinstance(layer, Stage):
                skip = skips.pop()
                x = layer(skip if layer.alone else torch.cat([x, skip], dim=1), embedding, encoder_hidden_states)
            else:
                x = layer(x)
        return self.out(x)


def _narrowed(layer: nn.Conv2d, channels: int) -> nn.Conv2d:
    """The same convolution of the last `channels` of its input."""
    size, padding, device = layer.kernel_size[0], layer.padding[0], layer.weight.device
    result = nn.Conv2d(channels, layer.out_channels, size, padding=cast("int", padding), device=device)
    result.load_state_dict({**layer.state_dict(), "weight": layer.weight.detach()[:, -channels:]})
    return result.requires_grad_(layer.weight.requires_grad)
