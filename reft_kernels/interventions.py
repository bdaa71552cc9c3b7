"""The six interventions of pyreft as modules over one edit.

    y = D_p( h + R^T ( f(W h + b) - gamma (R h + c) ) )

    class                 R                          W, b             gamma   c                  source
    LoreftIntervention    rotate_layer, orthonormal  learned_source   1       -                  paper eq. 2
    NoreftIntervention    proj_layer, free           learned_source   1       proj_layer.bias    appendix E
    ConsreftIntervention  rotate_layer, orthonormal  b only           1       -                  appendix E
    LobireftIntervention  rotate_layer, orthonormal  b only           0       -                  appendix E
    DireftIntervention    rotate_layer, orthonormal  learned_source   0       -                  appendix E
    NodireftIntervention  proj_layer, free           learned_source   0       -                  eq. 3 (DiReFT)

Constructor arguments and attribute names are pyreft's (``pyreft/interventions.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reft_kernels.activations import find_activation
from reft_kernels.complement import ComplementRows
from reft_kernels.functional import edit
from reft_kernels.problem import wide_default_dtype
from reft_kernels.pyreft_layout import FREE_KEYS, ORTHONORMAL_KEYS, PYREFT_ONLY, read_operands
from reft_kernels.pyvene_kin import adopt
from reft_kernels.reference import ACTIVATIONS
from reft_kernels.rotate_layer import LowRankRotateLayer as LowRankRotateLayer
from reft_kernels.rotate_layer import RotateLayer
from reft_kernels.stiefel import ORTHOGONALITIES

# What pyvene hands to every intervention it builds, and what pyreft's own constructors take without effect.
_IGNORED = frozenset(
    {
        "component",
        "device",
        "group_key",
        "hidden_source_representation",
        "init_orth",
        "interchange_dim",
        "intervention",
        "intervention_link_key",
        "intervention_type",
        "keep_last_dim",
        "latent_dim",
        "layer",
        "max_number_of_units",
        "moe_key",
        "positions",
        "source_representation",
        "subspace_partition",
        "unit",
    }
)


class EditWeights(NamedTuple):
    """The operands of an intervention's edit, as :func:`reft_kernels.edit` takes them."""

    R: Tensor  # [r, d]
    W: Tensor | None  # [r, d]
    b: Tensor | None  # [r]
    c: Tensor | None  # [r]
    subtract: bool
    activation: str
    dropout: float  # 0 in eval mode


class CastingLinear(nn.Linear):
    """nn.Linear of rows of any dtype, in that of the weight: an own ``forward`` may call it on a bf16 model's rows."""

    def forward(self, input: Tensor) -> Tensor:
        """x [..., d] to [..., r]."""
        return super().forward(input.to(self.weight.dtype))


