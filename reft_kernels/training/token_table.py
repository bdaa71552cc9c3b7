"""Token ids of many examples in flat tensors: prompt and output of each, cut to a length."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from reft_kernels.training.tokens import encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenTable(NamedTuple):
    """The ids of all examples one after the other; a Python list of them would take eight times the memory."""

    ids: Tensor
    """int32, of every kept example its prompt and its output."""
    starts: Tensor
    """int64 [N + 1]: example i is ids[starts[i]:starts[i + 1]]."""
    prompt_lengths: Tensor
    """int32 [N]."""
    dropped: Tensor
    """int64, the numbers of the examples of which nothing of the output was left."""

    def example(self, index: int) -> tuple[Tensor, int]:
        """Ids int64 [S] of an example and the length of its prompt."""
        start, stop = self.starts[index : index + 2].tolist()
        return self.ids[start:stop].long(), int(self.prompt_lengths[index])

    @property
    def lengths(self) -> Tensor:
        """int64 [N], prompt and output."""
        return self.starts[1:] - self.starts[:-1]


class TokenPair(NamedTuple):
    """Ids of prompt and output together, and how many of them are the prompt's."""

    ids: list[int]
    prompt_length: int


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    outputs: Sequence[str],
    *,
    max_length: int,
    append_eos: bool,
    first: int = 0,
) -> Iterator[TokenPair | None]:
    """Of each prompt and output its ids, or None where nothing of the output is within `max_length`.

    Prompt and prompt + output are tokenised separately, as pyreft does, and cut from the right. The end token, where
    one is appended, goes first.

    Raises ValueError for a prompt without tokens (`first` is the number of the first one), and where an end token is to
    be appended that the tokenizer has not.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError("append_eos=True needs a tokenizer with an end token; this one has no eos_token")
    joined = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    encoded = zip(encode_prompts(tokenizer, prompts), encode_prompts(tokenizer, joined), strict=True)
    for index, (prompt, full) in enumerate(encoded):
        if not prompt:
            raise ValueError(f"prompt {first + index} has no tokens: {prompts[index]!r}")
        ids = ([*full, int(tokenizer.eos_token_id)] if append_eos else full)[:max_length]
        yield TokenPair(ids, len(prompt)) if len(prompt) < len(ids) else None


def make_table(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    outputs: Sequence[str],
    *,
    max_length: int,
    append_eos: bool,
    chunk: int = 1000,
) -> TokenTable:
    """The table of all examples; arguments and errors are those of :func:`encode_pairs`."""
    ids, starts, lengths, dropped = array("i"), array("q", [0]), array("i"), array("q")
    for first in range(0, len(prompts), chunk):
        part = slice(first, first + chunk)
        pairs = encode_pairs(
            tokenizer, prompts[part], outputs[part], max_length=max_length, append_eos=append_eos, first=first
        )
        for index, pair in enumerate(pairs, start=first):
            if pair is None:
                dropped.append(index)
                continue
            ids.extend(pair.ids)
            starts.append(len(ids))
            lengths.append(pair.prompt_length)
    return TokenTable(_tensor(ids), _tensor(starts), _tensor(lengths), _tensor(dropped))


def _tensor(values: array[int]) -> Tensor:
    dtype = torch.int32 if values.itemsize == 4 else torch.int64
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
