"""Building blocks shared by the autoencoder and the U-Net.

Tensors are float (batch, channels, height, width) unless said otherwise. A network has one of two layouts:
"sd1" is that of Stable Diffusion 1.x, so that its weights can be exchanged with diffusers; "compact" does without what
a small network does not miss: gates in the feed-forward layers, biases of queries, keys and values, 1x1 projections.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

LayerT = TypeVar("LayerT", bound=nn.Module)


def normalization(channels: int, groups: int, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm (Wu and He 2018, arXiv:1803.08494). `groups` 0: 16 channels each, or 8, 4, 2 or 1."""
    if groups == 0:
        groups = channels // next(size for size in (16, 8, 4, 2, 1) if channels % size == 0)
    return nn.GroupNorm(groups, channels, eps)


def zero_initialized(layer: LayerT) -> LayerT:
    """Make a residual branch start as zero, so that the block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Dropout(nn.Module):
    """Leaves out the share `rate` of the values while training and scales the others (Srivastava et al. 2014, JMLR 15).

    `rate` is 0 until a network sets it. Where a batch is computed in parts, `part` says which (its rows, and how many
    the batch has): each part draws the mask of the whole batch and takes its rows, so that the result does not depend
    on how the batch is cut.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0
        self.part: tuple[slice, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        rows, count = self.part or (slice(None), len(x))
        kept = torch.rand(count, *x.shape[1:], device=x.device)[rows] >= self.rate
        return x * kept / (1 - self.rate)


class ResidualBlock(nn.Module):
    """norm - SiLU - conv, twice, plus the input (He et al. 2016, arXiv:1603.05027).

    With `embedding_channels` the timestep embedding (batch, embedding_channels) is added between the two convolutions
    (Ho et al. 2020, appendix B).
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int, embedding_channels: int = 0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = normalization(in_channels, groups, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_channels, out_channels) if embedding_channels else None
        self.norm2 = normalization(out_channels, groups, eps)
        self.dropout = Dropout()
        self.conv2 = zero_initialized(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        if self.embedding is not None:
            if embedding is None:
                raise ValueError("this block was built with a timestep embedding and needs one")
            h = h + self.embedding(functional.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(functional.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Queries (batch, n, channels); keys and values from `context` (batch, m, context_channels), or from the queries' own
    tensor. Returns (batch, n, channels). `causal`: no query sees a key after it.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int,
        context_channels: int | None = None,
        bias: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.head_channels, self.causal = head_channels, causal
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=bias)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context

        def heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (-1, self.head_channels)).transpose(1, 2)

        q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.to_out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers around a GELU: (batch, n, channels) -> the same."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, expansion * channels)
        self.contract = nn.Linear(expansion * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(functional.gelu(self.expand(x)))


class GatedFeedForward(nn.Module):
    """GEGLU: a linear layer, gated by the GELU of another (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, 8 * channels)  # value and gate, 4 times as wide each
        self.contract = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.contract(value * functional.gelu(gate))


class SpatialTransformer(nn.Module):
    """Self-attention, cross-attention to the caption and a feed-forward layer over the pixels of a feature map.

    The cross-attention block of Rombach et al. 2022 (arXiv:2112.10752, section 3.3 and appendix E.2.1).
    `context` is (batch, sequence, context_channels).
    """

    def __init__(self, channels: int, head_channels: int, context_channels: int, groups: int, layout: str) -> None:
        super().__init__()
        compact = layout == "compact"
        self.norm = normalization(channels, groups, 1e-5 if compact else 1e-6)
        self.proj_in = nn.Identity() if compact else nn.Linear(channels, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = Attention(channels, head_channels)
        self.cross_attention = Attention(channels, head_channels, context_channels)
        self.feed_forward = FeedForward(channels, 2) if compact else GatedFeedForward(channels)
        self.proj_out = zero_initialized(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        tokens = tokens + self.self_attention(self.norm1(tokens))
        tokens = tokens + self.cross_attention(self.norm2(tokens), context)
        tokens = tokens + self.feed_forward(self.norm3(tokens))
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, (height, width))


class SpatialAttention(nn.Module):
    """Self-attention with one head over the pixels of a feature map, as in the middle of the autoencoder."""

    def __init__(self, channels: int, groups: int, layout: str) -> None:
        super().__init__()
        compact = layout == "compact"
        self.norm = normalization(channels, groups, 1e-5 if compact else 1e-6)
        self.attention = Attention(channels, channels, bias=not compact)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        return x + tokens.transpose(1, 2).unflatten(2, (height, width))


class Downsample(nn.Module):
    """Halve height and width with a strided convolution, padded on all sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DownsampleAsymmetric(nn.Module):
    """The same, padded at the right and at the bottom only, as the autoencoder of Rombach et al. 2022 has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution (Odena et al. 2016, against checkerboards).

    `out_channels`: as many as before where it is not given.
    """

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def timestep_embedding(timestep: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timestep, cosines first: int64 or float (batch) -> float32 (batch, channels).

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
