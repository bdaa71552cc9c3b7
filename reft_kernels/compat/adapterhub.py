"""ReFT adapters of AdapterHub's package ``adapters``, read and written.

    adapter_config.json                          the ReftConfig as "config", and for which model
    pytorch_adapter.bin or adapter.safetensors   {blocks}.{layer}.reft_layer.refts.{name}.units.{unit}.{weight}

A unit is h + P^T (f(W h + b) - P h), the last term without where ``subtract_projection`` is False; its weights are
learned_source.weight W, learned_source.bias b and projection.weight P [r, d], or that one's orthogonal parametrization
(:mod:`reft_kernels.torch_orthogonal`). Tied there is one unit a layer, else unit 0 for the prefix and 1 for the suffix.

``adapters`` 1.3.0 neither writes ``subtract_projection`` nor takes it from a file, so that it reads its own DiReFT as a
NoReFT; the adapter has to be added with ``DiReftConfig`` before its weights are loaded. :func:`save_adapter` writes the
key for :func:`read_adapter`.

Where a sequence has fewer than twice as many tokens as a prefix or suffix, ``adapters`` edits more of them than this
library, which gives each end at most half of the tokens, as pyreft does.

Source: adapters/methods/reft.py, adapters/loading.py and adapters/configuration/adapter_config.py of adapters 1.3.0.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels.checkpoint import LISTED_CONFIG, SavedAdapter, build_interventions, refuse_other_files
from reft_kernels.compat.pyreft_files import key_of, load_state
from reft_kernels.folders import replace_folder
from reft_kernels.interventions import (
    METHODS,
    DireftIntervention,
    Intervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from reft_kernels.modules import block_list, inner_model
from reft_kernels.positions import parse_positions
from reft_kernels.tensor_files import read_json, read_pickle, read_safetensors, write_json, write_pickle
from reft_kernels.torch_orthogonal import parametrization_of, parametrized_matrix

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "pytorch_adapter.bin"
SAFE_WEIGHTS_FILE = "adapter.safetensors"

_HEAD_FILES = {"head_config.json", "pytorch_model_head.bin", "model_head.safetensors"}
_NAME = "reft"
_WEIGHT = re.compile(
    r"(?:(?P<blocks>.+)\.)?(?P<layer>\d+)\.reft_layer\.refts\.[^.]+\.units\.(?P<unit>[01])\.(?P<name>.+)"
)
_ORIGINAL = "projection.parametrizations.weight.original"
_BASE = "projection.parametrizations.weight.0.base"
_ACTIVATIONS = {None: "linear", "swish": "silu"}

# By orthogonality and subtract_projection.
_CLASSES: dict[tuple[bool, bool], type[Intervention]] = {
    (True, True): LoreftIntervention,
    (True, False): DireftIntervention,
    (False, True): NoreftIntervention,
    (False, False): NodireftIntervention,
}


_BASE_MODEL = {
    "hidden_size": "hidden_size",
    "model_type": "model_type",
    "class": "model_class",
    "name_or_path": "model_name",
}


class _Layer(NamedTuple):
    """A block of the model that the adapter was made for."""

    blocks: str
    number: int


def read_adapter(
    folder: Path, model: nn.Module, method: str | None = None, orthogonality: str | None = None
) -> SavedAdapter:
    """The adapter of a folder that AdapterHub's ``save_adapter`` wrote, or this library's with format="adapterhub".

    Args:
        folder: the folder.
        model: the base model, whose list of blocks says what a layer is.
        method: "noreft" or "nodireft", where the folder does not say which of the two it is.
        orthogonality: how rows shall be kept orthonormal (None: "householder").

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: naming the file: an adapter of another kind, a ``method`` that is missing or contradicted, weights
            that are left out, left over or do not fit.
    """
    path = folder / CONFIG_FILE
    document = read_json(path)
    config = _read_config(path, document)
    kind = _class_of(path, config, method)
    weights, layers = _read_weights(folder)
    blocks = _block_path(model)
    entries: list[dict[str, Any]] = []
    states: dict[str, dict[str, Tensor]] = {}
    for unit, positions in _spans(path, config).items():
        for layer, units in layers.items():
            where = f"{weights}: layer {layer.number}, unit {unit}"
            state = _state(where, units.get(unit, {}), kind)
            number, component = _place(layer, blocks)
            above = sum((entry["layer"], entry["component"]) == (number, component) for entry in entries)
            key = key_of(number, component, above)
            states[key] = state
            settings = _settings(config, state["learned_source.weight"])
            if orthogonality is not None and kind.orthonormal:
                settings["orthogonality"] = orthogonality
            entries.append(
                {
                    "key": key,
                    "layer": number,
                    "component": component,
                    "low_rank_dimension": settings["low_rank_dimension"],
                    "positions": positions,
                    "intervention": kind.__name__,
                    "settings": settings,
                    "same_as": None,
                }
            )

    def fill(key: str, intervention: nn.Module) -> None:
        load_state(weights, intervention, states[key])

    interventions = build_interventions(path, entries, fill)
    read = {
        "base_model": {ours: document.get(theirs) or None for ours, theirs in _BASE_MODEL.items()},
        "config": {**LISTED_CONFIG, "tied": config["tied_weights"]},
        "representations": entries,
    }
    return SavedAdapter(read, interventions)


def _read_config(path: Path, document: Mapping[str, Any]) -> Mapping[str, Any]:
    config = document.get("config")
    if not isinstance(config, Mapping) or config.get("architecture") != "reft":
        kind = config.get("architecture") if isinstance(config, Mapping) else document.get("peft_type")
        raise ValueError(f"{path} is not of a ReFT adapter of AdapterHub's, but of architecture {kind!r}")
    for name in ("prefix_positions", "suffix_positions", "orthogonality", "tied_weights"):
        if not isinstance(config.get(name), int):
            raise ValueError(f"{path}: config.{name} must be a number or true or false, got {config.get(name)!r}")
    return config


def _settings(config: Mapping[str, Any], W: Tensor) -> dict[str, Any]:
    """The constructor's arguments."""
    return {
        "embed_dim": W.shape[-1],
        "low_rank_dimension": len(W),
        "dtype": str(W.dtype).removeprefix("torch."),
        "dropout": config.get("dropout", 0.0),
        "act_fn": _ACTIVATIONS.get(config.get("non_linearity"), config.get("non_linearity")),
    }


