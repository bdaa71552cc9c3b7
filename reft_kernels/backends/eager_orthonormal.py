"""Matrices with orthonormal rows in plain PyTorch operations: those of one size are one batch.

Sums over d are kept in float64: in float32 they cost R its orthonormality, 6e-6 at d = 4096.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem

name = "eager"

_TWO_PASSES_ABOVE = 16  # ranks whose Gram matrix one pass leaves 1e-6 off


def unavailable() -> str | None:
    """Always there."""
    return None


def unsupported_matrices(problem: OrthonormalProblem | StiefelProblem) -> str | None:
    """Takes all matrices."""
    return None


def orthonormalize_forward(problem: OrthonormalProblem) -> tuple[tuple[Tensor, ...], Tensor]:
    """Computes every R.

    Returns:
        R [r, d] of each, contiguous, and the factors of the backward, float64 [problem.factor_count].
    """
    p = problem
    factors = p.X[0].new_empty(p.factor_count, dtype=torch.float64)
    found: list[Tensor | None] = [None] * len(p.X)
    for members, places in _by_size(p.X):
        X, B, signs = (torch.stack([t[i] for i in members]) for t in p)
        r = X.shape[2]
        V, SV, diagonal = _reflectors(X, signs)
        U = torch.cat((SV, B), 2).double()
        gram = U.mT @ U  # [L, 2r, 2r]
        T, T_B, M = _inverse(gram[:, :r, :r]), _inverse(gram[:, r:, r:]), gram[:, r:, :r]
        C = T @ V[:, :r].mT.double()
        K = T_B @ ((B[:, :r] * signs[:, :, None]).mT.double() * diagonal[:, None] - M @ C * diagonal[:, None])
        weights = torch.cat((C * diagonal[:, None], K), 1)  # [L, 2r, r]
        R = -(weights.to(X.dtype).mT @ torch.cat((SV, B), 2).mT)
        R.diagonal(dim1=1, dim2=2).add_(signs * diagonal)
        for one, place, small in zip(R, places, torch.stack((T, C, T_B, M), 1), strict=True):
            found[place.index] = one
            factors[place.begin : place.end] = small.flatten()
    return tuple(R for R in found if R is not None), factors


def orthonormalize_backward(
    grads: Sequence[Tensor | None], problem: OrthonormalProblem, factors: Tensor
) -> tuple[Tensor | None, ...]:
    """Computes dL/dX [d, r] of each matrix from dL/dR [r, d]; None where ``grads`` has None.

    Args:
        grads: contiguous, of the dtype of X.
        problem: of the forward.
        factors: what the forward returned.
    """
    p = problem
    found: list[Tensor | None] = [None] * len(p.X)
    for members, places in _by_size(p.X, grads):
        X, B, signs = (torch.stack([t[i] for i in members]) for t in p)
        G = torch.stack([g for g in (grads[i] for i in members) if g is not None]).mT  # [L, d, r]
        d, r = X.shape[1:]
        V, SV, diagonal = _reflectors(X, signs)
        T, C, T_B, M = torch.stack([factors[at.begin : at.end].view(4, r, r) for at in places], 1)
        sums = torch.cat((SV, B), 2).double().mT @ G.double()  # [L, 2r, r]
        L = T_B.mT @ sums[:, r:]
        dC = -(sums[:, :r] - M.mT @ L) * diagonal[:, None]
        dinverse = -T.mT @ (dC @ V[:, :r].double()) @ T.mT
        dgram = dinverse.triu(1) + torch.diag_embed(dinverse.diagonal(dim1=1, dim2=2) / 2)
        DC = diagonal[:, :, None] * C.mT
        dV = (torch.cat((B, -G), 2) @ torch.cat((L @ DC, DC), 1).to(X.dtype)) * _padded(signs, d)[:, :, None]
        dV = dV + V @ (dgram + dgram.mT).to(X.dtype)
        dV[:, :r] += (dC.mT @ T).to(X.dtype)
        for one, place in zip(dV.tril(-1), places, strict=True):
            found[place.index] = one
    return tuple(found)


def stiefel_adamw_step(problem: StiefelProblem) -> Tensor | None:
    """Carries out the step, in place.

    Returns:
        The norm of all gradients before clipping, float64 []; None without ``max_norm``.
    """
    p = problem
    gradients = p.gradients
    if p.grad_scale is not None:
        inverse = 1 / p.grad_scale.double()
        gradients = tuple((g * inverse).to(g.dtype) for g in gradients)
    squares = [g.double().square().sum() if p.max_norm is not None or own else None for g, own in _zip(p, gradients)]
    norm = None
    goes = p.parameters[0].new_ones((), dtype=torch.bool)
    if p.found_inf is not None:
        goes = goes & (p.found_inf == 0)
    if p.max_norm is not None:
        norm = torch.stack([s for s in squares if s is not None]).sum().sqrt()
        goes = goes & norm.isfinite()
        clip = (p.max_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients = tuple((g * clip).to(g.dtype) for g in gradients)
    for i, (grad, square) in enumerate(zip(gradients, squares, strict=True)):
        _step_of_one(p, i, -grad if p.maximize else grad, goes if square is None else goes & square.isfinite())
    return norm


def _zip(p: StiefelProblem, gradients: Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    return zip(gradients, p.orthonormal, strict=True)


def _step_of_one(p: StiefelProblem, i: int, grad: Tensor, goes: Tensor) -> None:
    """The step of tensor i; where ``goes`` is False nothing of it changes."""
    parameter, exp_avg, exp_avg_sq, step = p.parameters[i], p.exp_avgs[i], p.exp_avg_sqs[i], p.steps[i]
    own = p.orthonormal[i]
    lr = p.lr.double() if isinstance(p.lr, Tensor) else p.lr
    if own and p.riemannian:
        A = grad.double() @ parameter.double().T
        grad = grad - ((A + A.T) / 2).to(grad.dtype) @ parameter
    t = (step + 1).double()
    correction1, correction2 = 1 - p.beta1**t, 1 - p.beta2**t
    first = torch.lerp(exp_avg, grad, 1 - p.beta1)
    second = exp_avg_sq * p.beta2 + (1 - p.beta2) * grad * grad
    denominator = second.sqrt() / correction2.sqrt().to(second.dtype) + p.eps
    moved = parameter if own else parameter * (1 - lr * p.weight_decays[i])
    moved = moved - (lr / correction1).to(moved.dtype) * (first / denominator)
    if own:
        moved = retracted(moved)
    for old, new in ((parameter, moved), (exp_avg, first), (exp_avg_sq, second), (step, step + 1)):
        old.copy_(torch.where(goes, new, old))


def retracted(P: Tensor) -> Tensor:
    """The polar factor (P P^T)^(-1/2) P of P [r, d], in the dtype of P."""
    for _ in range(1 if P.shape[0] <= _TWO_PASSES_ABOVE else 2):
        wide = P.double()
        P = (_inverse_root(wide @ wide.T) @ wide).to(P.dtype)
    return P


def _inverse_root(A: Tensor, iterations: int = 30) -> Tensor:
    """A^(-1/2) of a positive definite A [r, r] by the coupled Newton-Schulz iteration (Higham, 2008, 6.35).

    A fixed number of steps, so that nothing is read back: each adds a factor of 2.25 to what is small, then doubles
    the digits, so that 30 serve for condition numbers up to 1e8.
    """
    scale = A.abs().sum(1).max()  # an upper bound of the eigenvalues
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    Y, Z = A / scale, eye
    for _ in range(iterations):
        step = (3 * eye - Z @ Y) / 2
        Y, Z = Y @ step, step @ Z
    return Z / scale.sqrt()


class _Place:
    """Where a matrix is in the problem, and its factors among all of them."""

    def __init__(self, index: int, begin: int, r: int) -> None:
        self.index, self.begin, self.end = index, begin, begin + 4 * r * r


def _by_size(
    matrices: Sequence[Tensor], asked: Sequence[Tensor | None] | None = None
) -> Iterator[tuple[list[int], list[_Place]]]:
    """The matrices of each size among those asked for, as indices and places."""
    sizes: dict[torch.Size, list[_Place]] = {}
    begin = 0
    for index, matrix in enumerate(matrices):
        place = _Place(index, begin, matrix.shape[1])
        begin = place.end
        if asked is None or asked[index] is not None:
            sizes.setdefault(matrix.shape, []).append(place)
    for places in sizes.values():
        yield [place.index for place in places], places


def _reflectors(X: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V and S V [L, d, r], and the signs of the diagonal of X [L, r]."""
    V = X.tril(-1)
    V.diagonal(dim1=1, dim2=2).fill_(1)
    diagonal = torch.where(X.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(X.dtype)
    return V, V * _padded(signs, X.shape[1])[:, :, None], diagonal


def _padded(signs: Tensor, d: int) -> Tensor:
    """[L, r] to [L, d], with ones."""
    return torch.cat((signs, signs.new_ones(len(signs), d - signs.shape[1])), 1)


def _inverse(gram: Tensor) -> Tensor:
    """T [L, r, r] of a Gram matrix: the inverse of its strict upper part plus half its diagonal."""
    upper = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=1, dim2=2) / 2)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    T: Tensor = torch.linalg.solve_triangular(upper, eye.expand_as(gram), upper=True)
    return T
