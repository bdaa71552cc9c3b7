"""torch's transforms of functions: torch.func and forward-mode differentiation.

They follow PyTorch's operations. What a kernel writes through a pointer passes them by, and an ``autograd.Function``
that knows reverse mode alone stops them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reft_kernels.problem import EditProblem


def torch_func_is_active() -> bool:
    """Whether a transform of torch.func is being carried out."""
    return torch._C._are_functorch_transforms_active()


def stands_for_many(grad: Tensor) -> bool:
    """Whether a vmap over gradients is at work: torch.func's, or torch.autograd.grad's with ``is_grads_batched``."""
    return torch_func_is_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


def transformed(problem: EditProblem) -> str | None:
    """Why an edit has to be carried out in PyTorch's operations alone; None if a kernel may do it."""
    if torch_func_is_active():
        return "a transform of torch.func (vmap, grad, jvp, ...) is active, which follows PyTorch's operations alone"
    if any(isinstance(t, Tensor) and has_tangent(t) for t in problem):
        return "an operand has a tangent, and forward-mode differentiation follows PyTorch's operations alone"
    return None


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation follows a tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
