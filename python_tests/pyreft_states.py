"""State dicts as pyreft's six classes make them, written by hand from their constructors: no pyreft is needed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels.interventions import INTERVENTIONS

CLASSES = tuple(INTERVENTIONS)
FREE = ("NoreftIntervention", "NodireftIntervention")
WITHOUT_W = ("ConsreftIntervention", "LobireftIntervention")


class Theirs(NamedTuple):
    """A state dict and the operands in it: R [r, d], W, b, c."""

    state: dict[str, Tensor]
    R: Tensor
    W: Tensor | None
    b: Tensor
    c: Tensor | None


class Rotation(nn.Module):
    """pyreft's rotate_layer before it is parametrized."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, r))
        nn.init.orthogonal_(self.weight)


def rotation(d: int, r: int, *, trivialized: bool = True, moved: float = 0.3) -> nn.Module:
    """A module whose weight [d, r] torch keeps orthonormal, away from where it started, as after some training."""
    layer = nn.utils.parametrizations.orthogonal(Rotation(d, r), use_trivialization=trivialized)
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.add_(torch.randn_like(original).tril(-1), alpha=moved)
    return layer


def pyreft_state(
    name: str, d: int, r: int, *, dtype: torch.dtype = torch.float32, add_bias: bool = False, nested: bool = False
) -> Theirs:
    """The state dict of a class; ``nested``: of LoReFT without its own ``state_dict``, as pyreft saved it at first."""
    W, b = torch.randn(r, d).to(dtype), torch.randn(r).to(dtype)
    sizes = {"embed_dim": torch.tensor(d), "interchange_dim": torch.tensor(d)}
    linear = {"learned_source.weight": W, "learned_source.bias": b}
    if name in FREE:
        R = torch.randn(r, d).to(dtype)
        state = {**sizes, "proj_layer.weight": R, **linear}
        c = None
        if add_bias:
            state["proj_layer.bias"] = c = torch.randn(r).to(dtype)
        return Theirs(state, R, W, b, c)
    layer = rotation(d, r)
    R = layer.weight.detach().T
    rotated = {f"rotate_layer.{key}": value.clone() for key, value in layer.state_dict().items()}
    if name in WITHOUT_W:
        b = torch.rand(r)
        return Theirs({"learned_source": b, **sizes, **rotated}, R, None, b, None)
    if name == "LoreftIntervention" and not nested:
        return Theirs({"weight": W, "bias": b, "rotate_layer": R.T.clone()}, R, W, b, None)
    return Theirs({**sizes, **rotated, **linear}, R, W, b, None)
