"""Gradient checkpointing: what the backward recomputes is edited as the forward was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.modules import Site
from reft_kernels.orthogonal import rows_apart
from reft_kernels.plan import Plan, active_plans, following, in_backward

# Where transformers puts the function that checkpoints, on every module that may be checkpointed.
_FUNCTION = "_gradient_checkpointing_func"


class FollowingCheckpoint:
    """A checkpoint function whose recomputation follows the plans that were active at the forward.

    Copying or pickling a model that holds it gives a model with the checkpoint function itself.

    Args:
        checkpoint: what transformers set, ``torch.utils.checkpoint.checkpoint`` with its settings.
        edits: whether something inside of what it checkpoints is edited.
    """

    def __init__(self, checkpoint: Callable[..., Any], edits: bool) -> None:
        self.checkpoint = checkpoint
        self.edits = edits

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As ``checkpoint(function, *args, **kwargs)``."""
        plans = active_plans()
        # A compiler traces the function once and recomputes operations of its own graph.
        if not plans or torch.compiler.is_compiling():
            return self.checkpoint(function, *args, **kwargs)
        if not self._is_reentrant():
            return self.checkpoint(partial(_follow, plans, function), *args, **kwargs)
        if self.edits and torch.is_grad_enabled():
            args = _with_gradient(args)
        return self.checkpoint(partial(_follow_reentrantly, plans, function), *args, **kwargs)

    def _is_reentrant(self) -> bool:
        return getattr(self.checkpoint, "keywords", {}).get("use_reentrant") is not False

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (self.checkpoint,)


def _follow(plans: tuple[Plan, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with following(plans):
        return function(*args, **kwargs)


def _follow_reentrantly(plans: tuple[Plan, ...], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with following(plans), rows_apart() if in_backward() else nullcontext():
        return function(*args, **kwargs)


def _with_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The reentrant checkpoint makes no graph where no argument requires a gradient; below a first edit none does."""
    if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
        return args
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.is_floating_point():
            return (*args[:i], arg.detach().requires_grad_(), *args[i + 1 :])
    raise RuntimeError(
        "gradient checkpointing with use_reentrant=True gives no gradients to edits inside of a module that takes its "
        "hidden states by keyword: set use_reentrant=False"
    )


class Checkpoints:
    """The modules of a base model that transformers may checkpoint."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        edited = {id(site.module) for site in sites}
        self.modules: list[tuple[Any, bool]] = [
            (module, any(id(inner) in edited for inner in module.modules()))
            for module in model.modules()
            if hasattr(module, "gradient_checkpointing")
        ]

    def follow(self) -> None:
        """Let the checkpoint functions of those that are checkpointed follow plans."""
        for module, edits in self.modules:
            if not module.gradient_checkpointing:
                continue
            function = getattr(module, _FUNCTION, None)
            if isinstance(function, FollowingCheckpoint):
                function.edits |= edits
            elif function is not None:
                setattr(module, _FUNCTION, FollowingCheckpoint(function, edits))

    def release(self) -> None:
        """Put back the functions as they were."""
        for module, _ in self.modules:
            function = getattr(module, _FUNCTION, None)
            if isinstance(function, FollowingCheckpoint):
                setattr(module, _FUNCTION, function.checkpoint)
