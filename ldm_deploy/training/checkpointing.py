"""Gradient checkpointing: blocks whose activations are computed again in the backward pass instead of kept."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm_deploy.models.layers import ResidualBlock, SpatialAttention, SpatialTransformer

BLOCKS = (ResidualBlock, SpatialAttention, SpatialTransformer)


def checkpoint_blocks(module: nn.Module) -> None:
    """Wrap every residual and attention block of `module`, for as long as this object lives; names do not change."""
    for block in module.modules():
        if isinstance(block, BLOCKS):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
