"""Prompts to token ids, through the `tokenizer.json` of a bundle (Hugging Face `tokenizers`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm_deploy.errors import BundleError, PromptError


class Tokenizer:
    """`context_length`: the number of tokens of every encoded prompt, start, end and padding included."""

    def __init__(self, path: Path, context_length: int) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"tokenizer {path} cannot be read ({error}); restore the file") from None
        self._tokenizer.no_truncation()
        self.context_length = context_length

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """int64 (len(prompts), context_length). Raises `PromptError` for a prompt that is no text or too long."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise PromptError(f"prompt is {prompt!r}, a {type(prompt).__name__}; give text")
        rows = []
        for prompt, encoding in zip(prompts, self._tokenizer.encode_batch(list(prompts)), strict=True):
            tokens = sum(encoding.attention_mask)
            if tokens > self.context_length or len(encoding.ids) != self.context_length:
                special = sum(encoding.special_tokens_mask[:tokens])
                raise PromptError(
                    f"prompt {_shortened(prompt)!r} has {tokens - special} tokens; "
                    f"the model takes {self.context_length - special} at most: shorten it"
                )
            rows.append(encoding.ids)
        return np.array(rows, dtype=np.int64)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
