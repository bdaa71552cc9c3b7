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
        yield Replacement(cls, "forward", _forward(cls.forward, ours), "one fused edit, one R for each step")
        yield Replacement(cls, "edit_weights", _edit_weights(ours), "the operands of the edit", new=True)
        yield Replacement(
            cls, "__getitem__", Intervention.__getitem__, "interventions[key][0] of scripts for older pyvene", new=True
        )


def fused_activation(intervention: nn.Module) -> str | None:
    """The name of f, where the kernels know it."""
    act_fn = getattr(intervention, "act_fn", None)
    if act_fn is None:
        return "linear"
    theirs = type(act_fn).__module__.partition(".")[0] in ("torch", "transformers")
    name = _ACTIVATION_CLASSES.get(type(act_fn).__name__) if theirs else None
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
    """Whether the kernels may edit in the place of a call of the intervention.

    It is one of pyreft's as patched, nobody has hooked it or given it another ``forward``, and :func:`has_fused_edit`.
    """
    ours = getattr(getattr(type(intervention), "forward", None), "edit_of", None)
    return ours is not None and not _is_changed(intervention) and has_fused_edit(intervention, ours)


def has_fused_edit(intervention: nn.Module, ours: type[Intervention]) -> bool:
    """Whether all that pyreft's ``forward`` would call is as pyreft made it, and f one that the kernels know."""
    names = ("rotate_layer", "proj_layer", "learned_source", "dropout", "act_fn")
    parts = (getattr(intervention, name, None) for name in names)
    changed = any(_is_changed(part) for part in parts if isinstance(part, nn.Module))
    return not changed and has_own_parts(intervention, ours) and fused_activation(intervention) is not None


def has_own_parts(intervention: Any, ours: type[Intervention]) -> bool:
    """Whether one of pyreft's interventions has the parts that its constructor makes, or others that compute the same.

    Dropout of everything is not among them: no other class here takes it.
    """
    R = getattr(intervention, "rotate_layer" if ours.orthonormal else "proj_layer", None)
    source: Any = getattr(intervention, "learned_source", None)
    rotates = _is_rotate_layer(R) if ours.orthonormal else _computes_as(R, nn.Linear)
    learns = _computes_as(source, nn.Linear) and source.bias is not None if ours.has_W else isinstance(source, Tensor)
    dropout: Any = getattr(intervention, "dropout", None)
    drops = not ours.takes_dropout or (_computes_as(dropout, nn.Dropout) and dropout.p < 1)
    return bool(rotates and learns and drops)


def _computes_as(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of that kind and its class has no other ``forward`` (a quantised Linear has)."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _is_rotate_layer(module: Any) -> bool:
    """Ours, or the parametrised one of an intervention that was made before the patch."""
    kinds = (cls for cls in type(module).__mro__ if cls is RotateLayer or cls.__name__ == "LowRankRotateLayer")
    return any(_computes_as(module, kind) for kind in kinds)


def _is_changed(module: nn.Module) -> bool:
    """Whether a call of the module does more, or other things, than its class says."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, name) for name in hooks)


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


def _forward(stock_forward: Callable[..., Any], ours: type[Intervention]) -> Callable[..., Any]:
    def forward(self: Any, base: Tensor, source: Any = None, subspaces: Any = None) -> Any:
        if not has_fused_edit(self, ours):
            return stock_forward(self, base, source, subspaces)
        return edit_rows((self,), base)

    forward.edit_of = ours  # type: ignore[attr-defined]
    return forward


def _edit_weights(ours: type[Intervention]) -> Callable[[Any], EditWeights]:
    def edit_weights(self: Any) -> EditWeights:
        R = rows(self) if ours.orthonormal else self.proj_layer.weight
        W, b = (self.learned_source.weight, self.learned_source.bias) if ours.has_W else (None, self.learned_source)
        c = self.proj_layer.bias if ours.has_c else None
        activation = fused_activation(self)
        assert activation is not None
        dropout = self.dropout.p if ours.takes_dropout and self.dropout.training else 0.0
        return EditWeights(R, W, b, c, ours.subtract, activation, dropout)

    return edit_weights


def rows(intervention: Any) -> Tensor:
    """R [r, d] of a RotateLayer, or of the parametrised layer of an intervention that was made before the patch."""
    layer = intervention.rotate_layer
    R: Tensor = layer.rows.weight if isinstance(layer, RotateLayer) else layer.weight.T
    return R