class Intervention(nn.Module):
    """What the six interventions share.

    Args:
        embed_dim: d, the length of a hidden state.
        low_rank_dimension: r.
        dtype: of ``learned_source`` and ``proj_layer`` (a torch dtype or its name). R with orthonormal rows is
            always float32.
        dropout: probability of dropping an element of an edited row, in training mode.
        act_fn: f: linear (None), relu, gelu, silu or tanh; any other of transformers' ``ACT2FN`` runs as plain PyTorch
            operations on the rows.
        add_bias: whether ``proj_layer`` has a bias c.
        orthogonality: of the classes with orthonormal rows: "householder" (None), "polar" or "none", see
            :func:`reft_kernels.stiefel.make_rows`. The others take "none" and nothing else.
        orthogonal_to: an intervention with orthonormal rows, or such rows [k, d], that this one's R stays orthogonal
            to; they are copied and stay as they are. (A number k leaves room for k rows that a state dict brings.)
        use_fast: what pyvene gives to every intervention; it makes this one pyvene's as well, see
            :mod:`reft_kernels.pyvene_kin`.
        **kwargs: pyvene's other fields, which it passes to every intervention that it builds, are ignored in silence;
            others are ignored with a warning.

    Attributes:
        activation: the name of f.
        act_fn: f itself.
        trainable, is_source_constant, keep_last_dim, ...: what pyvene reads of an intervention.

    Raises:
        ValueError: r not in [1, d], an unknown activation, a dropout outside [0, 1), an unknown orthogonality or one
            that the class cannot have, rows to be orthogonal to that are not orthonormal.
        TypeError: embed_dim or low_rank_dimension missing or not an integer.
    """

    orthonormal: ClassVar[bool]
    has_W: ClassVar[bool]
    subtract: ClassVar[bool]
    has_c: ClassVar[bool] = False
    takes_dropout: ClassVar[bool] = True

    trainable = True
    is_source_constant = True
    is_repr_distributed = True
    keep_last_dim = True
    subspace_partition = None
    source_representation = None

    def __init__(
        self,
        embed_dim: int | None = None,
        low_rank_dimension: int | None = None,
        dtype: torch.dtype | str | None = None,
        dropout: float = 0.0,
        act_fn: str | None = None,
        add_bias: bool = False,
        orthogonality: str | None = None,
        orthogonal_to: Intervention | Tensor | int | None = None,
        use_fast: bool | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)  # not the next class's: that may be pyvene's, once adopted
        unknown = sorted(set(kwargs) - _IGNORED)
        if unknown:
            warnings.warn(f"{type(self).__name__}: no effect of {', '.join(unknown)}", stacklevel=2)
        d = _integer("embed_dim", embed_dim)
        r = _integer("low_rank_dimension", low_rank_dimension)
        if not 1 <= r <= d:
            raise ValueError(f"low_rank_dimension: expected 1 <= r <= embed_dim={d}, got {r}")
        activation = find_activation(act_fn)
        dropout = dropout or 0.0
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout!r}")
        if activation.name != "linear" and not self.has_W:
            warnings.warn(f"{type(self).__name__}: no effect of act_fn, as in pyreft", stacklevel=2)
            activation = find_activation("linear")
        if dropout > 0 and not self.takes_dropout:
            warnings.warn(f"{type(self).__name__}: no effect of dropout, as in pyreft", stacklevel=2)
            dropout = 0.0
        self.embed_dim, self.low_rank_dimension = d, r
        self.activation = activation.name
        self._activation = activation
        self.act_fn: Any = activation.function
        self.add_bias = bool(add_bias)
        self.dropout = nn.Dropout(dropout)
        dtype = read_dtype(dtype) or torch.float32
        _check_orthogonality(type(self), orthogonality, orthogonal_to)
        if self.orthonormal:
            self.rotate_layer = RotateLayer(d, r, orthogonality or "householder", _rows_of(orthogonal_to))
        else:
            self.proj_layer = CastingLinear(d, r, bias=self.add_bias and self.has_c, dtype=dtype)
        if self.has_W:
            self.learned_source: nn.Module | nn.Parameter = CastingLinear(d, r, dtype=dtype)
        else:
            self.learned_source = nn.Parameter(torch.rand(r, dtype=wide_default_dtype()))
        if use_fast is not None:
            self.use_fast = use_fast

    def edit_weights(self) -> EditWeights:
        """The operands of this intervention's edit, as they are now."""
        R: Tensor = self.rotate_layer.rows.weight if self.orthonormal else self.proj_layer.weight
        W: Tensor | None
        b: Tensor | None
        if isinstance(self.learned_source, nn.Linear):
            W, b = self.learned_source.weight, self.learned_source.bias
        else:
            assert isinstance(self.learned_source, Tensor)
            W, b = None, self.learned_source
        c = self.proj_layer.bias if self.has_c else None
        return EditWeights(R, W, b, c, self.subtract, self.activation, self.dropout.p if self.training else 0.0)

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        """Edits every row of ``base`` [..., d]; ``source`` and ``subspaces`` have no effect, as in pyreft.

        Returns:
            The shape and dtype of ``base``.
        """
        return edit_rows((self,), base) if self.is_fused else self._plain_edit(base)

    @property
    def is_fused(self) -> bool:
        """Whether the kernels know f, and the parts are of the kinds that they were made of."""
        parts: Any = vars(self)["_modules"]
        source = parts.get("learned_source")
        known = self.activation in ACTIVATIONS and self.act_fn is self._activation.function
        linear = isinstance(source, nn.Linear) if self.has_W else source is None
        rows = RotateLayer if self.orthonormal else nn.Linear
        return (
            known
            and linear
            and isinstance(parts.get("dropout"), nn.Dropout)
            and isinstance(parts.get("rotate_layer" if self.orthonormal else "proj_layer"), rows)
        )

    def _plain_edit(self, h: Tensor) -> Tensor:
        """The edit of every row by the parts' own calls: any f, and whatever a subclass has put in their places."""
        up: Any = self.rotate_layer if self.orthonormal else self.proj_layer
        source: Any = self.learned_source
        delta = self.act_fn(source(h)) if self.has_W else source
        if self.subtract:
            delta = delta - up(h)
        R = up.weight.T if self.orthonormal else up.weight
        kind = torch.promote_types(torch.promote_types(h.dtype, R.dtype), delta.dtype)
        edited: Tensor = self.dropout((h.to(kind) + delta.to(kind) @ R.to(kind)).to(h.dtype))
        return edited

    def __getitem__(self, index: int) -> Intervention:
        """The intervention itself at 0: pyvene before 0.1.7 kept pairs, and scripts of its time say ``v[0]``."""
        if index != 0:
            raise IndexError(f"index: expected 0, the intervention itself, got {index!r}")
        return self

    # pyvene's

    @property
    def use_fast(self) -> bool:
        """pyvene's flag. Without effect here; writing it makes the intervention pyvene's as well."""
        return getattr(self, "_use_fast", False)

    @use_fast.setter
    def use_fast(self, value: bool) -> None:
        self._use_fast = bool(value)
        adopt(self)

    @property
    def interchange_dim(self) -> Tensor:
        """embed_dim as pyvene keeps it, an int64 tensor []."""
        return torch.tensor(self.embed_dim)

    def set_interchange_dim(self, interchange_dim: Tensor | int) -> None:
        """Checks pyvene's width of an intervention. Raises ValueError where it is not embed_dim."""
        if int(interchange_dim) != self.embed_dim:
            raise ValueError(f"interchange_dim: expected embed_dim={self.embed_dim}, got {int(interchange_dim)}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes pyreft's state dict of the class (:mod:`reft_kernels.pyreft_layout`) as well as this module's own.

        Raises ValueError where its rank, its width or the rows of its R are not this module's; nothing of this module
        has changed then.
        """
        own = {*self._parameters, *self._buffers}
        keys = (ORTHONORMAL_KEYS if self.orthonormal else FREE_KEYS) - own
        theirs = {name for name in keys if prefix + name in state_dict}
        if not theirs.isdisjoint(PYREFT_ONLY if self.has_c else PYREFT_ONLY | {"proj_layer.bias"}):
            translated = self._translated({name: state_dict[prefix + name] for name in theirs})
            for name in theirs:
                del state_dict[prefix + name]
            state_dict.update({prefix + name: value for name, value in translated.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translated(self, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of pyreft in this module's own names."""
        kind, (d, r) = type(self).__name__, (self.embed_dim, self.low_rank_dimension)
        try:
            R, W, b, c = read_operands(theirs)
        except ValueError as error:
            raise ValueError(f"{kind}: pyreft's state dict does not fit together: {error}") from error
        shape = next((t.shape for t in (R, W) if t is not None), None)
        if shape is not None and shape != (r, d):
            raise ValueError(
                f"{kind}: the state dict has low_rank_dimension={shape[0]} and embed_dim={shape[1]}, this module has "
                f"low_rank_dimension={r} and embed_dim={d}"
            )
        found = {"learned_source.weight": W, "learned_source.bias": b}
        if self.has_c:
            found["proj_layer.bias"] = c
        if R is not None and self.orthonormal:
            try:
                state = self.rotate_layer.state_of(R)
            except ValueError as error:
                raise ValueError(f"{kind}: {error}") from error
            found |= {f"rotate_layer.{name}": value for name, value in state.items()}
        else:
            found["proj_layer.weight"] = R
        return {name: value for name, value in found.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, in types that JSON has. A subclass adds its own, or they are not saved."""
        linear = self.learned_source if self.has_W else None
        dtype = linear.weight.dtype if isinstance(linear, nn.Linear) else torch.float32
        return {
            "embed_dim": self.embed_dim,
            "low_rank_dimension": self.low_rank_dimension,
            "dtype": str(dtype).removeprefix("torch."),
            "dropout": getattr(self.dropout, "p", 0.0),
            "act_fn": self.activation,
            "add_bias": self.add_bias,
            **self._rows_settings(),
        }

    def _rows_settings(self) -> dict[str, Any]:
        if not self.orthonormal:
            return {}
        rows = self.rotate_layer.rows
        k = {"orthogonal_to": rows.k} if isinstance(rows, ComplementRows) else {}
        return {"orthogonality": rows.orthogonality, **k}

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"embed_dim={self.embed_dim}, low_rank_dimension={self.low_rank_dimension}, act_fn={self.activation}"


class LoreftIntervention(Intervention):
    """LoReFT(h) = h + R^T (f(W h + b) - R h), R with orthonormal rows. Paper eq. 2; arguments of Intervention."""

    orthonormal, has_W, subtract = True, True, True


class NoreftIntervention(Intervention):
    """NoReFT(h) = h + R^T (f(W h + b) - (R h + c)), R free. Paper appendix E; arguments of Intervention."""

    orthonormal, has_W, subtract, has_c = False, True, True, True


class ConsreftIntervention(Intervention):
    """ConsReFT(h) = h + R^T (b - R h), R with orthonormal rows. Paper appendix E; arguments of Intervention.

    ``act_fn`` and ``dropout`` have no effect, as in pyreft; ``learned_source`` is b itself.
    """

    orthonormal, has_W, subtract, takes_dropout = True, False, True, False


class LobireftIntervention(Intervention):
    """LobiReFT(h) = h + R^T b, R with orthonormal rows. Paper appendix E; arguments of Intervention.

    ``act_fn`` has no effect, as in pyreft; ``learned_source`` is b itself.
    """

    orthonormal, has_W, subtract = True, False, False


class DireftIntervention(Intervention):
    """h + R^T f(W h + b), R with orthonormal rows. Paper appendix E; arguments of Intervention.

    The paper's own DiReFT, with R free, is :class:`NodireftIntervention`.
    """

    orthonormal, has_W, subtract = True, True, False


class NodireftIntervention(Intervention):
    """DiReFT(h) = h + R^T f(W h + b), R free. Paper eq. 3 with R = W2 and W = W1; arguments of Intervention.

    ``add_bias`` has no effect: pyreft's bias is never used and would be a parameter without a gradient.
    """

    orthonormal, has_W, subtract = False, True, False


METHODS: dict[str, type[Intervention]] = {
    "loreft": LoreftIntervention,
    "noreft": NoreftIntervention,
    "consreft": ConsreftIntervention,
    "lobireft": LobireftIntervention,
    "direft": DireftIntervention,
    "nodireft": NodireftIntervention,
}
INTERVENTIONS: dict[str, type[Intervention]] = {cls.__name__: cls for cls in METHODS.values()}


def edit_rows(
    interventions: Sequence[Intervention],
    h: Tensor,
    positions: Tensor | None = None,
    group: Tensor | None = None,
    scale: Tensor | None = None,
    inplace: bool = False,
    rebuild: bool = False,
) -> Tensor:
    """Several interventions of one hidden state as one edit.

    Args:
        interventions: G of them, of one embed_dim.
        h: [B, S, d]; any [..., d] without positions.
        positions: integers [B, P], -1 names none; None: every row.
        group: integers [B, P] (or h.shape[:-1]), which intervention edits the row, -1: none; may be left out for
            a single one.
        scale: floats of the shape of ``group``.
        inplace: write h.
        rebuild: let the last edit in place keep h for its backward instead of a copy of its rows, see
            :func:`reft_kernels.edit`; where it has dropout it copies all the same.

    Returns:
        The shape and dtype of h. Interventions of one kind (subtract, activation, dropout, which weights exist) are
        one call of :func:`reft_kernels.edit`, smaller ranks padded with zeros, which add nothing.

    Raises:
        ValueError: no intervention, or several without a group; and what :func:`reft_kernels.edit` raises.
    """
    if not interventions:
        raise ValueError("interventions: expected at least one")
    if group is None:
        if len(interventions) > 1:
            raise ValueError(f"group: expected integers that pick one of the {len(interventions)} interventions")
        w = interventions[0].edit_weights()
        return edit(
            h, w.R, w.W, w.b, c=w.c, positions=positions, scale=scale, subtract=w.subtract,
            activation=w.activation, dropout=w.dropout, inplace=inplace,
            rebuild=inplace and rebuild and w.dropout == 0,
        )  # fmt: skip
    kinds: dict[tuple[Any, ...], list[tuple[int, EditWeights]]] = {}
    for index, intervention in enumerate(interventions):
        w = intervention.edit_weights()
        kind = (w.W is not None, w.b is not None, w.c is not None, w.subtract, w.activation, w.dropout)
        kinds.setdefault(kind, []).append((index, w))
    for number, members in enumerate(kinds.values(), start=1):
        first = members[0][1]
        own = group
        if len(kinds) > 1:
            own = torch.full_like(group, -1)
            for local, (index, _) in enumerate(members):
                own = own.masked_fill(group == index, local)
        R, W, b, c = (_stack([w[i] for _, w in members]) for i in range(4))
        assert R is not None
        h = edit(
            h, R, W, b, c=c, positions=positions, group=own, scale=scale, subtract=first.subtract,
            activation=first.activation, dropout=first.dropout, inplace=inplace,
            rebuild=inplace and rebuild and first.dropout == 0 and number == len(kinds),
        )  # fmt: skip
    return h


def _stack(weights: list[Any]) -> Tensor | None:
    """[r_i, d] or [r_i] to [G, r, d] or [G, r] with r the largest, zero-padded; None if they are."""
    if weights[0] is None:
        return None
    r = max(w.shape[0] for w in weights)
    dtype = weights[0].dtype
    for w in weights:
        dtype = torch.promote_types(dtype, w.dtype)
    padding = ((0, 0, 0) if w.dim() == 2 else (0,) for w in weights)
    return torch.stack([F.pad(w.to(dtype), (*p, r - w.shape[0])) for w, p in zip(weights, padding, strict=True)])


def _check_orthogonality(kind: type[Intervention], orthogonality: Any, orthogonal_to: Any) -> None:
    if orthogonality is not None and orthogonality not in ORTHOGONALITIES:
        raise ValueError(f"orthogonality: expected one of {', '.join(ORTHOGONALITIES)}, got {orthogonality!r}")
    if kind.orthonormal:
        return
    if orthogonality not in (None, "none"):
        raise ValueError(f"orthogonality: expected 'none', as R of {kind.__name__} is free; got {orthogonality!r}")
    if orthogonal_to is not None:
        raise ValueError(f"orthogonal_to: expected None, as R of {kind.__name__} is free")


def _rows_of(orthogonal_to: Intervention | Tensor | int | None) -> Tensor | int | None:
    """The rows [k, d] of what an intervention shall be orthogonal to."""
    if not isinstance(orthogonal_to, Intervention):
        return orthogonal_to
    if not orthogonal_to.orthonormal:
        raise ValueError(
            f"orthogonal_to: expected an intervention with orthonormal rows, got {type(orthogonal_to).__name__}"
        )
    return orthogonal_to.rotate_layer.rows.weight.detach()


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return value


def read_dtype(dtype: Any) -> torch.dtype | None:
    """A torch.dtype from itself or from its name ("bfloat16", "torch.bfloat16"); None stays None.

    Raises ValueError where it is no floating dtype.
    """
    if dtype is None:
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: expected a floating torch dtype or its name, got {dtype!r}")
    return found
