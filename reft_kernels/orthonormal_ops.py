"""The householder map of many matrices as ``torch.library`` ops, for ``torch.compile`` and ``torch.export``.

``reft_kernels::orthonormalize_forward`` and ``reft_kernels::orthonormalize_backward`` are functional, the first with
autograd; they take the operands of :class:`reft_kernels.orthonormal_problem.OrthonormalProblem`. In eager mode
:mod:`reft_kernels.orthogonal` calls the same backends without the ops' cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reft_kernels.backends.orthonormal_registry import choose
from reft_kernels.ops import library
from reft_kernels.orthonormal_problem import OrthonormalProblem

NO_SECOND_DERIVATIVE = (
    "reft_kernels: the map to orthonormal rows has no second derivative (double backward); "
    "reft_kernels.orthonormal_reference.orthonormalize is differentiable any number of times"
)

_OPERANDS = "Tensor[] X, Tensor[] reflectors, Tensor[] signs"

library.define(f"orthonormalize_forward({_OPERANDS}, str backend) -> (Tensor[] R, Tensor factors)")
library.define(f"orthonormalize_backward(Tensor[] grads, {_OPERANDS}, Tensor factors, str backend) -> Tensor[] dX")


def _forward(X: list[Tensor], reflectors: list[Tensor], signs: list[Tensor], backend: str) -> tuple[Any, ...]:
    problem = _checked(X, reflectors, signs)
    R, factors = choose(backend, problem).orthonormalize_forward(problem)
    return _apart(R), factors


def _checked(X: list[Tensor], reflectors: list[Tensor], signs: list[Tensor]) -> OrthonormalProblem:
    """The operands, contiguous. Raises ValueError where they do not belong together."""
    if not len(X) == len(reflectors) == len(signs) > 0:
        raise ValueError(
            "X, reflectors, signs: expected as many of each and at least one, "
            f"got {len(X)}, {len(reflectors)} and {len(signs)}"
        )
    first = X[0]
    for i, (x, B, s) in enumerate(zip(X, reflectors, signs, strict=True)):
        if x.dim() != 2 or B.shape != x.shape or s.shape != x.shape[1:] or x.shape[0] < x.shape[1]:
            raise ValueError(
                f"X, reflectors, signs number {i}: expected [d, r], [d, r] and [r] with r <= d, "
                f"got {list(x.shape)}, {list(B.shape)} and {list(s.shape)}"
            )
        if any(t.dtype != first.dtype or t.device != first.device for t in (x, B, s)):
            raise ValueError(
                f"X, reflectors, signs number {i}: expected {first.dtype} on {first.device}, as the first X"
            )
    return OrthonormalProblem(*(tuple(t.contiguous() for t in ts) for ts in (X, reflectors, signs)))


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each in memory of its own, as the outputs of an op must be; backends cut theirs from one piece."""
    return [t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in tensors]


def _backward(
    grads: list[Tensor], X: list[Tensor], reflectors: list[Tensor], signs: list[Tensor], factors: Tensor, backend: str
) -> list[Tensor]:
    problem = _checked(X, reflectors, signs)
    contiguous = [g.contiguous() for g in grads]
    found = choose(backend, problem).orthonormalize_backward(contiguous, problem, factors)
    return _apart([t for t in found if t is not None])


def _forward_fake(X: list[Tensor], reflectors: list[Tensor], signs: list[Tensor], backend: str) -> tuple[Any, ...]:
    problem = OrthonormalProblem(tuple(X), tuple(reflectors), tuple(signs))
    R = [x.new_empty(x.shape[1], x.shape[0]) for x in X]
    return R, X[0].new_empty(problem.factor_count, dtype=torch.float64)


def _backward_fake(grads: list[Tensor], X: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in X]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    X, reflectors, signs, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*X, *reflectors, *signs, output[1])


def _autograd(ctx: Any, grads: Sequence[Tensor], _grad_factors: Tensor) -> tuple[Any, ...]:
    *operands, factors = ctx.saved_tensors
    count = len(operands) // 3
    X, reflectors, signs = (list(operands[i * count : (i + 1) * count]) for i in range(3))
    dX = torch.ops.reft_kernels.orthonormalize_backward(
        [torch.zeros_like(x).T.contiguous() if g is None else g for g, x in zip(grads, X, strict=True)],
        X, reflectors, signs, factors, ctx.backend,
    )  # fmt: skip
    return dX, [None] * count, [None] * count, None


def _no_second(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(NO_SECOND_DERIVATIVE)


library.impl("orthonormalize_forward", _forward, "CompositeExplicitAutograd")
library.impl("orthonormalize_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("reft_kernels::orthonormalize_forward", _forward_fake, lib=library)
torch.library.register_fake("reft_kernels::orthonormalize_backward", _backward_fake, lib=library)
torch.library.register_autograd(
    "reft_kernels::orthonormalize_forward", _autograd, setup_context=_setup_context, lib=library
)
torch.library.register_autograd(
    "reft_kernels::orthonormalize_backward", _no_second, setup_context=lambda ctx, inputs, output: None, lib=library
)
