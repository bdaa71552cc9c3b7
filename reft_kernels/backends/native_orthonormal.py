"""The compiled kernels for matrices with orthonormal rows: their ops in the native library, and calls of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reft_kernels.backends import native
from reft_kernels.backends.barrier_words import barrier_word_beside
from reft_kernels.backends.native_schemas import ORTHONORMAL_SCHEMAS
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem

_library = native.define("reft_kernels", ORTHONORMAL_SCHEMAS)


class NativeOrthonormalOps:
    """The calls of :class:`reft_kernels.backends.orthonormal_registry.OrthonormalBackend` by ops of a namespace."""

    def __init__(self, namespace: str) -> None:
        ops = getattr(torch.ops, namespace)
        self._forward: Callable[..., None] = ops.native_orthonormalize_forward.default
        self._backward: Callable[..., None] = ops.native_orthonormalize_backward.default
        self._step: Callable[..., None] = ops.native_stiefel_adamw_step.default

    def orthonormalize_forward(self, problem: OrthonormalProblem) -> tuple[tuple[Tensor, ...], Tensor]:
        """See :func:`reft_kernels.backends.eager_orthonormal.orthonormalize_forward`; every R is part of one tensor."""
        p = problem
        if not p.X:
            return (), torch.empty(0, dtype=torch.float64)
        R, parts = _parts_of_one(p.X[0], [x.shape[::-1] for x in p.X])
        factors = R.new_empty(sum(4 * len(part) ** 2 for part in parts), dtype=torch.float64)
        self._forward(p.X, p.reflectors, p.signs, R, factors, barrier_word_beside(R))
        return parts, factors

    def orthonormalize_backward(
        self, grads: Sequence[Tensor | None], problem: OrthonormalProblem, factors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """See :func:`reft_kernels.backends.eager_orthonormal.orthonormalize_backward`; the gradients as R there."""
        p = problem
        some = [grad for grad in grads if grad is not None]
        if not some:
            return (None,) * len(grads)
        if len(some) < len(grads):
            asked = [i for i, grad in enumerate(grads) if grad is not None]
            of_each = factors.split([4 * x.shape[1] ** 2 for x in p.X])
            factors = torch.cat([of_each[i] for i in asked])
            p = OrthonormalProblem(*(tuple(tensors[i] for i in asked) for tensors in p))
        dX, parts = _parts_of_one(p.X[0], [x.shape for x in p.X])
        self._backward(some, p.X, p.reflectors, p.signs, factors, dX, barrier_word_beside(dX))
        if len(some) == len(grads):
            return parts
        remaining = iter(parts)
        return tuple(None if grad is None else next(remaining) for grad in grads)

    def stiefel_adamw_step(self, problem: StiefelProblem) -> Tensor | None:
        """See :func:`reft_kernels.backends.eager_orthonormal.stiefel_adamw_step`."""
        p = problem
        if not p.parameters:
            return None if p.max_norm is None else torch.zeros((), dtype=torch.float64)
        norm = None if p.max_norm is None else p.steps[0].new_empty((), dtype=torch.float64)
        lr, lr_tensor = (0.0, p.lr) if isinstance(p.lr, Tensor) else (p.lr, None)
        self._step(
            p.parameters, p.gradients, p.exp_avgs, p.exp_avg_sqs, p.steps, p.orthonormal, p.weight_decays, lr,
            lr_tensor, p.beta1, p.beta2, p.eps, p.max_norm or 0.0, p.riemannian, p.maximize, p.grad_scale, p.found_inf,
            norm, barrier_word_beside(p.parameters[0]),
        )  # fmt: skip
        for written in (p.parameters, p.exp_avgs, p.exp_avg_sqs, p.steps):
            torch.autograd.graph.increment_version(written)
        return norm


def _parts_of_one(like: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A new tensor, and it as contiguous ones of these shapes, one after the other."""
    if shapes.count(shapes[0]) == len(shapes):
        whole = like.new_empty(len(shapes), *shapes[0])
        return whole, whole.unbind()
    sizes = [shape.numel() for shape in shapes]
    whole = like.new_empty(sum(sizes))
    return whole, tuple(piece.view(shape) for piece, shape in zip(whole.split(sizes), shapes, strict=True))


OPS = NativeOrthonormalOps("reft_kernels")
