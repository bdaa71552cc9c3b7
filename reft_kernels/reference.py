"""The mathematics of the ReFT edit in plain PyTorch: the oracle of every test.

For a row h of a hidden state, with R, W of shape [r, d] and b, c of shape [r]:

    y = D_p( h + scale * R^T delta ),   delta = f(s) - gamma * (R h + c),   s = W h + b

f is an activation, gamma is 0 or 1, and D_p is inverted dropout of the whole edited row. The classes of pyreft
(``pyreft/interventions.py``) and the equations of the paper (Wu et al., 2024, arXiv 2404.03592) are its rows:

    LoReFT   (eq. 2)       R orthonormal, W, b, gamma = 1
    NoReFT   (appendix E)  R free,        W, b, gamma = 1, c optional
    ConsReFT (appendix E)  R orthonormal, b,    gamma = 1
    LobiReFT (appendix E)  R orthonormal, b,    gamma = 0
    DiReFT   (appendix E)  R orthonormal, W, b, gamma = 0
    NodiReFT (eq. 3, the paper's DiReFT)  R free, W, b, gamma = 0

Backward, with g = D_p^T(dL/dy):

    gd = scale * R g          gs = gd * f'(s)
    dh = g + W^T gs - gamma R^T gd
    dW = sum gs h^T           db = sum gs
    dR = sum (scale * delta) g^T - gamma sum gd h^T
    dc = -gamma sum gd

because y depends on R in two places: as the up-projection R^T, and, where gamma = 1, inside delta.

Everything here is computed in the dtype of its inputs and stays readable rather than fast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reft_kernels.philox import keep_mask

ACTIVATIONS = ("linear", "relu", "gelu", "silu", "tanh")


def activate(s: Tensor, activation: str) -> Tensor:
    """f(s), elementwise. ``gelu`` is the exact one, s * Phi(s)."""
    if activation == "linear":
        return s
    if activation == "relu":
        return torch.relu(s)
    if activation == "gelu":
        return F.gelu(s)
    if activation == "silu":
        return F.silu(s)
    if activation == "tanh":
        return torch.tanh(s)
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def activation_slope(s: Tensor, activation: str) -> Tensor:
    """f'(s), elementwise; 0 at the kink of relu, as PyTorch has it."""
    if activation == "linear":
        return torch.ones_like(s)
    if activation == "relu":
        return (s > 0).to(s.dtype)
    if activation == "gelu":
        density = torch.exp(-0.5 * s * s) * 0.3989422804014327  # 1 / sqrt(2 pi)
        return 0.5 * (1 + torch.erf(s * 0.7071067811865476)) + s * density
    if activation == "silu":
        sigmoid = torch.sigmoid(s)
        return sigmoid * (1 + s * (1 - sigmoid))
    if activation == "tanh":
        return 1 - torch.tanh(s) ** 2
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


class NamedRows(NamedTuple):
    """The rows that an edit touches, N of them."""

    rows: Tensor  # int64 [N], into h.reshape(-1, d)
    group: Tensor  # int64 [N], into the first dimension of R
    scale: Tensor  # [N]


def named_rows(h: Tensor, positions: Tensor | None, group: Tensor | None, scale: Tensor | None) -> NamedRows:
    """Lists the rows that ``positions`` and ``group`` name; a negative entry of either names none."""
    if positions is None:
        rows = torch.arange(h[..., 0].numel(), device=h.device)
    else:
        batch, length = h.shape[:2]
        rows = positions.long() + torch.arange(batch, device=h.device)[:, None] * length
        rows = rows.where(positions >= 0, -1).reshape(-1)
    groups = torch.zeros_like(rows) if group is None else group.reshape(-1).long()
    scales = h.new_ones(rows.shape) if scale is None else scale.reshape(-1).to(h.dtype)
    named = (rows >= 0) & (groups >= 0)
    return NamedRows(rows[named], groups[named], scales[named])


