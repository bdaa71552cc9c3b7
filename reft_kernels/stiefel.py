"""R itself as the parameter: with rows that optimisers keep orthonormal, or free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from reft_kernels.backends.eager_orthonormal import retracted
from reft_kernels.orthogonal import OrthonormalRows, check_orthonormal, check_rows, check_sizes, kept_wide, random_rows
from reft_kernels.problem import wide_default_dtype


class StiefelParameter(nn.Parameter):
    """A matrix [r, d] whose rows are orthonormal after every optimiser's step.

    :class:`reft_kernels.StiefelAdamW` sees to that within its step. After a step of any other torch optimiser it is
    replaced by its polar factor, the nearest matrix with orthonormal rows.
    """


class FreeRows(nn.Module):
    """R [r, d] as a parameter of its own, without a constraint; the start has orthonormal rows.

    The interface is that of :class:`reft_kernels.OrthonormalRows`: ``weight`` is R, in float32 at least.

    Raises:
        ValueError: r is not in [1, d].
    """

    orthogonality: ClassVar[str] = "none"

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        check_sizes(d, r)
        self.d, self.r = d, r
        self.R = nn.Parameter(torch.empty(r, d, dtype=wide_default_dtype()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws R uniformly among the matrices with orthonormal rows."""
        self.assign(random_rows(self.d, self.r))

    @torch.no_grad()
    def assign(self, R: Tensor) -> None:
        """Makes ``weight`` R [r, d]. Raises ValueError where the shape is another."""
        check_rows(R, self.d, self.r)
        if not self.R.is_meta:
            self.R.copy_(R)

    @property
    def weight(self) -> Tensor:
        """R [r, d], the parameter itself unless it was loaded in less than float32."""
        return self.R.to(torch.promote_types(self.R.dtype, torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FreeRows:
        """Moves to another device; a cast to less than float32 (``model.to(bfloat16)``) leaves the dtype alone."""
        super()._apply(kept_wide(fn), recurse)
        return self

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"d={self.d}, r={self.r}"


class StiefelRows(FreeRows):
    """R [r, d] with orthonormal rows as a parameter of its own: a point of the Stiefel manifold.

    Nothing is computed to read it. Its rows stay orthonormal by retraction: a step of an optimiser is followed by the
    polar factor (R R^T)^(-1/2) R, see :class:`StiefelParameter` and :class:`reft_kernels.StiefelAdamW`. Whatever else
    writes R answers for its rows.

    Raises:
        TypeError: R is replaced by a shard of it, as FSDP2 does: rows cannot be kept orthonormal piece by piece.
    """

    orthogonality: ClassVar[str] = "polar"

    @torch.no_grad()
    def assign(self, R: Tensor) -> None:
        """Makes ``weight`` R [r, d], or its polar factor where its rows are orthonormal to rounding only.

        Raises:
            ValueError: the shape is not [r, d], or the rows are further than 1e-2 from orthonormal.
        """
        check_rows(R, self.d, self.r)
        if self.R.is_meta:
            return
        check_orthonormal(R)
        super().assign(retracted(R.detach().to(self.R.dtype)))

    @property
    def weight(self) -> Tensor:
        """R [r, d], the parameter itself unless it was loaded in less than float32."""
        if type(self.R) is nn.Parameter:  # whoever made it
            self.R.__class__ = StiefelParameter
        return super().weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "R" and type(value).__name__ == "DTensor":
            raise TypeError(
                "R: expected a whole tensor, got a shard: rows cannot be kept orthonormal piece by piece. Use "
                "orthogonality='householder', or leave the interventions out of fully_shard (ignored_params)"
            )
        super().__setattr__(name, value)
        if name == "R" and type(value) is nn.Parameter:
            value.__class__ = StiefelParameter


Rows = OrthonormalRows | FreeRows

ORTHOGONALITIES: dict[str, type[Rows]] = {"householder": OrthonormalRows, "polar": StiefelRows, "none": FreeRows}


def make_rows(d: int, r: int, orthogonality: str) -> Rows:
    """A module whose ``weight`` is R [r, d], of one of :data:`ORTHOGONALITIES`.

    householder: R is a function of a free parameter, as in pyreft. polar: R is the parameter, and optimisers keep its
    rows orthonormal. none: R is the parameter and free.

    Raises ValueError for any other name, or where r is not in [1, d].
    """
    if orthogonality not in ORTHOGONALITIES:
        raise ValueError(f"orthogonality: expected one of {', '.join(ORTHOGONALITIES)}, got {orthogonality!r}")
    return ORTHOGONALITIES[orthogonality](d, r)


@torch.no_grad()
def retract_(parameters: Sequence[Tensor]) -> None:
    """Replaces each matrix [r, d] by its polar factor, the nearest one with orthonormal rows."""
    sizes: dict[tuple[torch.Size, torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        sizes.setdefault((parameter.shape, parameter.device, parameter.dtype), []).append(parameter)
    for same in sizes.values():
        for parameter, R in zip(same, retracted(torch.stack(same)), strict=True):
            parameter.copy_(R)


def _retract_after_step(optimizer: Optimizer, *_: Any) -> None:
    if getattr(optimizer, "retracts", False):
        return
    groups = optimizer.param_groups
    retract_([p for group in groups for p in group["params"] if isinstance(p, StiefelParameter) and p.grad is not None])


register_optimizer_step_post_hook(_retract_after_step)
