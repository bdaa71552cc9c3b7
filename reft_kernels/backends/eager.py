"""The edit in plain PyTorch operations, on any device: what runs where no kernel does.

Gathers the named rows, edits them in the accumulator's dtype and writes them back, without reading anything
back to the host. With G weight sets each is applied to all named rows and a mask picks, which costs G times the
arithmetic of one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.philox import keep_mask
from reft_kernels.problem import EditProblem, Needs, accumulator_of
from reft_kernels.reference import activate, activation_slope

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
    dtype = p.accumulator
    before = _gather(p.h, p.positions)  # [N, d]
    x = before.to(dtype)
    edited = _edited(p, p.h.shape[1])
    group = None if p.group is None else p.group.reshape(-1)

    s = x.new_empty(0)
    if p.activation == "linear":
        down = _linear_down(p, dtype)
        delta = x.new_zeros(x.shape[0], p.R.shape[1]) if down is None else _down(x, down, group)
        for bias, sign in ((p.b, 1), (p.c if p.subtract else None, -1)):
            if bias is not None:
                delta = delta.add(_pick(bias, group).to(dtype), alpha=sign)
    else:
        s = x.new_zeros(x.shape[0], p.R.shape[1]) if p.W is None else _down(x, p.W.to(dtype), group)
        if p.b is not None:
            s = s + _pick(p.b, group).to(dtype)
        delta = activate(s, p.activation)
        if p.subtract:
            delta = delta - _down(x, p.R.to(dtype), group)
            if p.c is not None:
                delta = delta - _pick(p.c, group).to(dtype)
    if edited is not None:
        delta = delta.where(edited[:, None], 0)
        s = s.where(edited[:, None], 0) if s.numel() else s

    scaled = delta if p.scale is None else delta * p.scale.reshape(-1, 1).to(dtype)
    after = x + _up(scaled, p.R.to(dtype), group)
    if p.dropout > 0:
        after = after.mul_(_keep_factor(p, p.h.shape, dtype))
    after = after.to(p.h.dtype)
    if edited is not None:
        after = after.where(edited[:, None], before)
    # Without positions `before` may be a view of h, which the write below may change.
    saved = (before.clone() if p.positions is None else before) if save_rows else p.h.new_empty(0)
    y = _write(p.h, p.positions, after, edited, inplace)
    return y, delta, s, saved


def edit_backward(
    grad: Tensor, problem: EditProblem, delta: Tensor, s: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Computes the gradients asked for, from what :func:`edit_forward` returned.

    ``grad`` is dL/dy [B, S, d] and is not written. Returns dh [B, S, d], dR, dW, db, dc in the shapes and dtypes of
    their inputs; None where not needed.
    """
    p = problem
    dtype = p.accumulator
    edited = _edited(p, grad.shape[1])
    group = None if p.group is None else p.group.reshape(-1)
    groups = p.R.shape[0]
    before = _gather(grad, p.positions)
    g = before.to(dtype)
    if p.dropout > 0:
        g = g * _keep_factor(p, grad.shape, dtype)
    if edited is not None:  # rows that are not edited may hold anything, infinities included
        g = g.where(edited[:, None], 0)

    R = p.R.to(dtype)
    gd = _down(g, R, group)  # [N, r]
    if p.scale is not None:
        gd = gd * p.scale.reshape(-1, 1).to(dtype)
    gs = gd if p.activation == "linear" else gd * activation_slope(s, p.activation)
    if edited is not None:
        gd, gs = gd.where(edited[:, None], 0), gs.where(edited[:, None], 0)

    dh = dR = dW = db = dc = None
    if needs.h:
        after = g
        if p.activation == "linear":
            down = _linear_down(p, dtype)
            if down is not None:
                after = g + _up(gd, down, group)
        else:
            if p.W is not None:
                after = after + _up(gs, p.W.to(dtype), group)
            if p.subtract:
                after = after - _up(gd, R, group)
        after = after.to(grad.dtype, copy=after is g)  # g may be a view of the caller's grad
        if edited is not None:
            after = after.where(edited[:, None], before)
        dh = _write(grad, p.positions, after, edited, inplace=False)
    if needs.R or (needs.W and p.W is not None):
        x = (p.h if p.h.dim() == 2 else _gather(p.h, p.positions)).to(dtype)
        if edited is not None:
            x = x.where(edited[:, None], 0)
        if needs.W and p.W is not None:
            dW = _outer(gs, x, group, groups)
        if needs.R:
            scaled = delta if p.scale is None else delta * p.scale.reshape(-1, 1).to(dtype)
            if edited is not None:
                scaled = scaled.where(edited[:, None], 0)
            dR = _outer(scaled, g, group, groups)
            if p.subtract:
                shared = dW is not None and p.activation == "linear"
                dR -= dW if shared and dW is not None else _outer(gd, x, group, groups)
            dR = dR.to(p.R.dtype)
        if dW is not None and p.W is not None:
            dW = dW.to(p.W.dtype)
    if needs.b and p.b is not None:
        db = _sum_by_group(gs, group, groups).to(p.b.dtype)
    if needs.c and p.c is not None:
        dc = -_sum_by_group(gd, group, groups).to(p.c.dtype)
    return dh, dR, dW, db, dc


