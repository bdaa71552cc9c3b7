"""Matrices with orthonormal rows, written down as the formulas say: the oracle of their tests, in float64 and slow.

Nothing here is fast or shares code with a backend: reflections are applied one by one, polar factors come from an SVD.
torch.func and forward-mode differentiation, which follow PyTorch's operations alone, take R from here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormalize(X: Tensor, reflectors: Tensor, signs: Tensor) -> Tensor:
    """R [r, d] of X [d, r] and a base, differentiable any number of times.

        R^T = B_1 ... B_r diag(signs, 1) H_1 ... H_r E diag(sign X_jj)

    with H_j = I - 2 v_j v_j^T / |v_j|^2, v_j = e_j + X below the diagonal of column j, and B_j the same of column j of
    ``reflectors``. Source: ``torch.nn.utils.parametrizations.orthogonal``, orthogonal_map="householder".
    """
    d, r = X.shape
    eye = torch.eye(d, r, dtype=X.dtype, device=X.device)
    Q = _reflected(X.tril(-1) + eye, eye * torch.where(X.diagonal() < 0, -1.0, 1.0).to(X.dtype))
    signs = torch.cat((signs.to(X.dtype), torch.ones(d - r, dtype=X.dtype, device=X.device)))
    return _reflected(reflectors.to(X.dtype), Q * signs[:, None]).T


def _reflected(V: Tensor, A: Tensor) -> Tensor:
    """H_1 ... H_r A."""
    for v in reversed(V.unbind(1)):
        A = A - torch.outer(v, v @ A) * (2 / (v @ v))
    return A


def polar(P: Tensor) -> Tensor:
    """The matrix with orthonormal rows nearest to P [r, d]: (P P^T)^(-1/2) P."""
    U, _, Vh = torch.linalg.svd(P, full_matrices=False)
    factor: Tensor = U @ Vh
    return factor


def tangent(R: Tensor, G: Tensor) -> Tensor:
    """G [r, d] projected on the tangent space of the Stiefel manifold at R: G - sym(G R^T) R.

    Source: Edelman, Arias and Smith, 1998, in the embedded metric.
    """
    A = G @ R.T
    return G - (A + A.T) / 2 @ R
