"""A small transformer that turns a tokenized caption into the U-Net's context."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm_deploy.models.layers import Attention, FeedForward


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward over (batch, sequence, width)."""

    def __init__(self, width: int, head_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, head_channels)
        self.feed_forward = FeedForward(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class TextEncoder(nn.Module):
    """input_ids int64 (batch, sequence <= context_length) -> encoder_hidden_states float (batch, sequence, width).

    Bidirectional; padding tokens are tokens like others, so no mask is needed at inference (as in Stable Diffusion).
    """

    def __init__(self, vocab_size: int, context_length: int, width: int, layers: int, head_channels: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Parameter(torch.randn(context_length, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, head_channels) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token_embedding(input_ids) + self.position_embedding[: input_ids.shape[1]]
        return self.norm(self.blocks(x))