def _edited(p: EditProblem, length: int) -> Tensor | None:
    """bool [N], which rows are edited; None if all are."""
    edited = None
    if p.positions is not None:
        edited = (p.positions >= 0) & (p.positions < length)
    if p.group is not None:
        known = (p.group >= 0) & (p.group < p.R.shape[0])
        edited = known if edited is None else edited & known
    return None if edited is None else edited.reshape(-1)


def _index(shape: torch.Size, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Batch and position of every slot, each int64 [N]; a slot without a position points at position 0."""
    batch = torch.arange(shape[0], device=positions.device)[:, None].expand(positions.shape)
    return batch.reshape(-1), positions.long().clamp(0, max(shape[1] - 1, 0)).reshape(-1)


def _gather(h: Tensor, positions: Tensor | None) -> Tensor:
    """The slots' rows of h [B, S, d], as [N, d]."""
    if positions is None:
        return h.reshape(-1, h.shape[-1])
    if h.shape[1] == 0:
        return h.new_zeros(positions.numel(), h.shape[-1])
    return h[_index(h.shape, positions)]


def _write(h: Tensor, positions: Tensor | None, rows: Tensor, edited: Tensor | None, inplace: bool) -> Tensor:
    """h with its slots' rows replaced by ``rows`` [N, d], where edited."""
    if positions is None:
        return h.copy_(rows.view(h.shape)) if inplace else rows.contiguous().view(h.shape)
    y = h if inplace else h.clone(memory_format=torch.contiguous_format)
    if rows.numel() == 0 or h.shape[1] == 0:
        return y
    batch, position = _index(h.shape, positions)
    if edited is not None:
        # A slot without an edit repeats the first edited slot's write: the same values to the same row, whatever
        # the order. If no slot is edited, slot 0 writes back what it read.
        first = edited.to(torch.uint8).argmax().view(1)
        batch, position = (i.where(edited, i.index_select(0, first)) for i in (batch, position))
        rows = rows.where(edited[:, None], rows.index_select(0, first))
    return y.index_put_((batch, position), rows)


def _keep_factor(p: EditProblem, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """0 or 1 / (1 - dropout) for every element of the slots' rows, [N, d]."""
    assert p.seed is not None
    if p.positions is None:
        rows = torch.arange(shape[0] * shape[1], device=p.R.device)
    else:
        batch, position = _index(shape, p.positions)
        rows = batch * shape[1] + position
    return keep_mask(p.seed, rows, shape[2], p.dropout).to(dtype) / (1 - p.dropout)


def _linear_down(p: EditProblem, dtype: torch.dtype) -> Tensor | None:
    """A = W - gamma R, formed before any rounding: the one product of a linear edit. None if A = 0."""
    if p.W is None:
        return -p.R.to(dtype) if p.subtract else None
    wide = accumulator_of(dtype, p.R.dtype)
    return p.W.to(wide) - p.R.to(wide) if p.subtract else p.W.to(wide)


def _pick(bias: Tensor, group: Tensor | None) -> Tensor:
    """The bias [G, r] of every row: [N, r], or [r] for all alike."""
    return bias[0] if group is None else bias[group.long().clamp(0, bias.shape[0] - 1)]


def _down(x: Tensor, weight: Tensor, group: Tensor | None) -> Tensor:
    """x weight^T by group: [N, d] and [G, r, d] to [N, r]."""
    if group is None:
        return x @ weight[0].T
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for g in range(weight.shape[0]):
        out = (x @ weight[g].T).where((group == g)[:, None], out)
    return out


def _up(u: Tensor, weight: Tensor, group: Tensor | None) -> Tensor:
    """u weight by group: [N, r] and [G, r, d] to [N, d]."""
    if group is None:
        return u @ weight[0]
    out = u.new_zeros(u.shape[0], weight.shape[2])
    for g in range(weight.shape[0]):
        out = (u @ weight[g]).where((group == g)[:, None], out)
    return out


def _outer(left: Tensor, right: Tensor, group: Tensor | None, groups: int) -> Tensor:
    """left^T right by group: [N, r] and [N, d] to [G, r, d]."""
    if group is None:
        return (left.T @ right)[None]
    parts = []
    for g in range(groups):
        own = (group == g)[:, None]
        parts.append(left.where(own, 0).T @ right.where(own, 0))
    return torch.stack(parts)


def _sum_by_group(rows: Tensor, group: Tensor | None, groups: int) -> Tensor:
    """[N, r] summed over the rows of each group: [G, r]."""
    if group is None:
        return rows.sum(0, keepdim=True)
    return torch.stack([rows.where((group == g)[:, None], 0).sum(0) for g in range(groups)])
