"""The state of ``torch.nn.utils.parametrizations.orthogonal``: from it to the matrix, and back.

For a tall matrix [n, k] (a wide one is the transpose of one) it keeps X [n, k] as ``original`` and, with
``use_trivialization``, B [n, n] as ``base``:

    n > k:   B H_1 ... H_k E diag(int(X_jj)),   H_j = I - tau_j v_j v_j^T,   v_j = e_j + (X below the diagonal)_j
    n = k:   B exp(tril(X) - tril(X)^T)

where tau_j = 2 / |v_j|^2 and E is the first k columns of the identity. int() cuts off: a diagonal entry that is not
at least 1 in size makes a column of zeros, as it does in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def parametrized_matrix(original: Tensor, base: Tensor | None = None) -> Tensor:
    """The matrix that the parametrization computes (its default maps), in float64 on the CPU.

    Args:
        original: X [n, k] or [k, n].
        base: B [n, n], n the larger; None without ``use_trivialization``.

    Raises ValueError where the shapes do not belong together.
    """
    if original.dim() != 2:
        raise ValueError(f"original: expected a matrix, got {list(original.shape)}")
    X = original.to("cpu", torch.float64)
    wide = X.shape[0] < X.shape[1]
    X = X.T if wide else X
    n, k = X.shape
    if base is not None and base.shape != (n, n):
        raise ValueError(f"base: expected {[n, n]} with an original of {list(original.shape)}, got {list(base.shape)}")
    if n == k:
        lower = X.tril()
        Q = torch.matrix_exp(lower - lower.T)
    else:
        lower = X.tril(-1)
        tau = 2 / (1 + lower.square().sum(0))
        Q = torch.linalg.householder_product(lower, tau) * X.diagonal().int()
    if base is not None:
        Q = base.to(Q) @ Q.contiguous()  # LAPACK leaves columns together, which multiply slowly
    return Q.T if wide else Q


@torch.no_grad()
def parametrization_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(original, base) of which the parametrization makes the matrix, bit for bit.

    Args:
        matrix: [n, k] or [k, n]; with orthonormal columns (rows) the base is orthogonal, completed by the same
            columns each time.

    Returns:
        original like the matrix, -1 on its diagonal and else 0; base [n, n], n the larger. On the CPU, in the dtype of
        the matrix.
    """
    M = matrix.detach().to("cpu", copy=True)
    tall = M.T if M.shape[0] < M.shape[1] else M
    n, k = tall.shape
    packed, tau = torch.geqrf(tall.double())
    base = torch.ormqr(packed, tau, torch.eye(n, dtype=torch.float64, device="cpu")).to(M.dtype)
    base[:, :k] = tall
    original = torch.zeros_like(M)
    original.diagonal().fill_(-1)
    return original, base
