"""What the compiled and the Triton kernels are given: operands as they address them, and room for results."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reft_kernels.problem import EditProblem, Needs

OfWeights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_PLACES: OfWeights = (None, None, None, None)


def with_unit_stride(h: Tensor) -> Tensor:
    """h, or a copy of it, in which the elements of a row lie side by side."""
    return h if h.stride(-1) == 1 or h.shape[-1] <= 1 else h.contiguous()


def weights(p: EditProblem) -> OfWeights:
    """R, W, b and c, contiguous."""
    R, W, b, c = p[1:5]
    return (
        R.contiguous(),
        None if W is None else W.contiguous(),
        None if b is None else b.contiguous(),
        None if c is None else c.contiguous(),
    )


def forward_results(
    p: EditProblem, h: Tensor, rows: int, inplace: bool, save_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, of which the rows that no slot can name are those of h already; delta, s and the rows before the edit."""
    if inplace:
        y = h
    elif p.positions is None:
        y = torch.empty_like(h, memory_format=torch.contiguous_format)
    else:
        y = h.clone(memory_format=torch.contiguous_format)
    _, r, d = p.R.shape
    shape, accumulator = (rows, r), p.accumulator
    delta = h.new_empty(shape, dtype=accumulator)
    s = h.new_empty(0 if p.activation == "linear" else shape, dtype=accumulator)
    return y, delta, s, h.new_empty((rows, d) if save_rows else 0)


def weight_gradients(p: EditProblem, rows: int, needs: Needs, places: Sequence[Tensor | None]) -> OfWeights:
    """dR, dW, db and dc to be written, those asked for; of those with a place the place itself, to be added to."""
    found: list[Tensor | None] = []
    for weight, need, place in zip(p[1:5], needs[1:], places, strict=True):
        if weight is None or not need:
            found.append(None)
        elif place is not None:
            if rows:
                torch.autograd.graph.increment_version(place)  # a kernel's stores do not
            found.append(place)
        elif rows:
            found.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
        else:
            found.append(torch.zeros_like(weight, memory_format=torch.contiguous_format))
    dR, dW, db, dc = found
    return dR, dW, db, dc


def written_in_place(h: Tensor) -> None:
    """Counts a kernel's stores into h as a write of it, as autograd does with PyTorch's operations."""
    if not h.is_inference():
        torch.autograd.graph.increment_version(h)
