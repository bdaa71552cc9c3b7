"""The layers behind ``rotate_layer``: R with orthonormal rows, and pyreft's own layer for own classes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.complement import ComplementRows
from reft_kernels.orthogonal import OrthonormalRows, check_orthonormal, row_error
from reft_kernels.stiefel import Rows, make_rows, retract_

# |R R^T - I| of rows that were orthonormal when they were rounded to float32.
_ROUNDING = 1e-5


class RotateLayer(nn.Module):
    """R with orthonormal rows under pyreft's name: ``weight`` is R^T [d, r], readable and assignable.

    Args:
        d, r: the sizes.
        orthogonality: see :func:`reft_kernels.stiefel.make_rows`.
        orthogonal_to: rows [k, d] that R stays orthogonal to, or k, see :class:`ComplementRows`.

    Raises:
        ValueError: an assigned weight is not [d, r] or its columns are not orthonormal.
    """

    def __init__(
        self, d: int, r: int, orthogonality: str = "householder", orthogonal_to: Tensor | int | None = None
    ) -> None:
        super().__init__()
        self.rows: Rows | ComplementRows = (
            make_rows(d, r, orthogonality)
            if orthogonal_to is None
            else ComplementRows(d, r, orthogonality, orthogonal_to)
        )

    def set_orthogonality(self, orthogonality: str, project: bool = False) -> None:
        """Another parametrisation of the same R; ``project`` takes the nearest orthonormal rows where they are not."""
        self.rows = self.converted(orthogonality, project)

    @torch.no_grad()
    def converted(self, orthogonality: str, project: bool = False) -> Rows | ComplementRows:
        """What :meth:`set_orthogonality` puts in the place of ``rows``. Raises ValueError where that cannot hold R."""
        R = self.rows.weight.detach().clone()
        if project:
            retract_([R])
        fixed = self.rows.fixed if isinstance(self.rows, ComplementRows) else None
        d, r = self.rows.d, self.rows.r
        rows = make_rows(d, r, orthogonality) if fixed is None else ComplementRows(d, r, orthogonality, fixed)
        rows = rows.to(R.device, R.dtype)
        rows.assign(R)
        rows.requires_grad_(any(p.requires_grad for p in self.rows.parameters()))
        return rows.train(self.rows.training)

    @torch.no_grad()
    def state_of(self, R: Tensor) -> dict[str, Tensor]:
        """The state dict with which this layer has the R [r, d] of another library's file; nothing is changed.

        Where this layer keeps its rows orthonormal, R is replaced by the nearest matrix that has such rows, with a
        warning if it is off by more than rounding in float32.

        Raises:
            ValueError: the shape is not [r, d], or rows that are to be orthonormal are further than 1e-2 from that.
        """
        rows = copy.deepcopy(self.rows)
        if any(p.is_meta for p in rows.parameters()):
            if isinstance(rows, ComplementRows):
                raise ValueError("orthogonal_to: expected the given rows, got rows on the meta device")
            rows.to_empty(device="cpu")
        rows.to("cpu")
        R = R.detach().to("cpu", torch.float64)
        if rows.orthogonality != "none" and R.shape == (rows.r, rows.d):
            check_orthonormal(R, "; orthogonality='none' takes them as they are")
            if (error := row_error(R)) > _ROUNDING:
                warnings.warn(
                    f"R was saved with |R R^T - I| = {error:.2g}: the nearest orthonormal rows are taken", stacklevel=2
                )
            retract_([R])
        rows.assign(R)
        return {f"rows.{name}": value for name, value in rows.state_dict().items()}

    @property
    def weight(self) -> Tensor:
        """R^T [d, r] in float32, differentiable to the parameter behind it."""
        return self.rows.weight.T

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # also for an nn.Parameter, which nn.Module would register
            self.rows.assign(value.T)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """x R^T in the dtype of R: [..., d] to [..., r]."""
        weight = self.weight
        return x.to(weight.dtype) @ weight


def orthonormal_parts(interventions: Iterable[nn.Module]) -> list[OrthonormalRows]:
    """The parametrisations of those interventions' R that are computed, all in one, from free parameters."""
    layers = (getattr(module, "rotate_layer", None) for module in interventions)
    rows = (layer.rows for layer in layers if isinstance(layer, RotateLayer))
    parts = (one.inner if isinstance(one, ComplementRows) else one for one in rows)
    return [part for part in parts if isinstance(part, OrthonormalRows)]


class LowRankRotateLayer(nn.Module):
    """x R^T [..., r] with ``weight`` = R^T [n, m] a float32 parameter (pyreft ``LowRankRotateLayer``).

    For own interventions that wrap it in ``torch.nn.utils.parametrizations.orthogonal`` as pyreft's do, at the price
    that has there. The library's interventions have :class:`RotateLayer`.

    Args:
        n, m: d and r.
        init_orth: start with orthonormal columns; else the weight is as ``torch.empty`` leaves it.
    """

    def __init__(self, n: int, m: int, init_orth: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, m), requires_grad=True)
        if init_orth:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] to [..., m], in the dtype of the weight."""
        weight = self.weight
        return x.to(weight.dtype) @ weight
