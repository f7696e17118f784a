"""Train the caption tokenizer: byte-level BPE, so that every prompt in any script can be encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")
UNCONDITIONAL = "<none>"
LABEL_TOKENS = 2


def label_tokenizer(labels: Sequence[str]) -> Tokenizer:
    """One token per class, its whole name, padded by token 0, "no class". The empty text is that alone.

    A name that is no class does not encode. Engines have a context of any length, and tracers take a length of 1 for a
    constant: hence two tokens.
    """
    from tokenizers import Tokenizer, models

    names = sorted(set(labels) - {"", UNCONDITIONAL})
    tokenizer = Tokenizer(models.WordLevel({UNCONDITIONAL: 0, **{name: 1 + at for at, name in enumerate(names)}}))
    tokenizer.enable_padding(length=LABEL_TOKENS, pad_id=0, pad_token=UNCONDITIONAL)
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int, context_length: int) -> Tokenizer:
    """A Hugging Face tokenizer that lower-cases, splits at words, adds <start> and <end> and pads to `context_length`.

    Byte-pair encoding: Sennrich et al. 2016, arXiv:1508.07909, over bytes (Radford et al. 2019). Truncation is left to
    the caller: the runtime refuses a prompt that is too long. Deterministic for the same texts.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=1,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", ids["<start>"]), ("<end>", ids["<end>"])]
    )
    tokenizer.enable_padding(length=context_length, pad_id=ids["<pad>"], pad_token="<pad>")
    return tokenizer
