"""The edit as an ``autograd.Function``: what runs in eager mode."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from reft_kernels.ops import NO_SECOND_DERIVATIVE, run_backward, run_forward
from reft_kernels.problem import EditProblem, Needs, as_rows


class EditFunction(torch.autograd.Function):
    """y = D_p( h + scale * R^T ( f(W h + b) - gamma (R h + c) ) ); see :mod:`reft_kernels.reference`.

    Autograd sees the caller's own h, R, W, b and c; ``problem`` holds views of them in the backends' layout, so
    that no view stands in the graph. Saves h itself, or, where the edit is in place, its named rows before the edit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        R: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        c: Tensor | None,
        problem: EditProblem,
        inplace: bool,
        backend: str,
    ) -> Tensor:
        """Returns y in the shape of h; h itself where ``inplace``."""
        y, delta, s, rows = run_forward(problem, backend, inplace, save_rows=inplace)
        if inplace:
            ctx.mark_dirty(h)
        slots = (problem.positions, problem.group, problem.scale, problem.seed)
        ctx.save_for_backward(rows if inplace else h, R, W, b, c, *slots, delta, s)
        ctx.settings = (problem.subtract, problem.activation, problem.dropout)
        ctx.inplace, ctx.backend = inplace, backend
        return h if inplace else y.view(h.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of h, R, W, b and c, those asked for."""
        if ctx.inplace and torch.is_grad_enabled():
            # No tensor that is left leads to h before the edit, so a second derivative could not be told of it.
            raise NotImplementedError(f"{NO_SECOND_DERIVATIVE}; with inplace=True create_graph must be False")
        saved = ctx.saved_tensors
        x, R, W, b, c, positions, group, scale, seed, delta, s = saved
        if not ctx.inplace:
            x = as_rows(x, positions is not None)
        if group is None:
            R, W, b, c = (t if t is None else t.unsqueeze(0) for t in (R, W, b, c))
        problem = EditProblem(x, R, W, b, c, positions, group, scale, seed, *ctx.settings)
        needs = Needs(*ctx.needs_input_grad[:5])
        rows = as_rows(grad, positions is not None)
        with torch.no_grad():
            dh, *rest = run_backward(rows, problem, delta, s, needs, ctx.backend)
        if dh is not None:
            dh = dh.view(grad.shape)
        if group is None:
            rest = [t if t is None else t.squeeze(0) for t in rest]
        return *first_derivative_only((dh, *rest), (grad, *saved)), None, None, None


def first_derivative_only(
    gradients: tuple[Tensor | None, ...], inputs: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients as they are; under ``create_graph=True`` such that differentiating them raises.

    Without it autograd would take them for constants, and a second derivative would be wrong in silence. ``inputs``
    are the tensors that the gradients depend on.
    """
    if not torch.is_grad_enabled():
        return gradients
    anchors = [t for t in inputs if t is not None and t.requires_grad]
    return _FirstDerivative.apply(len(gradients), *gradients, *anchors)  # type: ignore[no-any-return]


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(t if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(NO_SECOND_DERIVATIVE)