def _class_of(path: Path, config: Mapping[str, Any], method: str | None) -> type[Intervention]:
    orthonormal = bool(config["orthogonality"])
    says = config.get("subtract_projection", True if orthonormal else None)
    if says is None:
        if method not in ("noreft", "nodireft"):
            raise ValueError(
                f"{path}: adapters saves NoReFT and DiReFT alike; pass method='noreft' or, for DiReFT, "
                f"method='nodireft', got {method!r}"
            )
        return METHODS[method]
    kind = _CLASSES[orthonormal, bool(says)]
    if method is not None and METHODS.get(method) is not kind:
        raise ValueError(f"method: {path} is of a {kind.__name__}, the argument is {method!r}")
    return kind


def method_of(intervention: nn.Module) -> str | None:
    """The ``method`` to read an adapter with that an intervention shall take; None where the file says it."""
    return next((name for name in ("noreft", "nodireft") if isinstance(intervention, METHODS[name])), None)


def _spans(path: Path, config: Mapping[str, Any]) -> dict[int, str]:
    """Positions of each unit that edits any."""
    ends = [f"{end}{config[name]}" for end, name in (("f", "prefix_positions"), ("l", "suffix_positions"))]
    used = {unit: end for unit, end in enumerate(ends) if int(end[1:]) > 0}
    if not used:
        raise ValueError(f"{path}: prefix_positions and suffix_positions are both 0: nothing is edited")
    return {0: "+".join(used.values())} if config["tied_weights"] else used


