"""Prompts to token ids, through a `tokenizer.json` (Hugging Face `tokenizers`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm_deploy.errors import BundleError, PromptError


def read_tokenizer(path: Path, context_length: int) -> Tokenizer:
    """From a file. Raises `BundleError` if it cannot be read."""
    try:
        return Tokenizer(path.read_text(encoding="utf-8"), context_length)
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"tokenizer {path} cannot be read ({error}); restore the file") from None


class Tokenizer:
    """`text`: the content of tokenizer.json. `context_length`: the number of tokens of every encoded prompt, start, end
    and padding included."""

    def __init__(self, text: str, context_length: int) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # A prompt that is too long is refused by `encode`, never cut in silence.
        self._tokenizer.no_truncation()
        self.context_length = context_length

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """int64 (len(prompts), context_length). Raises `PromptError` for a prompt that is no text or too long."""
        rows = []
        for prompt in prompts:
            try:
                encoding = self._tokenizer.encode(prompt)
            except (TypeError, UnicodeError):
                raise PromptError(f"prompt {_shortened(prompt)} is no text that can be encoded; give text") from None
            except Exception as error:  # tokenizers raises bare Exception: a class that a labelled model does not have
                raise PromptError(
                    f"prompt {_shortened(prompt)} is none of the classes the model was trained on ({error}); "
                    "give one of the names in the tokenizer's vocabulary, or an empty prompt"
                ) from None
            tokens = sum(encoding.attention_mask)
            if tokens > self.context_length:
                special = sum(encoding.special_tokens_mask[:tokens])
                raise PromptError(
                    f"prompt {_shortened(prompt)} has {tokens - special} tokens; "
                    f"the model takes {self.context_length - special} at most: shorten it"
                )
            if len(encoding.ids) != self.context_length:
                raise BundleError(
                    f"the tokenizer pads to {len(encoding.ids)} tokens and the model's context_length is "
                    f"{self.context_length}; build the bundle again"
                )
            rows.append(encoding.ids)
        return np.array(rows, dtype=np.int64)


def _shortened(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "..."
