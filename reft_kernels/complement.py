"""Rows that are orthonormal among themselves and to others that are given: for subspaces trained apart.

Two interventions whose R have orthogonal rows edit different subspaces of a hidden state, so that both may be put into
one model, in any order, and neither undoes what the other has done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reft_kernels.orthogonal import check_orthonormal, check_rows, check_sizes, kept_wide
from reft_kernels.problem import wide_default_dtype, without_autocast
from reft_kernels.stiefel import Rows, make_rows


class ComplementRows(nn.Module):
    """R [r, d], orthonormal in the way of ``orthogonality``, with R fixed^T = 0 for constant rows [k, d].

        R = [0 | R'] H^T,    H = I - F T F^T

    where R' [r, d - k] is a module of its own (``inner``) and H the product of k reflections that takes the first k
    unit vectors to the span of the given rows; it is kept as their k vectors F [d, k].

    Args:
        d: the length of a row.
        r: the number of rows, at most d - k.
        orthogonality: of R', see :func:`reft_kernels.stiefel.make_rows`.
        fixed: [k, d] with orthonormal rows; copied. Or k alone, for rows that a state dict brings.

    Raises:
        ValueError: r is not in [1, d - k], ``fixed`` is not [k, d], or its rows are not orthonormal.
    """

    reflectors: Tensor

    def __init__(self, d: int, r: int, orthogonality: str, fixed: Tensor | int) -> None:
        super().__init__()
        self.k = k = fixed if isinstance(fixed, int) else len(fixed)
        check_sizes(d, k)
        if not 1 <= r <= d - k:
            raise ValueError(
                f"r: expected 1 <= r <= d - k = {d - k}, as {k} rows are given to be orthogonal to; got {r}"
            )
        self.d, self.r = d, r
        self.inner: Rows = make_rows(d - k, r, orthogonality)
        self.register_buffer("reflectors", torch.eye(d, k, dtype=wide_default_dtype()))
        if isinstance(fixed, Tensor):
            check_rows(fixed, d, k)
            check_orthonormal(fixed)
            packed, _ = torch.geqrf(fixed.detach().to("cpu", torch.float64).T)
            self.reflectors.copy_(packed.tril(-1) + torch.eye(d, k, device="cpu"))

    @property
    def orthogonality(self) -> str:
        """That of R'."""
        return self.inner.orthogonality

    @property
    def fixed(self) -> Tensor:
        """Orthonormal rows [k, d] with the span of the given ones."""
        eye = torch.eye(self.k, self.d, dtype=self.reflectors.dtype, device=self.reflectors.device)
        return self._turned(eye, transposed=False)

    def reset_parameters(self) -> None:
        """Draws R uniformly among those that are orthogonal to the given rows."""
        self.inner.reset_parameters()

    @torch.no_grad()
    def assign(self, R: Tensor) -> None:
        """Makes ``weight`` R [r, d].

        Raises:
            ValueError: the shape is not [r, d], or the rows are further than 1e-2 from orthonormal, to the given ones
                or (not with orthogonality="none") among themselves.
        """
        check_rows(R, self.d, self.r)
        if self.reflectors.is_meta:
            return
        turned = self._turned(R.detach().to(self.reflectors), transposed=True)
        overlap = float(turned[:, : self.k].abs().max())
        if not overlap <= 1e-2:
            raise ValueError(f"R: expected rows orthogonal to the given ones, got a product of {overlap:.2g}")
        self.inner.assign(turned[:, self.k :])

    @property
    def weight(self) -> Tensor:
        """R [r, d]."""
        R = self.inner.weight
        with without_autocast(R.device):
            return self._turned(torch.cat((R.new_zeros(self.r, self.k), R), 1), transposed=False)

    def _turned(self, rows: Tensor, transposed: bool) -> Tensor:
        """rows H^T, or rows H. Sums over d in float64, as for every R."""
        F = self.reflectors.to(rows.dtype)
        wide = F.double()
        gram = wide.T @ wide
        inverse = gram.triu(1) + (gram.diagonal() / 2).diag()  # T^-1
        coefficients: Tensor = torch.linalg.solve_triangular(
            inverse if transposed else inverse.T, rows.double() @ wide, upper=transposed, left=False
        )
        return rows - coefficients.to(rows.dtype) @ F.T

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComplementRows:
        """Moves to another device; a cast to less than float32 (``model.to(bfloat16)``) leaves the dtype alone."""
        super()._apply(kept_wide(fn), recurse)
        return self

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"d={self.d}, r={self.r}, k={self.k}"
