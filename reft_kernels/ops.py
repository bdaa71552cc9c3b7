"""The edit as ``torch.library`` ops, for ``torch.compile`` and ``torch.export``.

Out of place: ``reft_kernels::edit_forward`` and ``reft_kernels::edit_backward``, both functional, the first with
autograd. In place: ``edit_forward_`` writes h, ``edit_backward_`` the gradient that it is given; autograd's rule for
them is :class:`InPlaceEdit`, which Dynamo traces, and what must not be overwritten the compiler copies. All have fakes
and take the operands of :class:`reft_kernels.problem.EditProblem`; in eager mode :mod:`reft_kernels.autograd` calls
the same backends without the ops' cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.backends.registry import choose
from reft_kernels.problem import EditProblem, Needs, as_rows, autocast_is_on, without_autocast

_WEIGHTS_AND_SLOTS = (
    "Tensor R, Tensor? W, Tensor? b, Tensor? c, Tensor? positions, Tensor? group, Tensor? scale, "
    "Tensor? seed, bool subtract, str activation, float dropout"
)

_OPERANDS = f"Tensor h, {_WEIGHTS_AND_SLOTS}"

library = torch.library.Library("reft_kernels", "DEF")
library.define(f"edit_forward({_OPERANDS}, str backend) -> (Tensor y, Tensor delta, Tensor s)")
library.define(
    f"edit_backward(Tensor grad, {_OPERANDS}, Tensor delta, Tensor s, bool[] needs, str backend) "
    "-> (Tensor dh, Tensor dR, Tensor dW, Tensor db, Tensor dc)"
)
library.define(
    f"edit_forward_(Tensor(a!) h, {_WEIGHTS_AND_SLOTS}, bool save_rows, str backend) "
    "-> (Tensor delta, Tensor s, Tensor rows)"
)
library.define(
    f"edit_backward_(Tensor(a!) grad, {_OPERANDS}, Tensor delta, Tensor s, bool[] needs, str backend) "
    "-> (Tensor dR, Tensor dW, Tensor db, Tensor dc)"
)

NO_SECOND_DERIVATIVE = (
    "reft_kernels: the edit has no second derivative (double backward); "
    "reft_kernels.reference.edit is differentiable any number of times"
)
_N_OPERANDS = len(EditProblem._fields)


def run_forward(problem: EditProblem, backend: str, inplace: bool, save_rows: bool) -> tuple[Tensor, ...]:
    """y, delta, s and the saved rows, by the backend asked for, whatever autocast says."""
    chosen = choose(backend, problem)
    if not autocast_is_on(problem.h.device):
        return chosen.edit_forward(problem, inplace, save_rows)
    with without_autocast(problem.h.device):
        return chosen.edit_forward(problem, inplace, save_rows)


def run_backward(
    grad: Tensor,
    problem: EditProblem,
    delta: Tensor,
    s: Tensor,
    needs: Needs,
    backend: str,
    *,
    inplace: bool = False,
    rebuild: bool = False,
    into: tuple[Tensor | None, ...] | None = None,
) -> tuple[Tensor | None, ...]:
    """dh, dR, dW, db, dc, by the backend asked for; None where not needed."""
    run = choose(backend, problem).edit_backward
    if not autocast_is_on(grad.device):
        return run(grad, problem, delta, s, needs, inplace=inplace, rebuild=rebuild, into=into)
    with without_autocast(grad.device):
        return run(grad, problem, delta, s, needs, inplace=inplace, rebuild=rebuild, into=into)


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


def _edit_forward_in_place(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, save_rows, backend = arguments
    _, delta, s, rows = run_forward(EditProblem(*operands), backend, inplace=True, save_rows=save_rows)
    return delta, s, rows


def _edit_backward_in_place(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *operands, delta, s, needs, backend = arguments
    problem = EditProblem(*operands)
    _, *found = run_backward(grad, problem, delta, s, Needs(*needs), backend, inplace=True)
    return tuple(grad.new_empty(0) if t is None else t for t in found)


def _edit_forward_in_place_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *operands, save_rows, backend = arguments
    h = operands[0]
    _, delta, s = _edit_forward_fake(*operands, backend)
    return delta, s, h.new_empty((delta.shape[0], h.shape[2]) if save_rows else (0,))


def _edit_backward_in_place_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _edit_backward_fake(grad, *arguments)[1:]


def edit_in_place(h: Tensor, problem: EditProblem, backend: str) -> Tensor:
    """Writes h, of which ``problem.h`` is a view or h itself, and returns it; differentiable. For compiled graphs.

    Keeps a copy of the edited rows for the backward. To keep h itself would be wrong where the graph writes it again:
    what autograd notices by a version counter, a compiled graph does not.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in problem[:5]):
        y: Tensor = InPlaceEdit.apply(h, *problem[1:], backend)
        return y
    torch.ops.reft_kernels.edit_forward_(*problem, False, backend)
    return h


class InPlaceEdit(torch.autograd.Function):
    """The edit of h in place in a compiled graph. Its backward overwrites the gradient that it gets: within a graph
    that is a value like any other, which the compiler copies first where something else still reads it.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, *arguments: Any) -> Tensor:
        """``arguments``: the other operands of an EditProblem, then the backend's name."""
        *others, backend = arguments
        p = EditProblem(h, *others)
        p = p._replace(h=as_rows(h, p.positions is not None))
        delta, s, rows = torch.ops.reft_kernels.edit_forward_(*p, True, backend)
        ctx.mark_dirty(h)
        ctx.save_for_backward(rows, *p[1:9], delta, s)
        ctx.settings, ctx.backend = p[9:], backend
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of h, R, W, b and c."""
        rows, *others, delta, s = ctx.saved_tensors
        by_row = others[4] is not None  # positions
        needs = list(ctx.needs_input_grad[:5])
        grad = grad.contiguous()
        found = torch.ops.reft_kernels.edit_backward_(
            as_rows(grad, by_row), rows, *others, *ctx.settings, delta, s, needs, ctx.backend
        )
        asked = (t if need else None for t, need in zip((grad, *found), needs, strict=True))
        return *asked, *(None,) * (_N_OPERANDS - 5 + 1)


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
library.impl("edit_forward_", _edit_forward_in_place, "CompositeExplicitAutograd")
library.impl("edit_backward_", _edit_backward_in_place, "CompositeExplicitAutograd")
torch.library.register_fake("reft_kernels::edit_forward_", _edit_forward_in_place_fake, lib=library)
torch.library.register_fake("reft_kernels::edit_backward_", _edit_backward_in_place_fake, lib=library)
torch.library.register_fake("reft_kernels::edit_forward", _edit_forward_fake, lib=library)
torch.library.register_fake("reft_kernels::edit_backward", _edit_backward_fake, lib=library)
torch.library.register_autograd("reft_kernels::edit_forward", _backward, setup_context=_setup_context, lib=library)
torch.library.register_autograd(
    "reft_kernels::edit_backward",
    _double_backward,
    setup_context=lambda ctx, inputs, output: None,
    lib=library,
)

__all__ = ["NO_SECOND_DERIVATIVE", "edit_in_place", "library", "run_backward", "run_forward"]
