"""CLIP's text encoder, read from a directory of transformers: a context for the U-Net that was learnt elsewhere.

Radford et al. 2021, arXiv:2103.00020, section 2.4.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_deploy.errors import ArtifactError
from ldm_deploy.models.layers import Attention

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": functional.gelu}
WEIGHTS_FILES = ("model.safetensors", "model.fp16.safetensors")


class ClipBlock(nn.Module):
    """Pre-norm causal self-attention and feed-forward over (batch, sequence, width)."""

    def __init__(self, width: int, head_channels: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, head_channels, bias=True, causal=True)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.contract(self.activation(self.expand(self.norm2(x))))


class ClipTextEncoder(nn.Module):
    """input_ids int64 (batch, sequence <= context_length) -> encoder_hidden_states float (batch, sequence, width).

    The last layer's states after the final norm, without a mask for padding, as Stable Diffusion 1.x uses them.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        head_channels: int,
        hidden: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context_length, width)
        self.blocks = nn.Sequential(*(ClipBlock(width, head_channels, hidden, activation) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.blocks(self._embed(input_ids)))

    def penultimate(self, input_ids: Tensor) -> Tensor:
        """The states before the last block, without the final norm, as Stable Diffusion XL uses them."""
        return self.blocks[:-1](self._embed(input_ids))

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


def read_clip_config(directory: Path) -> dict[str, Any]:
    """The arguments of `ClipTextEncoder` from config.json of a CLIPTextModel or a whole CLIPModel.

    Raises `ArtifactError` for a file that is missing and for a model that is no CLIP text encoder as above.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); give a directory written by transformers") from None
    if config.get("model_type") not in ("clip_text_model", "clip"):
        raise ArtifactError(f"{path}: model_type is {config.get('model_type')!r}; give a CLIP text model")
    config = config.get("text_config") or config
    # What transformers leaves out has these values.
    default = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512, "num_hidden_layers": 12,
               "num_attention_heads": 8, "intermediate_size": 2048, "hidden_act": "quick_gelu",
               "layer_norm_eps": 1e-5}  # fmt: skip
    found = {name: config.get(name, value) for name, value in default.items()}
    if found["hidden_act"] not in ACTIVATIONS or found["layer_norm_eps"] != 1e-5:
        raise ArtifactError(
            f"{path}: hidden_act is {found['hidden_act']!r} and layer_norm_eps {found['layer_norm_eps']}; "
            f"this version reads {' or '.join(ACTIVATIONS)} with 1e-05"
        )
    return {
        "vocab_size": found["vocab_size"],
        "context_length": found["max_position_embeddings"],
        "width": found["hidden_size"],
        "layers": found["num_hidden_layers"],
        "head_channels": found["hidden_size"] // found["num_attention_heads"],
        "hidden": found["intermediate_size"],
        "activation": found["hidden_act"],
    }


def weights_file(directory: Path) -> Path:
    """The first of `WEIGHTS_FILES` that is there."""
    paths = [directory / name for name in WEIGHTS_FILES]
    return next((path for path in paths if path.is_file()), paths[0])


def load_clip(directory: Path) -> ClipTextEncoder:
    """The text encoder in evaluation mode, fp32. Raises `ArtifactError` for weights that are missing or do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    module = ClipTextEncoder(**read_clip_config(directory))
    path = weights_file(directory)
    try:
        theirs = {name.removeprefix("text_model."): value for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"weights {path} cannot be read ({error}); save them as safetensors") from None
    names = {
        "token_embedding": "embeddings.token_embedding",
        "position_embedding": "embeddings.position_embedding",
        "norm": "final_layer_norm",
    }
    parts = {
        "norm1": "layer_norm1", "norm2": "layer_norm2", "expand": "mlp.fc1", "contract": "mlp.fc2",
        "attention.to_q": "self_attn.q_proj", "attention.to_k": "self_attn.k_proj",
        "attention.to_v": "self_attn.v_proj", "attention.to_out": "self_attn.out_proj",
    }  # fmt: skip
    for index in range(len(module.blocks)):
        names |= {f"blocks.{index}.{ours}": f"encoder.layers.{index}.{part}" for ours, part in parts.items()}
    state = {}
    for name, value in module.state_dict().items():
        prefix, _, kind = name.rpartition(".")
        key = f"{names[prefix]}.{kind}"
        if key not in theirs or theirs[key].shape != value.shape:
            found = f"with shape {tuple(theirs[key].shape)}" if key in theirs else "not there"
            raise ArtifactError(f"weights {path}: {key!r} is {found}; config.json asks for {tuple(value.shape)}")
        state[name] = theirs[key].float()
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def load_clip_tokenizer(directory: Path, context_length: int, *, folder: str = "tokenizer") -> Tokenizer:
    """The tokenizer of the same directory (or of `folder` beside it), padding to `context_length`, cutting nothing.

    Raises `ArtifactError` if there is none.
    """
    import tokenizers

    places = [directory, directory.parent / folder]
    for place in places:
        if (place / "tokenizer.json").is_file():
            tokenizer = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
            break
        if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
            try:
                from transformers import CLIPTokenizerFast
            except ImportError:
                raise ArtifactError(
                    f"{place} has its tokenizer as vocab.json and merges.txt; install transformers to read them"
                ) from None
            tokenizer = CLIPTokenizerFast.from_pretrained(place, local_files_only=True).backend_tokenizer
            break
    else:
        raise ArtifactError(f"there is no tokenizer.json, nor vocab.json and merges.txt, in {places[0]} or {places[1]}")
    pad = _padding_token(place)
    if tokenizer.token_to_id(pad) is None:
        raise ArtifactError(f"the tokenizer in {place} pads with {pad!r}, which is none of its tokens")
    tokenizer.enable_padding(length=context_length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    tokenizer.no_truncation()
    return tokenizer


def _padding_token(directory: Path) -> str:
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    token = config.get("pad_token", "<|endoftext|>")
    return str(token["content"] if isinstance(token, dict) else token)