def _read_weights(folder: Path) -> tuple[Path, dict[_Layer, dict[int, dict[str, Tensor]]]]:
    """The file, and the weights of each unit of each layer."""
    path = folder / WEIGHTS_FILE
    if path.is_file() or not (folder / SAFE_WEIGHTS_FILE).is_file():
        tensors = read_pickle(path)
    else:
        path = folder / SAFE_WEIGHTS_FILE
        tensors = read_safetensors(path)
    layers: dict[_Layer, dict[int, dict[str, Tensor]]] = {}
    for name, value in tensors.items():
        match = _WEIGHT.fullmatch(name)
        if match is None:
            raise ValueError(f"{path}: the key {name} is not one of a ReFT adapter")
        units = layers.setdefault(_Layer(match["blocks"] or "", int(match["layer"])), {})
        units.setdefault(int(match["unit"]), {})[match["name"]] = value
    if not layers:
        raise ValueError(f"{path}: there are no weights of a ReFT adapter")
    lists = list(dict.fromkeys(layer.blocks for layer in layers))
    return path, dict(sorted(layers.items(), key=lambda item: (lists.index(item[0].blocks), item[0].number)))


def _block_path(model: nn.Module) -> str | None:
    """Where the blocks of a model lie, within any wrapper of PEFT; None where that is not known."""
    try:
        return block_list(inner_model(model))[0]
    except ValueError:
        return None


def _place(layer: _Layer, blocks: str | None) -> tuple[int | None, str]:
    """Layer and component. The model may have a head that the adapter's had not, and the other way round."""
    here, there = f".{blocks}", f".{layer.blocks}"
    if blocks is not None and (here.endswith(there) or there.endswith(here)):
        return layer.number, "block_output"
    return None, f"{layer.blocks}[{layer.number}].output"


def _state(place: str, weights: Mapping[str, Tensor], kind: type[Intervention]) -> dict[str, Tensor]:
    """A unit's weights under the names of pyreft's state dicts, which the interventions load."""
    state = dict(weights)
    matrix = _ORIGINAL if kind.orthonormal else "projection.weight"
    for name in ("learned_source.weight", "learned_source.bias", matrix):
        if name not in state:
            raise ValueError(f"{place}: the key {name} is missing")
    if not kind.orthonormal:
        state["proj_layer.weight"] = state.pop(matrix)
        return state
    try:
        P = parametrized_matrix(state.pop(matrix), state.pop(_BASE, None))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return {**state, "rotate_layer": P.T}


