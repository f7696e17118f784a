"""What a model is conditioned on: which tokenizer and text encoder captions, classes or nothing ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_deploy.config import Config
from ldm_deploy.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

    from ldm_deploy.models.reference import Reference

REPORT_PROMPTS = 24
CALIBRATION_PROMPTS = 32


@dataclass
class Conditioning:
    """`text_encoder`: what model.json says of it. `frozen`: its module, where it is used as it is."""

    tokenizer: Tokenizer
    text_encoder: dict[str, Any]
    frozen: nn.Module | None = None

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids int64 (len(texts), context_length); what is too long is cut.

        Raises `DataError` for a text that cannot be encoded: a class that the model to go on from does not have.
        """
        self.tokenizer.enable_truncation(self.text_encoder["context_length"])
        try:
            return np.array([encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))], dtype=np.int64)
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"the data has a class that the model to go on from does not know ({error}); remove its images"
            ) from None
        finally:
            self.tokenizer.no_truncation()


def conditioning(config: Config, texts: Sequence[str], initial: Reference | None) -> Conditioning:
    """Tokenizer and text encoder for `texts`; those of `initial` where training goes on from a reference.

    Raises `ConfigError` if that one was conditioned on something else.
    """
    from tokenizers import Tokenizer

    from ldm_deploy.training.tokenizer import LABEL_TOKENS, label_tokenizer, train_tokenizer

    own = config.text_encoder
    if initial is not None:
        theirs = initial.model.get("conditioning", "captions")
        if theirs != config.conditioning:
            raise ConfigError(
                f"conditioning is {config.conditioning!r} and {initial.directory} was trained with {theirs!r}; "
                f"set conditioning = {theirs!r}"
            )
        tokenizer = Tokenizer.from_str(initial.tokenizer_text())
        if initial.model["text_encoder"].get("kind") == "clip":
            return Conditioning(tokenizer, initial.model["text_encoder"], initial.text_encoder)
    elif own.pretrained:
        from ldm_deploy.models.clip import load_clip, load_clip_tokenizer, read_clip_config

        directory = Path(own.pretrained)
        found = read_clip_config(directory)
        tokenizer = load_clip_tokenizer(directory, found["context_length"])
        return Conditioning(tokenizer, {"kind": "clip", **found}, load_clip(directory))
    elif config.conditioning == "captions":
        tokenizer = train_tokenizer(texts, own.vocab_size, own.context_length)
    else:
        tokenizer = label_tokenizer(texts)
    # A class needs no more than an embedding of its own.
    length, layers = (own.context_length, own.layers) if config.conditioning == "captions" else (LABEL_TOKENS, 0)
    described = {
        "vocab_size": tokenizer.get_vocab_size(),
        "context_length": length,
        "width": own.width,
        "layers": layers,
        "head_channels": own.head_channels,
    }
    return Conditioning(tokenizer, described)


def choose_prompts(texts: Sequence[str], preferred: Sequence[str]) -> dict[str, list[str]]:
    """What reports draw and what calibration sees, for model.json: `preferred` for the reports if `texts` has them all,
    else texts evenly spaced in order; others, if there are others, for calibration."""
    known = sorted(set(texts))
    report = list(preferred) if preferred and set(preferred) <= set(known) else _spaced(known, REPORT_PROMPTS)
    others = [text for text in known if text not in report] or known
    return {"report": report, "calibration": _spaced(others, CALIBRATION_PROMPTS)}


def _spaced(texts: Sequence[str], count: int) -> list[str]:
    return [texts[place * len(texts) // min(count, len(texts))] for place in range(min(count, len(texts)))]
