"""Checkpoints in the layout of diffusers, a few thousand weights each, drawn at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LENGTH = 12  # tokens of a prompt
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
WORDS = ["<|startoftext|>", "<|endoftext|>", "!", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>"]
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
             "set_alpha_to_one": True, "steps_offset": 1}  # fmt: skip


def tokenizer(folder: Path, pad: str) -> Any:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad, model_max_length=LENGTH
    )  # fmt: skip


def text_encoder(kind: str, width: int, **options: Any) -> Any:
    import torch
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, **options,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def unet(context: int, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=context, norm_num_groups=8, attention_head_dim=4, **options,
    ).eval()  # fmt: skip


def autoencoder(tiny: bool) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    if tiny:
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4,
        ).eval()  # fmt: skip
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.7,
    ).eval()  # fmt: skip


def stable_diffusion(path: Path, *, tiny: bool = False, **schedule: Any) -> Any:
    """Write a Stable Diffusion 1.x; returns diffusers' pipeline."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(tiny), text_encoder=text_encoder("CLIPTextModel", 32), unet=unet(32),
        tokenizer=tokenizer(path / "words", "<|endoftext|>"), scheduler=DDIMScheduler(**{**SCHEDULER, **schedule}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return _written(pipeline, path)


def stable_diffusion_xl(path: Path) -> Any:
    """Write a Stable Diffusion XL; returns diffusers' pipeline."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    added: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
    }
    schedule = {key: value for key, value in SCHEDULER.items() if key.startswith("beta") or key == "steps_offset"}
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder(False), text_encoder=text_encoder("CLIPTextModel", 32),
        text_encoder_2=text_encoder("CLIPTextModelWithProjection", 24, projection_dim=24, hidden_act="gelu"),
        unet=unet(56, **added), tokenizer=tokenizer(path / "words", "<|endoftext|>"),
        tokenizer_2=tokenizer(path / "words2", "!"),
        scheduler=EulerDiscreteScheduler(**schedule, timestep_spacing="leading"),
        add_watermarker=False,
    )  # fmt: skip
    return _written(pipeline, path)


def _written(pipeline: Any, path: Path) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(path)
    return pipeline
