"""The edit in plain PyTorch operations, on any device: what runs where no kernel does.

Reads the named rows, edits them in the accumulator's dtype and writes them back, without reading anything back to
the host: slots without a row (-1) are computed along and masked. With G weight sets each is applied to all named rows
and a mask picks, which costs G times the arithmetic of one and keeps what is not finite in one set's rows or weights
out of the others.

Under torch's transforms the forward's operations are differentiated as they stand; there a row that is not finite
reaches the gradients of every set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reft_kernels.philox import keep_mask
from reft_kernels.problem import EditProblem, Needs
from reft_kernels.reference import activate, activation_slope
from reft_kernels.transforms import torch_func_is_active, transformed

name = "eager"


def unavailable() -> str | None:
    """Always there."""
    return None


def unsupported(problem: EditProblem) -> str | None:
    """Takes every edit."""
    return None


def edit_forward(problem: EditProblem, inplace: bool, save_rows: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the edit.

    Returns:
        y [B, S, d] (h itself if ``inplace``); delta [N, r] and s [N, r] in the accumulator's dtype (s is empty for
        a linear activation; rows that are not edited hold zeros); the rows before the edit [N, d] if ``save_rows``,
        else empty.
    """
    p = problem
    if inplace and transformed(p):  # what is written must not be what a derivative is made of
        y, delta, s, saved = edit_forward(p._replace(h=p.h.clone()), False, save_rows)
        return p.h.copy_(y), delta, s, saved
    dtype = p.accumulator
    slots = _slots(p, p.h.shape)
    before = _read(p.h, slots)  # [N, d]
    x = before.to(dtype)
    R = p.R.to(dtype)

    s = x.new_empty(0)
    r = R.shape[1]
    if p.activation == "linear":
        weight, bias = _linear_down(p, R, dtype)
        delta = _down(x, weight, bias, slots, r)
    else:
        W, b = (None if t is None else t.to(dtype) for t in (p.W, p.b))
        s = _down(x, W, b, slots, r)
        delta = activate(s, p.activation)
        if p.subtract:
            delta = delta - _down(x, R, None if p.c is None else p.c.to(dtype), slots, r)
    if slots.idle is not None:
        delta = delta.masked_fill(slots.idle, 0)
        s = s.masked_fill(slots.idle, 0) if s.numel() else s

    # Without positions `before` may be a view of h, which is written below.
    saved = (before.clone() if slots.row is None else before) if save_rows else p.h.new_empty(0)
    scaled = _scaled(delta, p, slots)
    whole = slots.row is None and slots.idle is None
    if inplace and whole and p.dropout == 0 and x is before and _matrix(p.h) is not None:  # x is a view of h
        _add_up(x, scaled, R, slots, out=x)
        return p.h, delta, s, saved
    after = _add_up(x, scaled, R, slots)
    if p.dropout > 0:
        after = after.mul_(_keep_factor(p, slots, p.h.shape, dtype))
    return _write(p.h, slots, after.to(p.h.dtype), before, inplace), delta, s, saved


