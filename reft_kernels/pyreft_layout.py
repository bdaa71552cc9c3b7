"""The state dicts of pyreft's six interventions, and the operands of the edit that they hold.

    class                       keys of pyreft 0.1.0
    LoreftIntervention          weight, bias, rotate_layer (its own ``state_dict``), or nested as the others
    DireftIntervention          learned_source.weight, learned_source.bias, rotation
    ConsreftIntervention        learned_source, rotation
    LobireftIntervention        learned_source, rotation
    NoreftIntervention          learned_source.weight, learned_source.bias, proj_layer.weight, proj_layer.bias
    NodireftIntervention        the same, where the proj_layer.bias has no effect

``rotation`` is rotate_layer.parametrizations.weight.original and .0.base, see :mod:`reft_kernels.torch_orthogonal`.
An intervention made under ``patch_pyreft()``, or this library's own, has this library's ``rotate_layer.rows`` in the
place of the rotation where stock pyvene wrote it: X, reflectors and signs, or R itself.

All but the first have embed_dim and interchange_dim, both d. Matrices are [r, d], but for rotate_layer [d, r].

Source: pyreft/interventions.py; pyvene's buffers in pyvene/models/interventions.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels import orthonormal_reference
from reft_kernels.torch_orthogonal import parametrization_of, parametrized_matrix

ORIGINAL = "rotate_layer.parametrizations.weight.original"
BASE = "rotate_layer.parametrizations.weight.0.base"

# This library's own: R [r, d] of the polar and the free form, and what R is a function of in the householder form.
ROWS = "rotate_layer.rows.R"
HOUSEHOLDER = ("rotate_layer.rows.X", "rotate_layer.rows.reflectors", "rotate_layer.rows.signs")

# Each names the same operand: pyreft's flat key, the key of nn.Module, and a rotation without its parametrization.
_W = ("weight", "learned_source.weight")
_B = ("bias", "learned_source.bias", "learned_source")
_R = ("rotate_layer", "rotate_layer.weight", ORIGINAL)
_ANY_R = (*_R, ROWS, HOUSEHOLDER[0])
_SIZES = ("embed_dim", "interchange_dim")

PYREFT_ONLY = frozenset({"weight", "bias", *_R, BASE, *_SIZES})
"""Keys that no state dict of this library's own interventions has."""

_SHARED = frozenset({*_W, *_B, *_SIZES})
ORTHONORMAL_KEYS = _SHARED | {*_R, BASE}
FREE_KEYS = _SHARED | {"proj_layer.weight", "proj_layer.bias"}
"""Every key of pyreft's state dicts, where R is orthonormal and where it is free."""


class Operands(NamedTuple):
    """The weights of an edit; None where the state dict has none.

    R [r, d] is float64 where it was computed from a parametrization (ours or torch's), else in its own dtype.
    """

    R: Tensor | None
    W: Tensor | None
    b: Tensor | None
    c: Tensor | None


def read_operands(state: Mapping[str, Tensor]) -> Operands:
    """The operands in a state dict of pyreft's or of ours; keys of neither are not looked at.

    Raises ValueError where one operand is there twice, a base has no original, or shapes do not belong together.
    """
    found = {name: _only(state, names) for name, names in (("R", _ANY_R), ("W", _W), ("b", _B))}
    if BASE in state and found["R"] != ORIGINAL:
        raise ValueError(f"{BASE} is there without {ORIGINAL}")
    key = found["R"]
    if "proj_layer.weight" in state:
        if key is not None:
            raise ValueError(f"R is there twice, as {key} and as proj_layer.weight")
        R: Tensor | None = state["proj_layer.weight"]
    elif key == ORIGINAL:
        R = parametrized_matrix(state[ORIGINAL], state.get(BASE)).T
    elif key == HOUSEHOLDER[0]:
        R = _householder_rows(state)
    elif key == ROWS:
        R = state[ROWS]
    else:
        R = None if key is None else state[key].transpose(0, -1)
    W, b = (None if found[name] is None else state[str(found[name])] for name in ("W", "b"))
    operands = Operands(R, W, b, state.get("proj_layer.bias"))
    _check_shapes(operands, {name: int(state[name]) for name in _SIZES if name in state})
    return operands


