"""Texts to token ids: cut at the tokenizer's longest input, without an end token that nobody wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# transformers writes 1e30 for "no limit", which no fast tokenizer takes as a number of tokens.
_NO_LIMIT = 2**31 - 1


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, keep_end: bool = False) -> list[list[int]]:
    """Token ids of each text, with the special tokens that the tokenizer adds, cut at its `model_max_length`.

    Args:
        keep_end: whether an end token that the tokenizer itself appends stays. Without it a prompt goes on, and
            a text that is to end has the one end token that was written into it.
    """
    if not texts:
        return []
    options: dict[str, Any] = {"padding": False, "truncation": False, "verbose": False}
    if tokenizer.model_max_length <= _NO_LIMIT:
        options.update(truncation=True, max_length=tokenizer.model_max_length)
    encoded: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    end = [tokenizer.eos_token_id]
    if keep_end or not any(ids[-1:] == end for ids in encoded):
        return encoded
    # The empty text's own tokens are those that the tokenizer adds to every text.
    if tokenizer("", **options)["input_ids"][-1:] != end:
        return encoded
    return [ids[:-1] if ids[-1:] == end else ids for ids in encoded]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, keep_end: bool = False) -> Tensor:
    """`encode` of one text, int64 [S]."""
    return torch.tensor(encode(tokenizer, [text], keep_end=keep_end)[0], dtype=torch.int64)


def end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the end token. Raises ValueError where the tokenizer has none."""
    if tokenizer.eos_token is None:
        raise ValueError("the target texts end with the tokenizer's end token, but it has no eos_token")
    return str(tokenizer.eos_token)


def starts_by_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its start token in front of every text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("")["input_ids"][:1] == [bos]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own start tokens but without an end token that it would
    append (a prompt goes on). Training and generation both tokenise prompts here, so their edit positions
    agree."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), padding=False, truncation=False, verbose=False)["input_ids"]
    eos, eos_text = tokenizer.eos_token_id, tokenizer.eos_token
    if eos is None:
        return encoded
    return [
        ids[:-1] if ids and ids[-1] == eos and not text.endswith(str(eos_text)) else ids
        for ids, text in zip(encoded, texts, strict=True)
    ]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills padded columns: the pad token, else the end token, else 0. Its value is never looked
    at, since attention masks are built from lengths."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
