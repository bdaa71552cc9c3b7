"""pyreft's six interventions with this library's edit and R."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.activations import find_activation
from reft_kernels.compat.replacement import Replacement
from reft_kernels.interventions import INTERVENTIONS, EditWeights, Intervention, edit_rows
from reft_kernels.reference import ACTIVATIONS
from reft_kernels.rotate_layer import RotateLayer

# transformers' and torch's classes of the activations that the kernels know.
_ACTIVATION_CLASSES = {
    "LinearActivation": "linear",
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "Tanh": "tanh",
}


def replacements(pyreft: Any, pyvene: Any) -> Iterator[Replacement]:
    """For every class: its constructor, its edit, the operands of that edit, and what stood for the pair (it, hook)."""
    del pyvene
    for name, ours in INTERVENTIONS.items():
        cls = getattr(pyreft, name)
        yield Replacement(
            cls, "__init__", _constructor(cls, ours), "no d x d buffer for R, no QR of d x d at the start"
        )
        yield Replacement(cls, "forward", _forward(cls.forward), "one fused edit, one R for each step")
        yield Replacement(cls, "edit_weights", _edit_weights(ours), "the operands of the edit", new=True)
        yield Replacement(
            cls, "__getitem__", Intervention.__getitem__, "interventions[key][0] of scripts for older pyvene", new=True
        )


def fused_activation(intervention: nn.Module) -> str | None:
    """The name of f, where the kernels know it."""
    act_fn = getattr(intervention, "act_fn", None)
    if act_fn is None:
        return "linear"
    name = _ACTIVATION_CLASSES.get(type(act_fn).__name__)
    exact = name != "gelu" or getattr(act_fn, "act", nn.functional.gelu) is nn.functional.gelu
    return name if name in ACTIVATIONS and exact else None


def activation_name(intervention: nn.Module) -> str | None:
    """The name of f in transformers' ``ACT2FN``; None where it is of no class that is there."""
    from transformers.activations import ACT2FN

    fused = fused_activation(intervention)
    if fused is not None:
        return fused
    kind = type(getattr(intervention, "act_fn", None))
    return next((name for name in ACT2FN if type(ACT2FN[name]) is kind), None)


def is_fused(intervention: nn.Module) -> bool:
    """Whether an intervention is one of pyreft's as patched, with no other ``forward`` and an f the kernels know."""
    forward = getattr(type(intervention), "forward", None)
    return hasattr(forward, "stock_forward") and fused_activation(intervention) is not None


def _constructor(cls: type[nn.Module], ours: type[Intervention]) -> Callable[..., None]:
    """pyreft's ``__init__``: the same keywords and attributes; R is a RotateLayer."""

    def __init__(self: Any, **kwargs: Any) -> None:
        super(cls, self).__init__(**kwargs, keep_last_dim=True)
        d, r = int(kwargs["embed_dim"]), kwargs["low_rank_dimension"]
        dtype = kwargs.get("dtype", torch.bfloat16)
        if ours.orthonormal:
            self.rotate_layer = RotateLayer(d, r)
        else:
            self.proj_layer = nn.Linear(d, r, bias=kwargs["add_bias"]).to(dtype)
        if ours.has_W:
            self.learned_source = nn.Linear(d, r).to(dtype)
            self.act_fn = _act_fn(kwargs.get("act_fn"))
        else:
            self.learned_source = nn.Parameter(torch.rand(r), requires_grad=True)
        if ours.takes_dropout:
            self.dropout = nn.Dropout(kwargs.get("dropout", 0.0))

    return __init__


def _act_fn(name: str | None) -> Any:
    from transformers.activations import ACT2FN

    find_activation(name)
    return ACT2FN[name or "linear"]


def _forward(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, base: Tensor, source: Any = None, subspaces: Any = None) -> Any:
        if fused_activation(self) is None:
            return stock_forward(self, base, source, subspaces)
        return edit_rows((self,), base)

    forward.stock_forward = stock_forward  # type: ignore[attr-defined]
    return forward


def _edit_weights(ours: type[Intervention]) -> Callable[[Any], EditWeights]:
    def edit_weights(self: Any) -> EditWeights:
        R = rows(self) if ours.orthonormal else self.proj_layer.weight
        W, b = (self.learned_source.weight, self.learned_source.bias) if ours.has_W else (None, self.learned_source)
        c = self.proj_layer.bias if ours.has_c else None
        activation = fused_activation(self)
        assert activation is not None
        dropout = self.dropout.p if ours.takes_dropout and self.training else 0.0
        return EditWeights(R, W, b, c, ours.subtract, activation, dropout)

    return edit_weights


def rows(intervention: Any) -> Tensor:
    """R [r, d] of a RotateLayer, or of the parametrised layer of an intervention that was made before the patch."""
    layer = intervention.rotate_layer
    R: Tensor = layer.rows.weight if isinstance(layer, RotateLayer) else layer.weight.T
    return R
