"""The compiled kernels for matrices with orthonormal rows: their ops in the native library, and calls of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reft_kernels.backends import native
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem

# Every tensor is the caller's: nothing is allocated. R and dX hold all matrices, one after the other.
SCHEMAS = (
    "native_orthonormalize_forward(Tensor[] X, Tensor[] reflectors, Tensor[] signs, Tensor(a!) R, "
    "Tensor(b!) factors) -> ()",
    "native_orthonormalize_backward(Tensor[] grads, Tensor[] X, Tensor[] reflectors, Tensor[] signs, Tensor factors, "
    "Tensor(a!) dX) -> ()",
    "native_stiefel_adamw_step(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, int[] orthonormal, float[] weight_decays, float lr, "
    "Tensor? lr_tensor, float beta1, float beta2, float eps, float max_norm, bool riemannian, bool maximize, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor(e!)? norm) -> ()",
)

_library = native.define("reft_kernels", SCHEMAS)


class NativeOrthonormalOps:
    """The calls of :class:`reft_kernels.backends.orthonormal_registry.OrthonormalBackend` by ops of a namespace."""

    def __init__(self, namespace: str) -> None:
        ops = getattr(torch.ops, namespace)
        self._forward: Callable[..., None] = ops.native_orthonormalize_forward.default
        self._backward: Callable[..., None] = ops.native_orthonormalize_backward.default
        self._step: Callable[..., None] = ops.native_stiefel_adamw_step.default

    def orthonormalize_forward(self, problem: OrthonormalProblem) -> tuple[tuple[Tensor, ...], Tensor]:
        """See :func:`reft_kernels.backends.eager_orthonormal.orthonormalize_forward`; every R is part of one tensor."""
        X = problem.X
        R = X[0].new_empty(sum(map(Tensor.numel, X)))
        factors = R.new_empty(problem.factor_count, dtype=torch.float64)
        self._forward(X, problem.reflectors, problem.signs, R, factors)
        return _parts(R, [(x.shape[1], x.shape[0]) for x in X]), factors

    def orthonormalize_backward(
        self, grads: Sequence[Tensor | None], problem: OrthonormalProblem, factors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """See :func:`reft_kernels.backends.eager_orthonormal.orthonormalize_backward`; the gradients as R there."""
        asked = [i for i, grad in enumerate(grads) if grad is not None]
        if not asked:
            return (None,) * len(grads)
        p = problem
        if len(asked) < len(grads):
            of_each = factors.split([4 * x.shape[1] ** 2 for x in p.X])
            factors = torch.cat([of_each[i] for i in asked])
            p = OrthonormalProblem(*(tuple(tensors[i] for i in asked) for tensors in p))
        dX = p.X[0].new_empty(sum(map(Tensor.numel, p.X)))
        self._backward([grads[i] for i in asked], p.X, p.reflectors, p.signs, factors, dX)
        parts = iter(_parts(dX, [x.shape for x in p.X]))
        return tuple(None if grad is None else next(parts) for grad in grads)

    def stiefel_adamw_step(self, problem: StiefelProblem) -> Tensor | None:
        """See :func:`reft_kernels.backends.eager_orthonormal.stiefel_adamw_step`."""
        p = problem
        norm = None if p.max_norm is None else p.steps[0].new_empty((), dtype=torch.float64)
        lr, lr_tensor = (0.0, p.lr) if isinstance(p.lr, Tensor) else (p.lr, None)
        self._step(
            p.parameters, p.gradients, p.exp_avgs, p.exp_avg_sqs, p.steps, p.orthonormal, p.weight_decays, lr,
            lr_tensor, p.beta1, p.beta2, p.eps, p.max_norm or 0.0, p.riemannian, p.maximize, p.grad_scale, p.found_inf,
            norm,
        )  # fmt: skip
        for written in (p.parameters, p.exp_avgs, p.exp_avg_sqs, p.steps):
            torch.autograd.graph.increment_version(written)
        return norm


def _parts(flat: Tensor, shapes: Sequence[tuple[int, int] | torch.Size]) -> tuple[Tensor, ...]:
    """One tensor as contiguous ones of these shapes."""
    if all(shape == shapes[0] for shape in shapes):
        return flat.view(len(shapes), *shapes[0]).unbind()
    pieces = flat.split([rows * columns for rows, columns in shapes])
    return tuple(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))


OPS = NativeOrthonormalOps("reft_kernels")