def save_adapter(
    folder: Path,
    description: Mapping[str, Any],
    interventions: Mapping[str, nn.Module],
    model: nn.Module,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter that AdapterHub's ``load_adapter`` reads, under the name "reft": all of it or nothing.

    Args:
        folder, description, interventions, check: see :func:`reft_kernels.checkpoint.save_adapter`.
        model: the base model.

    Warns that ``adapters`` takes a DiReFT (NodireftIntervention) for a NoReFT unless it is added as one first.

    Raises:
        FileExistsError: ``folder`` holds anything but an adapter.
        ValueError: naming the intervention that AdapterHub has no counterpart of: one of another class, or with a c,
            not at block_output, without prefix or suffix, or unlike the others.
    """
    layers: dict[int, list[tuple[tuple[int, int], Intervention]]] = {}
    for entry in description["representations"]:
        module = interventions[entry["same_as"] or entry["key"]]
        span = _check_unit(entry, module)
        assert isinstance(module, Intervention)
        layers.setdefault(entry["layer"], []).append((span, module))
    spans = {tuple(span for span, _ in units) for units in layers.values()}
    first = next(iter(layers.values()))[0][1]
    prefix, suffix, tied = _check_spans(spans)
    settings = [
        {**module.settings(), "orthogonality": None, "class": type(module).__name__}
        for units in layers.values()
        for _, module in units
    ]
    for other in settings:
        odd = [name for name in settings[0] if other.get(name) != settings[0][name]]
        if odd:
            raise ValueError(
                f"AdapterHub has one {odd[0]} for all interventions, got {settings[0][odd[0]]!r} and {other[odd[0]]!r}"
            )
    common, (path, blocks) = settings[0], block_list(inner_model(model))
    base = description["base_model"]
    document = {
        "config": {
            "architecture": "reft",
            "dropout": common["dropout"],
            "dtype": None if common["dtype"] == "float32" else common["dtype"],
            "layers": "all" if sorted(layers) == list(range(len(blocks))) else sorted(layers),
            "non_linearity": None if common["act_fn"] == "linear" else common["act_fn"],
            "orthogonality": first.orthonormal,
            "output_reft": True,
            "prefix_positions": prefix,
            "r": common["low_rank_dimension"],
            "subtract_projection": first.subtract,
            "suffix_positions": suffix,
            "tied_weights": tied,
        },
        "hidden_size": base["hidden_size"],
        "model_class": base["class"],
        "model_name": base["name_or_path"],
        "model_type": base["model_type"],
        "name": _NAME,
        "version": "reft_kernels",
    }
    tensors = {
        f"{path}.{layer}.reft_layer.refts.{_NAME}.units.{index}.{name}": value
        for layer, units in sorted(layers.items())
        for index, (_, module) in enumerate(sorted(units, key=lambda unit: -unit[0][0]))
        for name, value in _unit_state(module).items()
    }

    if not first.subtract:
        warnings.warn(
            "load_adapter of adapters takes this DiReFT for a NoReFT: there, add an adapter with DiReftConfig first, "
            f"add_adapter({_NAME!r}, config=DiReftConfig(...)); load_adapter(folder)",
            stacklevel=4,
        )

    def write(fresh: Path) -> None:
        write_pickle(fresh / WEIGHTS_FILE, tensors)
        write_json(fresh / CONFIG_FILE, document)

    replace_folder(folder, write, check or check_replaceable)


def _check_unit(entry: Mapping[str, Any], module: nn.Module) -> tuple[int, int]:
    """(prefix, suffix) of an intervention that AdapterHub has too."""
    key = entry["key"]
    kinds = (LoreftIntervention, NoreftIntervention, NodireftIntervention)
    if type(module) not in kinds:
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{key}: AdapterHub has {names}, but no {type(module).__name__}")
    assert isinstance(module, Intervention)
    if module.has_c and module.add_bias:
        raise ValueError(f"{key}: AdapterHub's NoReFT has no bias c (add_bias)")
    if entry["component"] != "block_output":
        raise ValueError(f"{key}: AdapterHub edits block_output, not {entry['component']}")
    span = None if entry["positions"] is None else parse_positions(entry["positions"])
    if span is None:
        raise ValueError(f"{key}: AdapterHub edits a prefix and a suffix such as 'f7+l7', not {entry['positions']!r}")
    return span


def _check_spans(spans: set[tuple[tuple[int, int], ...]]) -> tuple[int, int, bool]:
    """(prefix, suffix, tied) of layers that all have the same."""
    if len(spans) == 1:
        (units,) = spans
        if len(units) == 1:
            return *units[0], True
        if len(units) == 2 and sorted(0 in unit for unit in units) == [True, True]:
            (prefix, none), (nothing, suffix) = sorted(units, reverse=True)
            if none == nothing == 0 and prefix and suffix:
                return prefix, suffix, False
    raise ValueError(
        "AdapterHub edits every layer at the same prefix and suffix, with one intervention for both or one for each; "
        f"got positions (first, last) {sorted(spans)}"
    )


@torch.no_grad()
def _unit_state(module: Intervention) -> dict[str, Tensor]:
    R, W, b = module.edit_weights()[:3]
    assert W is not None
    assert b is not None
    state = {"learned_source.weight": W, "learned_source.bias": b}
    if module.orthonormal:
        state[_ORIGINAL], state[_BASE] = parametrization_of(R.float())
    else:
        state["projection.weight"] = R
    return state


def check_replaceable(target: Path) -> None:
    """Raises FileExistsError where a folder holds anything but a ReFT adapter of AdapterHub's."""
    own = {CONFIG_FILE, WEIGHTS_FILE, SAFE_WEIGHTS_FILE, *_HEAD_FILES}
    refuse_other_files(target, {path.name for path in target.iterdir()} - own)
    try:
        config = read_json(target / CONFIG_FILE).get("config")
    except (OSError, ValueError):
        config = None
    if not isinstance(config, Mapping) or config.get("architecture") != "reft":
        raise FileExistsError(f"cannot save to {target}: what it holds is no adapter of ReFT")
