"""The edit as ``torch.library`` ops, for ``torch.compile`` and ``torch.export``.

Two ops, ``reft_kernels::edit_forward`` and ``reft_kernels::edit_backward``, both functional, with fakes, and the
first with autograd. They take the operands of :class:`reft_kernels.problem.EditProblem`; in eager mode
:mod:`reft_kernels.autograd` calls the same backends without the ops' cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.backends.registry import choose
from reft_kernels.problem import EditProblem, Needs, without_autocast

_OPERANDS = (
    "Tensor h, Tensor R, Tensor? W, Tensor? b, Tensor? c, Tensor? positions, Tensor? group, Tensor? scale, "
    "Tensor? seed, bool subtract, str activation, float dropout"
)

library = torch.library.Library("reft_kernels", "DEF")
library.define(f"edit_forward({_OPERANDS}, str backend) -> (Tensor y, Tensor delta, Tensor s)")
library.define(
    f"edit_backward(Tensor grad, {_OPERANDS}, Tensor delta, Tensor s, bool[] needs, str backend) "
    "-> (Tensor dh, Tensor dR, Tensor dW, Tensor db, Tensor dc)"
)

NO_SECOND_DERIVATIVE = (
    "reft_kernels: the edit has no second derivative (double backward); "
    "reft_kernels.reference.edit is differentiable any number of times"
)
_N_OPERANDS = len(EditProblem._fields)


def run_forward(problem: EditProblem, backend: str, inplace: bool, save_rows: bool) -> tuple[Tensor, ...]:
    """y, delta, s and the saved rows, by the backend asked for, whatever autocast says."""
    with without_autocast(problem.h.device):
        return choose(backend, problem).edit_forward(problem, inplace, save_rows)


def run_backward(
    grad: Tensor, problem: EditProblem, delta: Tensor, s: Tensor, needs: Needs, backend: str, **how: Any
) -> tuple[Tensor | None, ...]:
    """dh, dR, dW, db, dc, by the backend asked for; None where not needed. ``how``: inplace, rebuild and into."""
    how = {name: value for name, value in how.items() if value}
    with without_autocast(grad.device):
        return choose(backend, problem).edit_backward(grad, problem, delta, s, needs, **how)


def _edit_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, backend = arguments
    y, delta, s, _ = run_forward(EditProblem(*operands), backend, inplace=False, save_rows=False)
    return y, delta, s


def _edit_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *operands, delta, s, needs, backend = arguments
    gradients = run_backward(grad, EditProblem(*operands), delta, s, Needs(*needs), backend)
    return tuple(grad.new_empty(0) if t is None else t for t in gradients)


def _edit_forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, backend = arguments
    p = EditProblem(*operands)
    choose(backend, p)
    slots = p.h.shape[1] if p.positions is None else p.positions.shape[1]
    shape = (p.h.shape[0] * slots, p.R.shape[1])
    delta = p.h.new_empty(shape, dtype=p.accumulator)
    s = p.h.new_empty((0,) if p.activation == "linear" else shape, dtype=p.accumulator)
    return p.h.new_empty(p.h.shape), delta, s


def _edit_backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *operands, _delta, _s, needs, _backend = arguments
    p = EditProblem(*operands)
    inputs = (grad, p.R, p.W, p.b, p.c)
    return tuple(
        grad.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, ctx.backend = inputs
    p = EditProblem(*operands)
    _, delta, s = output
    ctx.mark_non_differentiable(delta, s)
    ctx.save_for_backward(*operands[:9], delta, s)
    ctx.settings = (p.subtract, p.activation, p.dropout)


def _backward(ctx: Any, grad: Tensor, _grad_delta: Tensor, _grad_s: Tensor) -> tuple[Tensor | None, ...]:
    *operands, delta, s = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    gradients = torch.ops.reft_kernels.edit_backward(grad, *operands, *ctx.settings, delta, s, needs, ctx.backend)
    asked = (t if need else None for t, need in zip(gradients, needs, strict=True))
    return *asked, *(None,) * (_N_OPERANDS - 5 + 1)


def _double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(NO_SECOND_DERIVATIVE)


library.impl("edit_forward", _edit_forward, "CompositeExplicitAutograd")
library.impl("edit_backward", _edit_backward, "CompositeExplicitAutograd")
torch.library.register_fake("reft_kernels::edit_forward", _edit_forward_fake, lib=library)
torch.library.register_fake("reft_kernels::edit_backward", _edit_backward_fake, lib=library)
torch.library.register_autograd("reft_kernels::edit_forward", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd(
    "reft_kernels::edit_backward",
    _double_backward,
    setup_context=lambda ctx, inputs, output: None,
    lib=library,
)

__all__ = ["NO_SECOND_DERIVATIVE", "library", "run_backward", "run_forward"]
