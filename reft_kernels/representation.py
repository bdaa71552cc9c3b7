"""One place of a model and the intervention that edits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from reft_kernels.interventions import read_dtype
from reft_kernels.positions import parse_positions
from reft_kernels.stiefel import ORTHOGONALITIES

# pyvene's other fields of a representation, and the only value of each that has a meaning here.
_PYVENE_FIELDS: dict[str, Any] = {
    "unit": "pos",
    "max_number_of_units": 1,
    "subspace_partition": None,
    "group_key": None,
    "moe_key": None,
    "source_representation": None,
    "hidden_source_representation": None,
    "latent_dim": None,
}

# pyvene's ``RepresentationConfig`` in its order, for representations that are plain lists; latent_dim was added last.
PYVENE_FIELDS = (
    "layer", "component", "unit", "max_number_of_units", "low_rank_dimension", "intervention_type", "intervention",
    "subspace_partition", "group_key", "intervention_link_key", "moe_key", "source_representation",
    "hidden_source_representation", "latent_dim",
)  # fmt: skip


class FunctionIntervention(nn.Module):
    """A plain function ``(base, source)`` as an intervention (pyvene ``LambdaIntervention``); it is not saved."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, base: torch.Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Any:
        """function(base, source), with the subspaces after them where there are any."""
        return self.function(*(base, source) if subspaces is None else (base, source, subspaces), **kwargs)


