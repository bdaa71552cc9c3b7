"""What to edit, where and with what: ReftConfig and its representations."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from reft_kernels.interventions import METHODS, read_dtype
from reft_kernels.positions import parse_positions
from reft_kernels.stiefel import ORTHOGONALITIES

# pyvene's other fields of a representation, and the only value of each that has a meaning here.
_PYVENE_FIELDS: dict[str, Any] = {
    "unit": "pos",
    "max_number_of_units": 1,
    "subspace_partition": None,
    "group_key": None,
    "intervention_link_key": None,
    "moe_key": None,
    "source_representation": None,
    "hidden_source_representation": None,
    "latent_dim": None,
}


@dataclasses.dataclass
class Representation:
    """One place of the model and the intervention that edits it.

    Attributes:
        layer: index of the block, from 0; None where ``component`` is a path.
        component: "block_output", "block_input", "mlp_output", "mlp_input", "attention_output",
            "attention_input", or a path ending in ".output" or ".input", such as "model.layers[3].mlp.output".
        low_rank_dimension: r.
        intervention: the module that edits; or
        intervention_type: its class, built with the module's width as ``embed_dim``.
        positions: "f7", "l7", "f7+l7" or "all"; None where the caller names them (or means every token).
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

    @classmethod
    def read(cls, value: Any) -> Representation:
        """A Representation from itself or from one of pyreft's dicts."""
        if isinstance(value, Representation):
            return value
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