def edit_backward(
    grad: Tensor,
    problem: EditProblem,
    delta: Tensor,
    s: Tensor,
    needs: Needs,
    *,
    inplace: bool = False,
    rebuild: bool = False,
    into: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients asked for, from what :func:`edit_forward` returned.

    Args:
        grad: dL/dy [B, S, d]; not written unless ``inplace``.
        problem: of the forward; its h is the tensor before the edit [B, S, d] or the saved rows [N, d].
        delta, s: of the forward.
        needs: which gradients are asked for.
        inplace: ``grad`` may be overwritten: dh is then ``grad`` itself, of which the edited rows are written.
        rebuild: h is y [B, S, d], the tensor after the edit; the rows before it are y - scale * R^T delta. Never with
            dropout.
        into: for dR, dW, db and dc a contiguous tensor of their shape and of any floating dtype, or None. A gradient is
            added into its tensor, which is returned for it.

    Returns:
        dh [B, S, d], dR, dW, db, dc in the shapes and dtypes of their inputs; None where not needed.
    """
    p = problem
    dtype = p.accumulator
    slots = _slots(p, grad.shape)
    before = _read(grad, slots)
    g = before.to(dtype)
    if p.dropout > 0:
        g = g * _keep_factor(p, slots, grad.shape, dtype)
    if slots.idle is not None:  # rows that are not edited may hold anything, infinities included
        g = g.masked_fill(slots.idle, 0)
    R = p.R.to(dtype)
    gd = _scaled(_down(g, R, None, slots, R.shape[1]), p, slots)  # [N, r]
    gs = gd if p.activation == "linear" else gd * activation_slope(s, p.activation)

    dh = dR = dW = db = dc = None
    wanted_W = needs.W and p.W is not None
    if needs.R or wanted_W:  # before dh, which may overwrite what g is a view of
        scaled = _scaled(delta, p, slots)
        x = None
        if wanted_W or p.subtract:
            x = (p.h if p.h.dim() == 2 else _read(p.h, slots)).to(dtype)
            if rebuild:
                # Rounded as h was, which mostly undoes the rounding of y.
                x = _add_up(x, scaled, R, slots, sign=-1).to(p.h.dtype).to(dtype)
            if slots.idle is not None:
                x = x.masked_fill(slots.idle, 0)
        if wanted_W:
            assert x is not None
            dW = _outer(gs, x, slots)
        if needs.R:
            cross = None
            if p.subtract:
                assert x is not None
                cross = dW if dW is not None and p.activation == "linear" else _outer(gd, x, slots)
            dR = _outer(scaled, g, slots, minus=cross)
    if needs.b and p.b is not None:
        db = _sum_by_group(gs, slots)
    if needs.c and p.c is not None:
        dc = -_sum_by_group(gd, slots)
    if needs.h:
        after = g
        if p.activation == "linear":
            weight, _ = _linear_down(p, R, dtype)
            if weight is not None:
                after = _add_up(after, gd, weight, slots)
        else:
            if p.W is not None:
                after = _add_up(after, gs, p.W.to(dtype), slots)
            if p.subtract:
                after = _add_up(after, gd, R, slots, sign=-1)
        after = after.to(grad.dtype, copy=after is g and not inplace)  # g may be a view of the caller's grad
        dh = _write(grad, slots, after, before, inplace)
    found = zip((dR, dW, db, dc), (p.R, p.W, p.b, p.c), into or (None,) * 4, strict=True)
    dR, dW, db, dc = (_deliver(value, parameter, place) for value, parameter, place in found)
    return dh, dR, dW, db, dc


class _Slots(NamedTuple):
    """Which rows the slots of an edit name."""

    row: Tensor | None  # int64 [N], into [B * S, d]; without a row: that of position 0. None: slot n is row n
    idle: Tensor | None  # bool [N, 1], which slots edit nothing; None: none of them
    others: list[Tensor] | None  # bool [N, 1] of every group: which slots are not its own; None: one group for all

    @property
    def groups(self) -> int:
        return 1 if self.others is None else len(self.others)


def _slots(p: EditProblem, shape: torch.Size) -> _Slots:
    row = idle = others = None
    if p.positions is not None:
        length = max(shape[1], 1)
        start = torch.arange(0, shape[0] * length, length, device=p.positions.device).unsqueeze(1)
        inside = p.positions.clamp(0, length - 1)
        idle = inside != p.positions if shape[1] else torch.ones_like(inside, dtype=torch.bool)
        row = (start + inside).reshape(-1)
    if p.group is not None:
        unknown = p.group.clamp(0, p.R.shape[0] - 1) != p.group
        idle = unknown if idle is None else idle | unknown
        group = p.group.reshape(-1, 1)
        others = [group != g for g in range(p.R.shape[0])]
    return _Slots(row, None if idle is None else idle.reshape(-1, 1), others)


def _matrix(h: Tensor) -> Tensor | None:
    """h [B, S, d] as a view [B * S, d]; None where its strides do not allow one."""
    batch, length, d = h.shape
    if batch <= 1 or length <= 1 or h.stride(0) == length * h.stride(1):
        return h.view(batch * length, d)
    return None


def _read(h: Tensor, slots: _Slots) -> Tensor:
    """The slots' rows of h [B, S, d], as [N, d]; without positions a view of it where there is one."""
    if slots.row is None:
        return h.reshape(-1, h.shape[-1])
    length = h.shape[1]
    if length == 0:
        return h.new_zeros(slots.row.shape[0], h.shape[-1])
    flat = _matrix(h)
    return h[slots.row // length, slots.row % length] if flat is None else flat.index_select(0, slots.row)


def _write(h: Tensor, slots: _Slots, rows: Tensor, before: Tensor, inplace: bool) -> Tensor:
    """h with its slots' rows replaced by ``rows`` [N, d], where edited; there they are ``before`` as h has them."""
    if slots.idle is not None:
        rows = before.where(slots.idle, rows)
    if slots.row is None:
        return h.copy_(rows.view(h.shape)) if inplace else rows.contiguous().view(h.shape)
    length = h.shape[1]
    if rows.numel() == 0 or length == 0:
        return h if inplace else h.clone(memory_format=torch.contiguous_format)
    row = slots.row
    source = torch.arange(row.shape[0], device=row.device)
    if slots.idle is not None:
        # A slot without an edit repeats the first edited slot's write: the same values to the same row, whatever
        # the order. If no slot is edited, every slot writes back what slot 0 read.
        first = slots.idle.min(0).indices
        source = first.where(slots.idle.squeeze(1), source)
        row = row.index_select(0, source)
    if torch_func_is_active() or rows.requires_grad:
        # Read from rather than written to: a row that is written twice would count twice in a derivative.
        slot = row.new_full((h.shape[0] * length,), -1).index_put((row,), source).unsqueeze(1)
        y = rows.index_select(0, slot.clamp(min=0).squeeze(1)).where(slot >= 0, h.reshape(-1, h.shape[2]))
        return h.copy_(y.view(h.shape)) if inplace else y.view(h.shape)
    if slots.idle is not None:
        rows = rows.index_select(0, source)
    y = h if inplace else h.clone(memory_format=torch.contiguous_format)
    flat = _matrix(y)
    if flat is None:
        y.index_put_((row // length, row % length), rows)
    else:
        flat.index_put_((row,), rows)
    return y


def _keep_factor(p: EditProblem, slots: _Slots, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """0 or 1 / (1 - dropout) for every element of the slots' rows, [N, d]."""
    assert p.seed is not None
    row = torch.arange(shape[0] * shape[1], device=p.R.device) if slots.row is None else slots.row
    return keep_mask(p.seed, row, shape[2], p.dropout).to(dtype) / (1 - p.dropout)


def _linear_down(p: EditProblem, R: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The one product of a linear edit, delta = A h + e: A = W - gamma R [G, r, d], e = b - gamma c [G, r], formed
    before any rounding; None for zero."""
    weight = None if p.W is None else p.W.to(dtype)
    bias = None if p.b is None else p.b.to(dtype)
    if p.subtract:
        weight = -R if weight is None else weight - R
        if p.c is not None:
            bias = -p.c.to(dtype) if bias is None else bias - p.c.to(dtype)
    return weight, bias


def _scaled(u: Tensor, p: EditProblem, slots: _Slots) -> Tensor:
    """scale * u for rows u [N, r]; 0 where not edited, whatever the scale is there."""
    if p.scale is None:
        return u
    scale = p.scale.reshape(-1, 1).to(u.dtype)
    return u * (scale if slots.idle is None else scale.masked_fill(slots.idle, 0))


def _down(x: Tensor, weight: Tensor | None, bias: Tensor | None, slots: _Slots, r: int) -> Tensor:
    """x weight^T + bias by group, None for zero: [N, d], [G, r, d] and [G, r] to [N, r]."""
    biases: Iterable[Tensor | None] = [None] * slots.groups if bias is None else bias
    if weight is None:
        zero = x.new_zeros(x.shape[0], r)
        return _by_group((zero if e is None else zero + e for e in biases), slots)
    return _by_group((F.linear(x, w, e) for w, e in zip(weight, biases, strict=True)), slots)


def _by_group(parts: Iterable[Tensor], slots: _Slots) -> Tensor:
    """Of one tensor [N, ...] for each group every row from its own group's; rows without a group from the first."""
    out, *others = parts
    if slots.others is not None:
        for other, part in zip(slots.others[1:], others, strict=True):
            out = out.where(other, part)
    return out


def _add_up(x: Tensor, u: Tensor, weight: Tensor, slots: _Slots, *, sign: int = 1, out: Tensor | None = None) -> Tensor:
    """x + sign * u weight by group: [N, d], [N, r] and [G, r, d] to [N, d]; into ``out`` (x itself) where given."""
    if weight.shape[0] == 1:
        return torch.addmm(x, u, weight[0], alpha=sign, out=out)
    return torch.add(x, _by_group((u @ w for w in weight), slots), alpha=sign, out=out)


def _outer(left: Tensor, right: Tensor, slots: _Slots, minus: Tensor | None = None) -> Tensor:
    """left^T right - minus by group: [N, r], [N, d] and [G, r, d] to [G, r, d]."""
    if slots.others is None:
        return (left.T @ right if minus is None else torch.addmm(minus[0], left.T, right, beta=-1)).unsqueeze(0)
    parts = torch.stack([left.masked_fill(o, 0).T @ right.masked_fill(o, 0) for o in slots.others])
    return parts if minus is None else parts.sub_(minus)


def _sum_by_group(rows: Tensor, slots: _Slots) -> Tensor:
    """[N, r] summed over the rows of each group: [G, r]."""
    if slots.others is None:
        return rows.sum(0, keepdim=True)
    return torch.stack([rows.masked_fill(o, 0).sum(0) for o in slots.others])


def _deliver(value: Tensor | None, parameter: Tensor | None, place: Tensor | None) -> Tensor | None:
    """A gradient in its parameter's dtype, or added into its place."""
    if value is None or parameter is None:
        return None
    return value.to(parameter.dtype) if place is None else place.add_(value)
