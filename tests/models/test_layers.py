"""The building blocks against torch's and diffusers' own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm_deploy.config import LAYOUTS
from ldm_deploy.models.layers import (
    Attention,
    ResidualBlock,
    SpatialTransformer,
    Upsample,
    normalization,
    timestep_embedding,
)


def test_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours = Attention(32, head_channels=8)
    theirs = nn.MultiheadAttention(32, num_heads=4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(ours.to_out.weight)
        theirs.out_proj.bias.copy_(ours.to_out.bias)
        x = torch.randn(3, 7, 32)
        torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-5)


def test_cross_attention_looks_at_its_context():
    torch.manual_seed(0)
    attention = Attention(16, head_channels=8, context_channels=24)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 9, 24)
    out = attention(x, context)
    assert out.shape == x.shape
    torch.testing.assert_close(attention(x, context.flip(1)), out)  # a set of tokens: order does not matter
    assert not torch.allclose(attention(x, context + 1), out)


def test_timestep_embedding_equals_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    timestep = torch.tensor([0, 1, 17, 999])
    theirs = get_timestep_embedding(timestep, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timestep, 64), theirs, rtol=1e-5, atol=1e-5)


def test_residual_block_equals_diffusers():
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    ours = ResidualBlock(16, 32, groups=4, embedding_channels=24)
    nn.init.normal_(ours.conv2.weight, std=0.1)
    theirs = ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=24, groups=4, eps=1e-5, non_linearity="swish")
    names = {"embedding": "time_emb_proj", "shortcut": "conv_shortcut"}
    state = {
        ".".join([names.get(key.split(".")[0], key.split(".")[0]), key.split(".")[1]]): value
        for key, value in ours.state_dict().items()
    }
    theirs.load_state_dict(state)
    x, embedding = torch.randn(2, 16, 8, 8), torch.randn(2, 24)
    torch.testing.assert_close(ours(x, embedding), theirs(x, embedding), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_residual_branches_start_as_zero(layout):
    torch.manual_seed(0)
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(ResidualBlock(16, 16, 4)(x), x)
    torch.testing.assert_close(SpatialTransformer(16, 8, 12, 4, layout)(x, torch.randn(1, 4, 12)), x)


def test_residual_block_without_its_embedding_is_refused():
    with pytest.raises(ValueError, match="needs one"):
        ResidualBlock(8, 8, 4, embedding_channels=4)(torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize("channels", [3, 8, 24, 32, 96])
def test_normalization_divides_any_width(channels):
    norm = normalization(channels, groups=0)
    assert norm.num_channels == channels
    assert norm(torch.randn(2, channels, 4, 4)).shape == (2, channels, 4, 4)
    assert normalization(96, groups=8).num_groups == 8


def test_upsample_doubles():
    assert Upsample(4)(torch.randn(1, 4, 3, 5)).shape == (1, 4, 6, 10)