class ReftConfig:
    """Which representations are edited, either listed or in a short form by method.

    Listed, as pyreft does it::

        ReftConfig(representations=[{"layer": 8, "component": "block_output", "low_rank_dimension": 4,
                                     "intervention": LoreftIntervention(embed_dim=4096, low_rank_dimension=4)}])

    By method::

        ReftConfig(method="loreft", layers="all", rank=4, positions="f7+l7", tied=False)

    Args:
        representations: one dict or a list of dicts or Representations; or
        method: "loreft", "noreft", "consreft", "lobireft", "direft" or "nodireft".
        layers: "all", a list of ints, or "0;5;10".
        rank: r.
        positions: "f7+l7" and the like, computed on the device from the attention mask of each call; "all" or
            None for every token. For listed representations the default of those that have none.
        tied: whether prefix and suffix share one intervention. Untied with both ends there are two interventions
            a layer: those of the prefix for all layers first, then those of the suffix (pyreft's order).
        component: where in each layer.
        dropout, act_fn, add_bias, dtype: of the interventions (dtype None: float32).
        rebuild: let the last edit that is written into a block's own output rebuild the rows before it in the backward
            instead of copying them in the forward. The block's output must then stay as edited until the backward
            (an error tells where the model writes it again), and for bfloat16 the gradient of W is off by 6e-4 to
            2e-3 relative. No effect on edits with dropout.
        orthogonality: how the rows of R are kept orthonormal: "householder" (None), "polar" or "none", see
            :func:`reft_kernels.stiefel.make_rows`. For listed representations that of those that are still to be built
            and have none of their own.
        intervention_types: class of all the listed representations that have none (pyvene's keyword).

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        representations: Any = None,
        *,
        method: str | None = None,
        layers: str | Iterable[int] | None = None,
        rank: int | None = None,
        positions: str | None = None,
        tied: bool = True,
        component: str = "block_output",
        dropout: float = 0.0,
        act_fn: str | None = None,
        add_bias: bool = False,
        dtype: torch.dtype | str | None = None,
        rebuild: bool = True,
        orthogonality: str | None = None,
        intervention_types: type[nn.Module] | None = None,
    ) -> None:
        self.method = method
        self.layers = read_layers(layers)
        self.rank = rank
        self.positions = positions
        self.tied = tied
        self.component = component
        self.dropout = dropout
        self.act_fn = act_fn
        self.add_bias = add_bias
        self.dtype = read_dtype(dtype)
        self.rebuild = rebuild
        self.orthogonality = orthogonality
        if not isinstance(rebuild, bool):
            raise TypeError(f"rebuild must be True or False, got {rebuild!r}")
        if orthogonality not in (None, *ORTHOGONALITIES):
            raise ValueError(f"orthogonality must be one of {', '.join(ORTHOGONALITIES)}, got {orthogonality!r}")
        if positions is not None:
            parse_positions(positions)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self._listed: list[Representation] | None = None
        if representations is None:
            self._check_short_form()
            return
        if method is not None or self.layers is not None or rank is not None:
            raise ValueError("give representations or method, layers and rank, not both")
        if isinstance(representations, (Mapping, Representation)):
            representations = [representations]
        if not isinstance(representations, Sequence) or isinstance(representations, str):
            raise TypeError(f"representations must be a dict or a list, got {type(representations).__name__}")
        if not representations:
            raise ValueError("representations is empty: there is nothing to edit")
        if intervention_types is not None:
            representations = [_with_type(item, intervention_types) for item in representations]
        self._listed = [self._with_orthogonality(Representation.read(item)) for item in representations]
        if positions is not None:
            self._listed = [
                item if item.positions is not None else dataclasses.replace(item, positions=positions)
                for item in self._listed
            ]

    def _with_orthogonality(self, item: Representation) -> Representation:
        if self.orthogonality is None or item.intervention_type is None or item.orthogonality is not None:
            return item
        return dataclasses.replace(item, orthogonality=self.orthogonality)

    def _check_short_form(self) -> None:
        if self.method is None:
            raise ValueError(f"give representations, or a method: one of {sorted(METHODS)}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {sorted(METHODS)}, got {self.method!r}")
        if self.layers is None:
            raise ValueError("method needs layers: 'all', a list of ints or '0;5;10'")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"method needs rank, an int of at least 1, got {self.rank!r}")
        if "." in self.component:
            raise ValueError(
                f"component={self.component!r} is the path of one module: give it in representations, not with layers"
            )

    @property
    def representations(self) -> list[Representation] | None:
        """The listed representations; None for layers="all", which needs a model (see ``expand``)."""
        return self._listed if self.layers == "all" or self._listed is not None else self.expand(None)

    @property
    def needs_layer_count(self) -> bool:
        """Whether ``expand`` has to be told how many layers there are."""
        return self._listed is None and self.layers == "all"

    def expand(self, num_layers: int | None) -> list[Representation]:
        """One Representation for each intervention, in the order of ``unit_locations``."""
        if self._listed is not None:
            return self._listed
        assert self.method is not None
        if isinstance(self.layers, list):
            layers = self.layers
        elif num_layers is not None:
            layers = list(range(num_layers))
        else:
            raise ValueError("layers='all' needs the number of layers of the model")
        return [
            Representation(
                layer=layer,
                component=self.component,
                low_rank_dimension=self.rank,
                intervention_type=METHODS[self.method],
                positions=end,
                dtype=self.dtype,
                dropout=self.dropout,
                act_fn=self.act_fn,
                add_bias=self.add_bias,
                orthogonality=self.orthogonality,
            )
            for end in self._ends()
            for layer in layers
        ]

    def _ends(self) -> list[str | None]:
        """The positions of one layer's interventions."""
        span = None if self.positions is None else parse_positions(self.positions)
        if self.tied or span is None or 0 in span:
            return [self.positions]
        return [f"f{span[0]}", f"l{span[1]}"]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-able values (without the interventions' weights)."""
        return {
            "method": self.method,
            "layers": self.layers,
            "rank": self.rank,
            "positions": self.positions,
            "tied": self.tied,
            "component": self.component,
            "dropout": self.dropout,
            "act_fn": self.act_fn,
            "add_bias": self.add_bias,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            "rebuild": self.rebuild,
            "orthogonality": self.orthogonality,
        }

    @classmethod
    def restore(cls, settings: Mapping[str, Any], representations: list[Representation]) -> ReftConfig:
        """The config whose ``to_dict`` was saved, with its representations as they were."""
        names = ("positions", "tied", "component", "dropout", "act_fn", "add_bias", "dtype")
        config = cls(representations, **{name: settings[name] for name in names})
        config.rebuild = settings.get("rebuild", True)
        config.orthogonality = settings.get("orthogonality")
        config.method, config.rank = settings["method"], settings["rank"]
        config.layers = read_layers(settings["layers"])
        return config

    def to_json_string(self) -> str:
        """``to_dict`` as JSON (what the loggers of transformers' Trainer ask for)."""
        return json.dumps(self.to_dict(), indent=2)

    def __repr__(self) -> str:
        given = {name: value for name, value in self.to_dict().items() if value is not None}
        if self._listed is not None:
            given["representations"] = [item.place for item in self._listed]
        return f"ReftConfig({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def read_layers(layers: str | Iterable[int] | None) -> str | list[int] | None:
    """ "all", or a list of distinct ints of at least 0 from a list or from "0;5;10"."""
    if layers is None or layers == "all":
        return layers
    expected = "layers must be 'all', a list of distinct ints of at least 0, or such as '0;5;10'"
    if isinstance(layers, str):
        try:
            found = [int(part) for part in layers.split(";")]
        except ValueError:
            raise ValueError(f"{expected}, got {layers!r}") from None
    elif isinstance(layers, Iterable):
        found = list(layers)
    else:
        raise TypeError(f"{expected}, got {type(layers).__name__}")
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in found):
        raise TypeError(f"{expected}, got {found!r}")
    if not found or min(found) < 0 or len(set(found)) != len(found):
        raise ValueError(f"{expected}, got {found!r}")
    return found


def _with_type(item: Any, default: type[nn.Module]) -> Any:
    if isinstance(item, Mapping) and item.get("intervention") is None and item.get("intervention_type") is None:
        return {**item, "intervention_type": default}
    return item
