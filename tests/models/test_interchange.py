"""diffusers' directories, both ways: what diffusers computes and what ours computes is the same."""

from __future__ import annotations

import json

import pytest
import torch

from ldm_deploy.errors import ArtifactError
from ldm_deploy.models.autoencoder import Autoencoder
from ldm_deploy.models.interchange import load_autoencoder, load_unet, save_autoencoder, save_unet
from ldm_deploy.models.unet import UNet


def shake(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: zeros and ones of fresh layers would hide what is in the wrong place."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
        elif not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval().requires_grad_(False)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


def diffusers_autoencoder():
    from diffusers import AutoencoderKL

    return shake(
        AutoencoderKL(
            block_out_channels=(8, 16, 16), layers_per_block=2, latent_channels=3, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )
    )  # fmt: skip


def diffusers_unet(**changes):
    from diffusers import UNet2DConditionModel

    return shake(
        UNet2DConditionModel(
            **{
                "block_out_channels": (16, 32, 48), "layers_per_block": 2, "cross_attention_dim": 24,
                "attention_head_dim": 8, "norm_num_groups": 8, "in_channels": 4, "out_channels": 4,
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                **changes,
            }
        )
    )  # fmt: skip


def same_autoencoder(ours, theirs, z):
    image, latent = torch.rand(2, 3, 16, 24) * 2 - 1, torch.randn(2, z, 4, 6)
    mean, logvar = ours.encode(image)
    posterior = theirs.encode(image).latent_dist
    assert close(mean, posterior.mean)
    assert close(logvar, posterior.logvar)
    assert close(ours.decode(latent), theirs.decode(latent).sample.clamp(-1, 1))


def same_unet(ours, theirs, channels, context):
    sample, words, timestep = torch.randn(2, channels, 8, 12), torch.randn(2, 5, context), torch.tensor([3, 801])
    expected = theirs(sample, timestep, words).sample
    assert expected.std() > 0.1
    assert close(ours(sample, timestep, words), expected)


def test_autoencoder_from_diffusers(tmp_path):
    theirs = diffusers_autoencoder()
    theirs.save_pretrained(tmp_path)
    ours, config = load_autoencoder(tmp_path)
    assert config["scaling_factor"] == theirs.config.scaling_factor
    same_autoencoder(ours, theirs, 3)


def test_autoencoder_to_diffusers(tmp_path):
    from diffusers import AutoencoderKL

    ours = shake(Autoencoder(8, (1, 2, 3), 1, 4, 4, "sd1"))
    save_autoencoder(ours, tmp_path, scale_factor=0.7, sample_size=64)
    theirs = AutoencoderKL.from_pretrained(tmp_path)
    assert theirs.config.scaling_factor == 0.7
    same_autoencoder(ours, theirs.eval(), 4)


@pytest.mark.parametrize("changes", [{}, {"attention_head_dim": (2, 4, 6)}, {"use_linear_projection": True}])
def test_unet_from_diffusers(tmp_path, changes):
    theirs = diffusers_unet(**changes)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_unet(tmp_path)
    same_unet(ours, theirs, 4, 24)


def test_unet_to_diffusers(tmp_path):
    from diffusers import UNet2DConditionModel

    ours = shake(UNet(3, (16, 32), 1, (1,), (1, 4), 8, "sd1", 20))
    save_unet(ours, tmp_path, sample_size=16)
    same_unet(ours, UNet2DConditionModel.from_pretrained(tmp_path).eval(), 3, 20)


def test_the_default_unet_of_diffusers_has_the_parameters_of_sd_1(tmp_path):
    """SD 1.5's U-Net: 859,520,964 parameters (its published checkpoint)."""
    with torch.device("meta"):
        unet = UNet(4, (320, 640, 1280, 1280), 2, (0, 1, 2), (8, 8, 8, 8), 32, "sd1", 768)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964


def test_sd_1_autoencoder_has_its_parameters():
    """The autoencoder of SD 1.5: 83,653,863 parameters (its published checkpoint)."""
    with torch.device("meta"):
        autoencoder = Autoencoder(128, (1, 2, 4, 4), 2, 4, 32, "sd1")
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 83_653_863


def edit(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "describes 'AutoencoderTiny'; give a directory of UNet2DConditionModel"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'; this version reads None only"),
        ({"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3}, "down_block_types has 'SimpleCrossAttnDownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"] * 3}, r"up_block_types is .*; only \['UpBlock2D', 'CrossAttnUpBlock2D'"),
        ({"layers_per_block": 3}, "have no 'down_blocks.0.resnets.2.norm1.weight'; they do not fit config.json"),
        (
            {
                "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
            },
            r"'down_blocks\.1\.attentions\.0\..*' has no place in this layout",
        ),
        ({"cross_attention_dim": 32}, r"attn2.to_k.weight' has shape \(16, 24\), not \(16, 32\)"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, changes, message):
    diffusers_unet().save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_unet(tmp_path)


def test_missing_damaged_and_pickled_weights(tmp_path):
    diffusers_autoencoder().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_autoencoder(tmp_path)
    weights.unlink()
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match="is a pickle, which is never opened: save it as safetensors"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ArtifactError, match="give a directory written by diffusers"):
        load_autoencoder(tmp_path)


def test_a_compact_network_has_no_place_in_diffusers(tmp_path):
    with pytest.raises(ArtifactError, match="layout 'compact' with norm_groups 4 has no place in diffusers; train one"):
        save_autoencoder(Autoencoder(8, (1, 2), 1, 4, 4, "compact"), tmp_path / "vae", 1.0, 32)
    with pytest.raises(ArtifactError, match="layout 'sd1' with norm_groups 0 has no place in diffusers"):
        save_unet(UNet(3, (16, 32), 1, (1,), (1, 4), 0, "sd1", 20), tmp_path / "unet", 16)
    assert not list(tmp_path.iterdir())