def edit(
    h: Tensor,
    R: Tensor,
    W: Tensor | None = None,
    b: Tensor | None = None,
    *,
    c: Tensor | None = None,
    positions: Tensor | None = None,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    subtract: bool = True,
    activation: str = "linear",
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The edit, differentiable by autograd. Arguments as in :func:`reft_kernels.edit`, all of one dtype.

    Returns:
        The shape of h; rows that are not named are those of h, bit for bit.
    """
    grouped = group is not None
    R_, W_, b_, c_ = (t if t is None or grouped else t[None] for t in (R, W, b, c))
    assert R_ is not None
    rows, groups, scales = named_rows(h, positions, group, scale)
    flat = h.reshape(-1, h.shape[-1])
    x = flat[rows]  # [N, d]
    s = pre_activation(x, W_, b_, R_, groups)
    delta = activate(s, activation)
    if subtract:
        delta = delta - torch.einsum("nrd,nd->nr", R_[groups], x)
        if c_ is not None:
            delta = delta - c_[groups]
    y = x + scales[:, None] * torch.einsum("nrd,nr->nd", R_[groups], delta)
    if dropout > 0:
        assert seed is not None
        y = torch.where(keep_mask(seed, rows, h.shape[-1], dropout), y / (1 - dropout), torch.zeros_like(y))
    return flat.index_put((rows,), y).reshape(h.shape)


def pre_activation(x: Tensor, W: Tensor | None, b: Tensor | None, R: Tensor, groups: Tensor) -> Tensor:
    """s = W x + b for rows x [N, d] with weights [G, r, d]; a missing W or b counts as zero. Returns [N, r]."""
    s = x.new_zeros(x.shape[0], R.shape[-2])
    if W is not None:
        s = s + torch.einsum("nrd,nd->nr", W[groups], x)
    if b is not None:
        s = s + b[groups]
    return s


class EditGradients(NamedTuple):
    """Gradients in the shapes of their inputs; None where the input is None."""

    h: Tensor
    R: Tensor
    W: Tensor | None
    b: Tensor | None
    c: Tensor | None


def edit_backward(
    grad: Tensor,
    h: Tensor,
    R: Tensor,
    W: Tensor | None = None,
    b: Tensor | None = None,
    *,
    c: Tensor | None = None,
    positions: Tensor | None = None,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    subtract: bool = True,
    activation: str = "linear",
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> EditGradients:
    """The hand-derived backward of :func:`edit`: the gradients for ``grad`` = dL/dy of the shape of h."""
    grouped = group is not None
    R_, W_, b_, c_ = (t if t is None or grouped else t[None] for t in (R, W, b, c))
    assert R_ is not None
    rows, groups, scales = named_rows(h, positions, group, scale)
    x = h.reshape(-1, h.shape[-1])[rows]  # [N, d]
    g = grad.reshape(-1, h.shape[-1])[rows]  # [N, d]
    if dropout > 0:
        assert seed is not None
        g = torch.where(keep_mask(seed, rows, h.shape[-1], dropout), g / (1 - dropout), torch.zeros_like(g))
    s = pre_activation(x, W_, b_, R_, groups)
    delta = activate(s, activation)
    if subtract:
        delta = delta - torch.einsum("nrd,nd->nr", R_[groups], x)
        if c_ is not None:
            delta = delta - c_[groups]

    gd = scales[:, None] * torch.einsum("nrd,nd->nr", R_[groups], g)
    gs = gd * activation_slope(s, activation)
    dx = g.clone()
    dR = outer_by_group(scales[:, None] * delta, g, groups, R_)
    if W_ is not None:
        dx += torch.einsum("nrd,nr->nd", W_[groups], gs)
    if subtract:
        dx -= torch.einsum("nrd,nr->nd", R_[groups], gd)
        dR -= outer_by_group(gd, x, groups, R_)
    dh = grad.reshape(-1, h.shape[-1]).index_put((rows,), dx).reshape(h.shape)
    dW = None if W_ is None else outer_by_group(gs, x, groups, W_)
    db = None if b_ is None else torch.zeros_like(b_).index_add(0, groups, gs)
    dc = None if c_ is None else torch.zeros_like(c_)
    if dc is not None and subtract:
        dc = dc.index_add(0, groups, -gd)
    shaped = (t if t is None or grouped else t[0] for t in (dR, dW, db, dc))
    return EditGradients(dh, *shaped)  # type: ignore[arg-type]


def outer_by_group(left: Tensor, right: Tensor, groups: Tensor, like: Tensor) -> Tensor:
    """sum over the rows n of group g of left[n] right[n]^T: [N, r] and [N, d] to [G, r, d]."""
    products = left[:, :, None] * right[:, None, :]  # [N, r, d]
    return torch.zeros_like(like).index_add(0, groups, products)
