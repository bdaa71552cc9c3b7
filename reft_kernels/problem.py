"""One edit, checked and normalised: what a backend is given."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


class EditProblem(NamedTuple):
    """The operands of one edit of h, in one layout for every call.

    h is the tensor before the edit: [B, S, d] with unit inner stride or not, or, in a backward whose forward was
    in place, the N = B * P named rows alone, [N, d]. Row n is batch ``n // P``, slot ``n % P``; without positions
    P = S and the slot is the position. A row is edited if its position lies in [0, S) and its group in [0, G).
    """

    h: Tensor
    R: Tensor  # [G, r, d]
    W: Tensor | None  # [G, r, d]
    b: Tensor | None  # [G, r]
    c: Tensor | None  # [G, r]
    positions: Tensor | None  # int [B, P]
    group: Tensor | None  # int [B, P]
    scale: Tensor | None  # float [B, P]
    seed: Tensor | None  # int64 [1]
    subtract: bool
    activation: str
    dropout: float

    @property
    def accumulator(self) -> torch.dtype:
        """float64 where h or R is float64, else float32."""
        return accumulator_of(self.h.dtype, self.R.dtype)


class Needs(NamedTuple):
    """Which gradients are asked for."""

    h: bool
    R: bool
    W: bool
    b: bool
    c: bool


def accumulator_of(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def as_rows(h: Tensor, has_positions: bool) -> Tensor:
    """h [..., d] as [B, S, d], a view where its strides allow: itself with positions, else all rows as one batch."""
    if has_positions or h.dim() == 3:
        return h
    return h.unsqueeze(0) if h.dim() == 2 else h.reshape(1, -1, h.shape[-1])


def grouped(p: EditProblem) -> EditProblem:
    """The problem with R, W, b and c in the layout [G, ...]; without a group they are [r, d] and [r] before."""
    if p.group is not None:
        return p
    return EditProblem(
        p.h,
        p.R.unsqueeze(0),
        None if p.W is None else p.W.unsqueeze(0),
        None if p.b is None else p.b.unsqueeze(0),
        None if p.c is None else p.c.unsqueeze(0),
        p.positions,
        None,
        p.scale,
        p.seed,
        p.subtract,
        p.activation,
        p.dropout,
    )


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is enabled for ``device``; False for one that has none."""
    kind = device.type
    return _has_autocast(kind) and torch.is_autocast_enabled(kind)


@functools.cache
def _has_autocast(kind: str) -> bool:
    # The usual ones first: torch 2.11's Dynamo does not trace the question.
    return kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off for ``device``: the precision of an edit is its own."""
    return torch.autocast(device.type, enabled=False) if autocast_is_on(device) else nullcontext()


def wide_default_dtype() -> torch.dtype:
    """torch's default dtype, float32 where that is narrower."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)