@dataclasses.dataclass
class Representation:
    """One place of the model and the intervention that edits it.

    Attributes:
        layer: index of the block, from 0; None where ``component`` is a path.
        component: "block_output", "block_input", "mlp_output", "mlp_input", "attention_output",
            "attention_input", or a path ending in ".output" or ".input", such as "model.layers[3].mlp.output".
        low_rank_dimension: r.
        intervention: the module that edits, or a function ``(base, source)``; or
        intervention_type: its class, built with the module's width as ``embed_dim``.
        positions: "f7", "l7", "f7+l7" or "all"; None where the caller names them (or means every token).
        intervention_link_key: representations of one model with the same key share the intervention of the first. (In
            pyvene the second would edit what the first made of its own hidden state.)
        dtype, dropout, act_fn, add_bias, orthogonality: passed to ``intervention_type``; None keeps the class's own
            default.
    """

    layer: int | None = None
    component: str = "block_output"
    low_rank_dimension: int | None = None
    intervention: nn.Module | None = None
    intervention_type: type[nn.Module] | None = None
    positions: str | None = None
    dtype: torch.dtype | None = None
    dropout: float | None = None
    act_fn: str | None = None
    add_bias: bool | None = None
    orthogonality: str | None = None
    intervention_link_key: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.component, str) or not self.component:
            raise TypeError(f"component must be a non-empty string, got {self.component!r}")
        if self.is_path:
            self.layer = None
        elif isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise TypeError(f"layer of a {self.component!r} representation must be an int, got {self.layer!r}")
        if (self.intervention is None) == (self.intervention_type is None):
            raise ValueError(
                f"{self.place}: give intervention (a module) or intervention_type (a class), exactly one of the two"
            )
        given: Any = self.intervention
        if isinstance(given, FunctionType):
            self.intervention = FunctionIntervention(given)
        if self.intervention is not None and not isinstance(self.intervention, nn.Module):
            raise TypeError(
                f"{self.place}: intervention must be a torch.nn.Module, got {type(self.intervention).__name__}"
            )
        if self.intervention_type is not None and not (
            isinstance(self.intervention_type, type) and issubclass(self.intervention_type, nn.Module)
        ):
            raise TypeError(
                f"{self.place}: intervention_type must be a class of torch.nn.Module, got {self.intervention_type!r}"
            )
        self.dtype = read_dtype(self.dtype)
        if self.positions is not None:
            parse_positions(self.positions)
        if self.orthogonality not in (None, *ORTHOGONALITIES):
            raise ValueError(
                f"{self.place}: orthogonality must be one of {', '.join(ORTHOGONALITIES)}, got {self.orthogonality!r}"
            )
        self._check_rank()

    def _check_rank(self) -> None:
        if self.intervention is None:
            rank = self.low_rank_dimension
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"{self.place}: low_rank_dimension must be an int of at least 1, got {rank!r}")
            return
        own = getattr(self.intervention, "low_rank_dimension", None)
        if not isinstance(own, int):
            return
        if self.low_rank_dimension not in (None, own):
            raise ValueError(
                f"{self.place}: low_rank_dimension is {self.low_rank_dimension}, but the intervention has {own}"
            )
        self.low_rank_dimension = own

    @property
    def is_path(self) -> bool:
        """Whether the component is a path of modules rather than a name."""
        return "." in self.component

    @property
    def place(self) -> str:
        """The place in words, for messages."""
        return self.component if self.is_path else f"{self.component} of layer {self.layer}"

    @property
    def span(self) -> tuple[int, int] | None:
        """(first, last) of ``positions``; None for every token."""
        return None if self.positions is None else parse_positions(self.positions)

    def build(self, embed_dim: int) -> nn.Module:
        """The intervention, made for rows of ``embed_dim`` values where only its class was given."""
        if self.intervention is not None:
            return self.intervention
        assert self.intervention_type is not None
        options = {name: getattr(self, name) for name in ("dtype", "dropout", "act_fn", "add_bias", "orthogonality")}
        return self.intervention_type(
            embed_dim=embed_dim,
            low_rank_dimension=self.low_rank_dimension,
            **{name: value for name, value in options.items() if value is not None},
        )

    @property
    def build_type(self) -> type[nn.Module]:
        """The class of the intervention that is still to be made."""
        assert self.intervention_type is not None
        return self.intervention_type

    @classmethod
    def read(cls, value: Any) -> Representation:
        """A Representation from itself, from one of pyreft's dicts, or from pyvene's tuple or list of fields."""
        if isinstance(value, Representation):
            return value
        if hasattr(value, "_asdict"):
            value = {name: field for name, field in value._asdict().items() if field is not None}
        elif isinstance(value, (list, tuple)) and len(value) <= len(PYVENE_FIELDS):
            given = zip(PYVENE_FIELDS, value, strict=False)
            value = {name: field for name, field in given if field is not None}
        if not isinstance(value, Mapping):
            raise TypeError(f"a representation must be a dict or a Representation, got {type(value).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in value:
            if name in known:
                continue
            if name not in _PYVENE_FIELDS:
                raise ValueError(f"unknown key {name!r} in a representation; known are {sorted(known)}")
            if value[name] not in (None, _PYVENE_FIELDS[name]):
                raise ValueError(
                    f"{name}={value[name]!r} in a representation is not supported, only {_PYVENE_FIELDS[name]!r}"
                )
        return cls(**{name: item for name, item in value.items() if name in known})


def read_representations(value: Any, types: Any) -> list[Representation]:
    """pyvene's ``representations``: one or a list of them, each with the class of ``types`` where it has none.

    ``types`` is a class for all, or a list with one for each. Raises TypeError or ValueError naming the argument.
    """
    if isinstance(value, (Mapping, Representation)) or hasattr(value, "_asdict"):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"representations must be a dict or a list, got {type(value).__name__}")
    if isinstance(types, (list, tuple)) and len(types) != len(value):
        raise ValueError(f"intervention_types must be one class, or {len(value)} of them, got {len(types)}")
    each = types if isinstance(types, (list, tuple)) else [types] * len(value)
    return [Representation.read(_with_type(item, kind)) for item, kind in zip(value, each, strict=True)]


def _with_type(item: Any, default: type[nn.Module] | None) -> Any:
    if default is not None and hasattr(item, "_asdict"):
        item = item._asdict()
    elif default is not None and isinstance(item, (list, tuple)):
        item = dict(zip(PYVENE_FIELDS, item, strict=False))
    if default is None or not isinstance(item, Mapping):
        return item
    if item.get("intervention") is None and item.get("intervention_type") is None:
        return {**item, "intervention_type": default}
    return item
