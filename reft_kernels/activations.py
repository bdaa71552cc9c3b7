"""The activation f of an edit, by pyreft's ``act_fn``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from reft_kernels.reference import ACTIVATIONS, activate

_SAME = {"swish": "silu"}


class Activation(NamedTuple):
    """f under its name; the kernels know those of ``reference.ACTIVATIONS``."""

    name: str
    function: Callable[[Tensor], Tensor]


def find_activation(name: str | None) -> Activation:
    """f by its name in transformers' ``ACT2FN`` (pyreft ``act_fn``); None is linear.

    Raises TypeError for what is no name, and ValueError for a name that is in neither list.
    """
    if not isinstance(name, (str, type(None))):
        raise TypeError(f"act_fn: expected a name, got {name!r}")
    name = _SAME.get(name or "linear", name or "linear")
    if name in ACTIVATIONS:
        return Activation(name, partial(activate, activation=name))
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        known = {}
    else:
        known = ACT2FN
    if name not in known:
        raise ValueError(f"act_fn: expected one of {', '.join(ACTIVATIONS)} or of transformers' ACT2FN, got {name!r}")
    return Activation(name, known[name])
