"""diffusers' AutoencoderKL and UNet2DConditionModel directories, read and written by mapping names.

The layout is that of Stable Diffusion 1.x. Weights are read from safetensors only; what our networks do not have is
refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_deploy.artifact import atomic_write_bytes, atomic_write_json
from ldm_deploy.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm_deploy.models.autoencoder import Autoencoder
    from ldm_deploy.models.unet import UNet

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
Names = Iterator[tuple[str, str]]  # (prefix of ours, prefix of theirs)

# What our networks fix: the values that can be read, diffusers' default first.
AUTOENCODER_FIXED: dict[str, tuple[Any, ...]] = {
    "in_channels": (3,), "out_channels": (3,), "act_fn": ("silu",), "use_quant_conv": (True, None),
    "use_post_quant_conv": (True, None), "mid_block_add_attention": (True, None), "latents_mean": (None,),
    "latents_std": (None,), "shift_factor": (None, 0),
}  # fmt: skip
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",), "center_input_sample": (False,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
    "norm_eps": (1e-5,), "mid_block_scale_factor": (1,), "downsample_padding": (1,), "dropout": (0.0,),
    "use_linear_projection": (False, True), "only_cross_attention": (False,), "dual_cross_attention": (False,),
    "class_embed_type": (None,), "addition_embed_type": (None,), "time_cond_proj_dim": (None,),
    "encoder_hid_dim": (None,), "resnet_time_scale_shift": ("default",), "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,), "num_class_embeds": (None,), "resnet_skip_time_act": (False,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "time_embedding_dim": (None,), "timestep_post_act": (None,), "class_embeddings_concat": (False,),
    "attention_type": ("default",),
}  # fmt: skip


def load_autoencoder(directory: Path) -> tuple[Autoencoder, dict[str, Any]]:
    """Read an AutoencoderKL directory: the module in evaluation mode, fp32, and its diffusers configuration.

    Raises `ArtifactError` for a file that is missing or damaged and for a configuration our autoencoder cannot express.
    """
    from ldm_deploy.models.autoencoder import Autoencoder

    config = _read_config(directory, "AutoencoderKL", AUTOENCODER_FIXED)
    widths = config["block_out_channels"]
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if config.get(name) != [block] * len(widths):
            raise ArtifactError(f"{directory}: {name} is {config.get(name)}; only {block} can be read")
    if any(width % widths[0] for width in widths):
        raise ArtifactError(f"{directory}: block_out_channels is {widths}; each must be a multiple of the first")
    module = Autoencoder(
        ch=widths[0],
        ch_mult=[width // widths[0] for width in widths],
        num_res_blocks=config["layers_per_block"],
        z_channels=config["latent_channels"],
        norm_groups=config["norm_num_groups"],
        layout="sd1",
    )
    _load_weights(module, directory, dict(_autoencoder_names(module)))
    return module, config


def save_autoencoder(module: Autoencoder, directory: Path, scale_factor: float, sample_size: int) -> None:
    """Write an AutoencoderKL directory that diffusers loads. `sample_size`: pixels, recorded only.

    Raises `ArtifactError` for a network that is not of layout "sd1", or has a distilled part.
    """
    from ldm_deploy.models.autoencoder import Decoder, Encoder

    _check_layout(module, directory)
    if not (isinstance(module.encoder, Encoder) and isinstance(module.decoder, Decoder)):
        raise ArtifactError(
            f"{directory}: a distilled encoder or decoder has no place in diffusers' AutoencoderKL; "
            "save the autoencoder that it was distilled from"
        )
    widths, groups = module.widths, module.norm_groups
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": list(widths),
        "layers_per_block": module.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": module.z_channels,
        "norm_num_groups": groups,
        "sample_size": sample_size,
        "scaling_factor": scale_factor,
    }
    _write(directory, config, module, dict(_autoencoder_names(module)))


def load_unet(directory: Path) -> tuple[UNet, dict[str, Any]]:
    """Read a UNet2DConditionModel directory in the layout of SD 1.x; otherwise as `load_autoencoder`."""
    from ldm_deploy.models.unet import UNet

    config = _read_config(directory, "UNet2DConditionModel", UNET_FIXED)
    widths = config["block_out_channels"]
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    levels = []
    for level, kind in enumerate(config["down_block_types"]):
        if kind not in known:
            raise ArtifactError(f"{directory}: down_block_types has {kind!r}; allowed: {', '.join(known)}")
        if known[kind]:
            levels.append(level)
    mirrored = ["CrossAttnUpBlock2D" if level in levels else "UpBlock2D" for level in reversed(range(len(widths)))]
    if config["up_block_types"] != mirrored:
        raise ArtifactError(f"{directory}: up_block_types is {config['up_block_types']}; only {mirrored} can be read")
    # In diffusers `attention_head_dim` is the number of heads, unless `num_attention_heads` is given.
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    module = UNet(
        in_channels=config["in_channels"],
        channels=widths,
        num_res_blocks=config["layers_per_block"],
        attention_levels=levels,
        num_heads=heads,
        norm_groups=config["norm_num_groups"],
        layout="sd1",
        context_channels=config["cross_attention_dim"],
    )
    _load_weights(module, directory, dict(_unet_names(module)))
    return module, config


def save_unet(module: UNet, directory: Path, sample_size: int) -> None:
    """Write a UNet2DConditionModel directory that diffusers loads. `sample_size`: of latents, recorded only.

    Raises `ArtifactError` for a network that is not of layout "sd1".
    """
    _check_layout(module, directory)
    if module.guidance_embedding is not None:
        raise ArtifactError(f"{directory}: diffusers has no place for a student's guidance; export it to ONNX instead")
    if module.removed:
        raise ArtifactError(f"{directory}: diffusers has no place for a pruned U-Net; export it to ONNX instead")
    levels = range(len(module.channels))
    config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": module.conv_in.in_channels,
        "out_channels": module.conv_in.in_channels,
        "block_out_channels": list(module.channels),
        "layers_per_block": module.num_res_blocks,
        "down_block_types": [
            "CrossAttnDownBlock2D" if level in module.attention_levels else "DownBlock2D" for level in levels
        ],
        "up_block_types": [
            "CrossAttnUpBlock2D" if level in module.attention_levels else "UpBlock2D" for level in reversed(levels)
        ],
        "attention_head_dim": list(module.num_heads),
        "norm_num_groups": module.norm_groups,
        "cross_attention_dim": module.context_channels,
        "sample_size": sample_size,
        **{name: values[0] for name, values in UNET_FIXED.items()},
    }
    _write(directory, config, module, dict(_unet_names(module)))


def _autoencoder_names(module: Autoencoder) -> Names:
    from ldm_deploy.models.autoencoder import Middle
    from ldm_deploy.models.layers import DownsampleAsymmetric, ResidualBlock, Upsample

    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    for part, side in (("encoder", "down"), ("decoder", "up")):
        layers = list(getattr(module, part).layers)
        last = len(layers) - 1
        ends = {0: "conv_in", last: "conv_out", last - 2: "conv_norm_out"}
        level = block = 0
        for index, layer in enumerate(layers):
            ours = f"{part}.layers.{index}"
            if index in ends:
                yield ours, f"{part}.{ends[index]}"
            elif isinstance(layer, Middle):
                yield from _residual_names(f"{ours}.0", f"{part}.mid_block.resnets.0")
                yield f"{ours}.1.norm", f"{part}.mid_block.attentions.0.group_norm"
                yield from _attention_names(f"{ours}.1.attention", f"{part}.mid_block.attentions.0")
                yield from _residual_names(f"{ours}.2", f"{part}.mid_block.resnets.1")
            elif isinstance(layer, DownsampleAsymmetric | Upsample):
                yield f"{ours}.conv", f"{part}.{side}_blocks.{level}.{side}samplers.0.conv"
                level, block = level + 1, 0
            elif isinstance(layer, ResidualBlock):
                yield from _residual_names(ours, f"{part}.{side}_blocks.{level}.resnets.{block}")
                block += 1


def _unet_names(module: UNet) -> Names:
    from ldm_deploy.models.unet import Stage

    yield "time_embedding.0", "time_embedding.linear_1"
    yield "time_embedding.2", "time_embedding.linear_2"
    yield "conv_in", "conv_in"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"
    for side, layers in (("down", module.down), ("up", module.up)):
        level = block = 0
        for index, layer in enumerate(layers):
            ours = f"{side}.{index}"
            if isinstance(layer, Stage):
                yield from _stage_names(layer, ours, f"{side}_blocks.{level}", block)
                block += 1
            else:
                yield f"{ours}.conv", f"{side}_blocks.{level}.{side}samplers.0.conv"
                level, block = level + 1, 0
    for block, stage in enumerate(module.middle):
        yield from _stage_names(stage, f"middle.{block}", "mid_block", block)


def _stage_names(stage: Any, ours: str, theirs: str, block: int) -> Names:
    yield from _residual_names(f"{ours}.block", f"{theirs}.resnets.{block}")
    if stage.transformer is None:
        return
    ours, theirs = f"{ours}.transformer", f"{theirs}.attentions.{block}"
    inside = f"{theirs}.transformer_blocks.0"
    for name in ("norm", "proj_in", "proj_out"):
        yield f"{ours}.{name}", f"{theirs}.{name}"
    for name in ("norm1", "norm2", "norm3"):
        yield f"{ours}.{name}", f"{inside}.{name}"
    yield from _attention_names(f"{ours}.self_attention", f"{inside}.attn1")
    yield from _attention_names(f"{ours}.cross_attention", f"{inside}.attn2")
    yield f"{ours}.feed_forward.expand", f"{inside}.ff.net.0.proj"
    yield f"{ours}.feed_forward.contract", f"{inside}.ff.net.2"


def _residual_names(ours: str, theirs: str) -> Names:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{ours}.{name}", f"{theirs}.{name}"
    yield f"{ours}.embedding", f"{theirs}.time_emb_proj"
    yield f"{ours}.shortcut", f"{theirs}.conv_shortcut"


def _attention_names(ours: str, theirs: str) -> Names:
    for name in ("to_q", "to_k", "to_v"):
        yield f"{ours}.{name}", f"{theirs}.{name}"
    yield f"{ours}.to_out", f"{theirs}.to_out.0"


def _check_layout(module: Any, directory: Path) -> None:
    if module.layout != "sd1" or module.norm_groups == 0:
        raise ArtifactError(
            f"{directory}: a network of layout {module.layout!r} with norm_groups {module.norm_groups} has no place in "
            "diffusers; train one with layout = 'sd1' and a norm_groups that is not 0"
        )


def _read_config(directory: Path, kind: str, fixed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); give a directory written by diffusers") from None
    if config.get("_class_name") != kind:
        raise ArtifactError(f"{path} describes {config.get('_class_name')!r}; give a directory of {kind}")
    for name, allowed in fixed.items():
        value = config.get(name, allowed[0])
        if value not in allowed:
            shown = " or ".join(repr(option) for option in allowed)
            raise ArtifactError(f"{path}: {name} is {value!r}; this version reads {shown} only")
    return config


def _load_weights(module: Any, directory: Path, names: Mapping[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / WEIGHTS_FILE
    try:
        theirs = load_file(path)
    except (OSError, SafetensorError) as error:
        pickled = directory / "diffusion_pytorch_model.bin"
        hint = (
            f"{pickled.name} is a pickle, which is never opened: save it as safetensors" if pickled.exists() else error
        )
        raise ArtifactError(f"weights {path} cannot be read ({hint})") from None
    # Before version 0.17 diffusers had other names in the autoencoder's attention.
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    theirs = {
        ".".join(old.get(part, part) for part in name.split("."))
        if ".mid_block.attentions." in f".{name}"
        else name: value
        for name, value in theirs.items()
    }
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        prefix, _, kind = name.rpartition(".")
        key = f"{names[prefix]}.{kind}"
        if key not in theirs:
            raise ArtifactError(f"weights {path} have no {key!r}; they do not fit config.json")
        given = theirs.pop(key).float()
        if given.numel() != value.numel():
            raise ArtifactError(f"weights {path}: {key!r} has shape {tuple(given.shape)}, not {tuple(value.shape)}")
        state[name] = given.reshape(value.shape)  # a 1x1 convolution is a linear layer
    if theirs:
        raise ArtifactError(f"weights {path}: {sorted(theirs)[0]!r} has no place in this layout")
    module.load_state_dict(state)
    module.eval().requires_grad_(False)


def _write(directory: Path, config: Mapping[str, Any], module: Any, names: Mapping[str, str]) -> None:
    from safetensors.torch import save

    weights: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        prefix, _, kind = name.rpartition(".")
        if prefix.endswith(("transformer.proj_in", "transformer.proj_out")) and kind == "weight":
            value = value[:, :, None, None]
        weights[f"{names[prefix]}.{kind}"] = value.detach().float().contiguous()
    atomic_write_bytes(directory / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
    atomic_write_json(directory / "config.json", dict(config))