def _householder_rows(state: Mapping[str, Tensor]) -> Tensor:
    """R [r, d] of :class:`reft_kernels.OrthonormalRows`, in float64."""
    for name in HOUSEHOLDER:
        if name not in state:
            raise ValueError(f"{HOUSEHOLDER[0]} is there without {name}")
    X, reflectors, signs = (state[name].to("cpu", torch.float64) for name in HOUSEHOLDER)
    if X.dim() != 2 or reflectors.shape != X.shape or signs.shape != X.shape[1:]:
        shapes = ", ".join(f"{name} {list(state[name].shape)}" for name in HOUSEHOLDER)
        raise ValueError(f"expected X [d, r], reflectors [d, r] and signs [r], got {shapes}")
    return orthonormal_reference.orthonormalize(X, reflectors, signs)


def _only(state: Mapping[str, Tensor], names: tuple[str, ...]) -> str | None:
    here = [name for name in names if name in state]
    if len(here) > 1:
        raise ValueError(f"one operand is there twice, as {here[0]} and as {here[1]}")
    return here[0] if here else None


def _check_shapes(operands: Operands, sizes: Mapping[str, int]) -> None:
    matrices = {name: t for name, t in (("R", operands.R), ("W", operands.W)) if t is not None}
    vectors = {name: t for name, t in (("b", operands.b), ("c", operands.c)) if t is not None}
    for name, matrix in matrices.items():
        if matrix.dim() != 2:
            raise ValueError(f"{name}: expected a matrix, got {list(matrix.shape)}")
    for name, vector in vectors.items():
        if vector.dim() != 1:
            raise ValueError(f"{name}: expected a vector, got {list(vector.shape)}")
    ranks = {name: len(t) for name, t in (matrices | vectors).items()}
    widths = {name: t.shape[1] for name, t in matrices.items()} | dict(sizes)
    for what, numbers in (("rank", ranks), ("width", widths)):
        if len(set(numbers.values())) > 1:
            raise ValueError(f"the {what} differs: {', '.join(f'{v} of {name}' for name, v in numbers.items())}")


def without_base(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict with R itself, in float64, instead of torch's parametrization and the d x d base."""
    if ORIGINAL not in state:
        return dict(state)
    rest = {name: value for name, value in state.items() if name not in (ORIGINAL, BASE)}
    return {**rest, "rotate_layer": parametrized_matrix(state[ORIGINAL], state.get(BASE))}


def with_plain_rotation(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict with R itself in the place of this library's ``rotate_layer.rows``."""
    own = [name for name in (ROWS, *HOUSEHOLDER) if name in state]
    R = read_operands(state).R if own else None
    if R is None:
        return dict(state)
    return {**{name: value for name, value in state.items() if name not in own}, "rotate_layer": R.T}


def write_state(operands: Operands, *, orthonormal: bool, subtract: bool, add_bias: bool = False) -> dict[str, Tensor]:
    """The state dict that pyreft's own class loads, with the R, W, b and c of the operands bit for bit.

    Args:
        operands: R [r, d], W [r, d] or None, b [r], c [r] or None.
        orthonormal, subtract: which class it is; one with W, an orthonormal R and ``subtract`` is LoreftIntervention.
        add_bias: of NodireftIntervention, whose ``proj_layer`` then has a bias without effect.

    Returns:
        Tensors on the CPU. With a rotation that is written by its parametrization R is taken as float32 and there
        is a d x d base: the completion of R^T to a square orthogonal matrix.
    """
    R, W, b, c = (None if t is None else t.detach().cpu() for t in operands)
    assert R is not None
    assert b is not None
    if orthonormal and W is not None and subtract:
        return {"weight": W, "bias": b, "rotate_layer": R.float().T.contiguous()}
    r, d = R.shape
    state = {name: torch.tensor(d) for name in _SIZES}
    if orthonormal:
        state[ORIGINAL], state[BASE] = parametrization_of(R.float().T)
    else:
        state["proj_layer.weight"] = R
        if c is not None or add_bias:
            state["proj_layer.bias"] = torch.zeros(r, dtype=R.dtype) if c is None else c
    if W is None:
        return {"learned_source": b, **state}
    return {**state, "learned_source.weight": W, "learned_source.bias": b}
