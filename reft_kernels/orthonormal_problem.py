"""What a backend is given for matrices with orthonormal rows: a batch of parametrisations, or an optimiser's step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OrthonormalProblem(NamedTuple):
    """The householder parametrisations of L matrices R_l [r_l, d_l], of any sizes, as one call of a backend.

        R^T = H(B) S (E - V T V_top^T) D,    H(B) = I - B T_B B^T

    V is X below its diagonal plus the identity, D = diag(sign X_jj) with sign 0 = 1, E the first r columns of the
    identity, S = diag(signs, 1, ..., 1), V_top the first r rows of V, and T^-1 the strict upper part of V^T V plus
    half its diagonal, as T_B^-1 is of B^T B. All tensors are contiguous, on one device and of one dtype, float32 or
    float64; what the diagonal of X and the part above it hold beside the signs makes no difference.
    """

    X: tuple[Tensor, ...]  # [d, r] each
    reflectors: tuple[Tensor, ...]  # B [d, r], unit lower trapezoidal
    signs: tuple[Tensor, ...]  # [r], 1 or -1

    @property
    def factor_count(self) -> int:
        """Elements of ``factors``: of each matrix T, C = T V_top^T, T_B and M = B^T S V, [r, r] each, row by row."""
        return sum(4 * X.shape[1] ** 2 for X in self.X)


class StiefelProblem(NamedTuple):
    """One AdamW step of several tensors, some of which are matrices [r, d] whose rows stay orthonormal.

    All tensors but the scalars are contiguous, on one device and of one dtype, float32 or float64, and written in place
    but for ``gradients``; those that belong together have the same shape. See
    :class:`reft_kernels.stiefel_adamw.StiefelAdamW` for the formulas.
    """

    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    exp_avgs: tuple[Tensor, ...]
    exp_avg_sqs: tuple[Tensor, ...]
    steps: tuple[Tensor, ...]  # float32 [] each, on the same device: steps taken so far
    orthonormal: tuple[bool, ...]
    weight_decays: tuple[float, ...]  # without effect where orthonormal: the retraction would undo it
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    max_norm: float | None
    riemannian: bool
    maximize: bool
    grad_scale: Tensor | None  # float32 []: what the gradients were multiplied by
    found_inf: Tensor | None  # float32 []: not zero where the step shall change nothing

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters, gradients and moments."""
        return self.parameters[0].dtype


def device_and_dtype(problem: OrthonormalProblem | StiefelProblem) -> tuple[torch.device, torch.dtype]:
    """Of the problem's matrices."""
    first = problem[0][0]
    return first.device, first.dtype
