"""The frozen states of a batch: computed, joined from those of its rows, and put into a call of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from reft_kernels.training.frozen_part import FrozenPart
from reft_kernels.training.frozen_store import Entry


class FrozenStates(NamedTuple):
    """The entries of B rows as one.

    ``keys`` and ``values`` [L, B, H, T, D] are padded on the left to the largest t0, T; ``hidden`` [B, n, d] on the
    right, or None where no block comes before the first edit.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor | None


@torch.no_grad()
def compute_entries(part: FrozenPart, tokens: Sequence[Tensor], starts: Sequence[int]) -> list[Entry]:
    """The entries of rows of token ids, from one call of the unedited base model without gradient.

    They are views of that call's tensors.
    """
    ids, mask = padded(tokens, part.device)
    entering: list[Tensor] = []

    def look(_module: nn.Module, _args: Any, output: Any) -> None:
        entering.append(output if isinstance(output, Tensor) else output[0])

    cache = Cache(layers=[_FirstLayer() for _ in part.blocks])
    handle = part.blocks[part.first - 1].register_forward_hook(look) if part.first else None
    try:
        body = part.body(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    finally:
        if handle is not None:
            handle.remove()
    hidden = entering[0] if entering else body[0].new_empty(len(ids), 0, body[0].shape[-1])
    entries = []
    for row, (one, start) in enumerate(zip(tokens, starts, strict=True)):
        held = [(layer.keys[row, :, :start], layer.values[row, :, :start]) for layer in cache.layers[part.first :]]
        keys, values = (torch.stack(each) if held else hidden.new_empty(0, 1, start, 1) for each in _unzip(held))
        entries.append(Entry(keys, values, hidden[row, start : len(one)]))
    return entries


def _unzip(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [keys for keys, _ in pairs], [values for _, values in pairs]


def padded(tokens: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, S], padded on the right, and their attention mask."""
    ids = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    lengths = torch.tensor([len(row) for row in tokens])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def join_entries(part: FrozenPart, entries: Sequence[Entry], starts: Sequence[int]) -> FrozenStates:
    """The entries of a batch's rows as one, in tensors of their own on the model's device."""
    before = max(starts)
    blocks, heads, _, _ = entries[0].keys.shape

    def left_padded(rows: list[Tensor]) -> Tensor:
        joined = torch.zeros(
            blocks, len(rows), heads, before, rows[0].shape[-1], dtype=rows[0].dtype, device=part.device
        )
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            joined[:, index, :, before - start :].copy_(row, non_blocking=True)
        return joined

    hidden = None
    if part.first:
        like = entries[0].hidden
        n = max(len(entry.hidden) for entry in entries)
        hidden = torch.zeros(len(entries), n, like.shape[-1], dtype=like.dtype, device=part.device)
        for index, entry in enumerate(entries):
            hidden[index, : len(entry.hidden)].copy_(entry.hidden, non_blocking=True)
    keys = left_padded([entry.keys for entry in entries])
    return FrozenStates(keys, left_padded([entry.values for entry in entries]), hidden)


class _FirstLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """A layer of transformers' cache for one call, which keeps keys and values as they come: under autocast they have
    different dtypes."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class _HeldLayer(DynamicLayer):  # type: ignore[misc,unused-ignore]
    """A layer of transformers' cache that holds keys and values [B, H, T, D] already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True


def as_cache(states: FrozenStates, part: FrozenPart) -> Cache:
    """transformers' cache of the states, for one call."""
    blocks, batch, _, before, _ = states.keys.shape
    # Masks are as long as the first layer says. A layer that is skipped is never read, and takes one value's room.
    like = states.keys.new_zeros(()).expand(batch, 1, before, 1)
    layers = [_HeldLayer(like, like) for _ in range(len(part.blocks) - blocks)]
    layers += [_HeldLayer(k, v) for k, v in zip(states.keys.unbind(0), states.values.unbind(0), strict=True)]
    return Cache(layers=layers)


@contextmanager
def skipped_blocks(part: FrozenPart, hidden: Tensor | None) -> Iterator[None]:
    """Within this context the blocks before the first edit compute nothing, and the last of them returns ``hidden``.

    Hooks of these blocks run as ever.
    """
    blocks: list[Any] = list(part.blocks[: part.first])
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = _returning(None, part.outputs)
    if blocks:
        blocks[-1].forward = _returning(hidden, part.outputs)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _returning(hidden: Tensor | None, outputs: int | None) -> Any:
    """A block's forward that returns these hidden states, or (None) those that it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        h = hidden
        if h is None:
            h = args[0] if args else kwargs["hidden_states"]
        return h if outputs is None else (h, *[None] * (outputs - 1))

    return forward
