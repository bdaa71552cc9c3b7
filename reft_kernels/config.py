"""What to edit, where and with what: ReftConfig."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from reft_kernels.interventions import METHODS, read_dtype
from reft_kernels.positions import parse_positions
from reft_kernels.representation import Representation as Representation
from reft_kernels.representation import read_representations
from reft_kernels.stiefel import ORTHOGONALITIES


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
        intervention_types: class of all the listed representations that have none, or one for each (pyvene's keyword).
        mode: "parallel", the only one of pyvene's that means something without sources.
        sorted_keys, model_type, intervention_dimensions, intervention_constant_sources: what pyvene keeps in its files;
            without effect.

    An empty list of representations edits nothing (a baseline that trains LoRA alone).

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
        intervention_types: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
        mode: str = "parallel",
        sorted_keys: Any = None,
        model_type: Any = None,
        intervention_dimensions: Any = None,
        intervention_constant_sources: Any = None,
    ) -> None:
        del sorted_keys, model_type, intervention_dimensions, intervention_constant_sources
        if mode != "parallel":
            raise ValueError(f"mode must be 'parallel', got {mode!r}")
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
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be a number of at least 0 and below 1, got {dropout!r}")
        if not isinstance(tied, bool):
            raise TypeError(f"tied must be True or False, got {tied!r}")
        self._listed: list[Representation] | None = None
        if representations is None:
            self._check_short_form()
            return
        if method is not None or self.layers is not None or rank is not None:
            raise ValueError("give representations or method, layers and rank, not both")
        self._listed = [self._with_defaults(item) for item in read_representations(representations, intervention_types)]

    def _with_defaults(self, item: Representation) -> Representation:
        if self.positions is not None and item.positions is None:
            item = dataclasses.replace(item, positions=self.positions)
        if self.orthogonality is not None and item.intervention_type is not None and item.orthogonality is None:
            item = dataclasses.replace(item, orthogonality=self.orthogonality)
        return item

    def add_intervention(self, representations: Any) -> None:
        """Append to the listed representations (pyvene ``IntervenableConfig.add_intervention``).

        Raises ValueError where the config is a short form, by method.
        """
        if self._listed is None:
            raise ValueError("add_intervention needs a config with representations, this one has a method")
        self._listed = [*self._listed, *map(self._with_defaults, read_representations(representations, None))]

    @property
    def intervention_types(self) -> list[type[nn.Module]]:
        """The class of every listed representation's intervention."""
        listed = self.representations or []
        return [type(item.intervention) if item.intervention is not None else item.build_type for item in listed]

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
    if layers is None or (isinstance(layers, str) and layers == "all"):
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
