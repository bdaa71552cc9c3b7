"""The edits of a ReftModel made by hand: plain hooks, one row at a time, the intervention's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Rows = Sequence[Sequence[int]]
"""Positions of every row of the batch."""


@contextmanager
def edited_by_hand(edits: Sequence[tuple[nn.Module, str, nn.Module, Rows | None]]) -> Iterator[None]:
    """Edit (module, "output" or "input", intervention, positions or None for every token), in their order."""
    handles = []
    for module, side, intervention, rows in edits:
        if side == "output":
            handles.append(module.register_forward_hook(_output_hook(intervention, rows)))
        else:
            handles.append(module.register_forward_pre_hook(_input_hook(intervention, rows), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _edit(h: Tensor, intervention: nn.Module, rows: Rows | None) -> Tensor:
    parts = []
    for b in range(h.shape[0]):
        for s in range(h.shape[1]):
            row = h[b, s]
            named = rows is None or s in rows[b]
            parts.append(intervention(row[None])[0] if named else row)
    return torch.stack(parts).reshape(h.shape)


def _output_hook(intervention: nn.Module, rows: Rows | None) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_edit(output[0], intervention, rows), *output[1:])
        return _edit(output, intervention, rows)

    return hook


def _input_hook(intervention: nn.Module, rows: Rows | None) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (_edit(args[0], intervention, rows), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _edit(kwargs["hidden_states"], intervention, rows)}

    return hook


def greedy_by_hand(model: Any, batch: dict[str, Tensor], new: int, edits: list[Any]) -> Tensor:
    """Greedy decoding of ``new`` tokens by full passes without a cache, every one with the same edits."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(new):
        with torch.no_grad(), edited_by_hand(edits):
            places = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


def ends(mask: Tensor, first: int, last: int) -> tuple[list[list[int]], list[list[int]]]:
    """Columns of the first and of the last tokens of every row of a mask, at most half of the row each."""
    heads, tails = [], []
    for row in mask:
        columns = row.nonzero().flatten().tolist()
        half = len(columns) // 2
        heads.append(columns[: min(first, half)])
        tails.append(columns[len(columns) - min(last, half) :])
    return heads, tails


def strengthen(interventions: nn.Module) -> None:
    """Weights that make an edit change the output by far more than a rounding error."""
    with torch.no_grad():
        for name, parameter in interventions.named_parameters():
            if "rotate_layer" not in name:
                parameter.normal_(std=0.5)
