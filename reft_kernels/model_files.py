"""A ReftModel on disk: which format a folder has, and what the model gives to each and takes from it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from reft_kernels import checkpoint
from reft_kernels.compat import adapterhub, pyreft_files
from reft_kernels.config import ReftConfig, Representation
from reft_kernels.interventions import Intervention
from reft_kernels.modules import hidden_size, inner_model, text_config
from reft_kernels.tensor_files import read_pickle, read_safetensors

if TYPE_CHECKING:
    from reft_kernels.saved_model import SavedModel

FORMATS = ("reft_kernels", "pyreft", "adapterhub")

# Of an intervention's settings those that its output in eval mode depends on.
_EDIT = ("embed_dim", "low_rank_dimension", "act_fn", "add_bias")


class ReadOptions(NamedTuple):
    """What the caller knows of an adapter that its folder may not say; see ``ReftModel.load``."""

    classes: Mapping[str, type[nn.Module]] | None = None
    act_fn: str | None = None
    method: str | None = None
    orthogonality: str | None = None
    positions: str | None = None


def find_format(folder: Path) -> str:
    """One of :data:`FORMATS`, or "pyreft weights" for a folder of pyreft's without its config.json.

    Raises FileNotFoundError where the folder has no adapter.
    """
    if (folder / checkpoint.CONFIG_FILE).is_file():
        return "reft_kernels"
    weights = pyreft_files.weights_folder(folder)
    if pyreft_files.is_adapter(folder) or (weights == folder and (folder / pyreft_files.CONFIG_FILE).is_file()):
        return "pyreft"
    if weights is not None:
        return "pyreft weights"
    if (folder / adapterhub.CONFIG_FILE).is_file():
        return "adapterhub"
    raise FileNotFoundError(
        f"{folder} is no adapter folder: there is no {checkpoint.CONFIG_FILE}, no {pyreft_files.CONFIG_FILE} of "
        f"pyreft's and no {adapterhub.CONFIG_FILE} of AdapterHub's"
    )


def save(reft_model: SavedModel, folder: Path, include_model: bool, file_format: str) -> None:
    """The body of ``ReftModel.save``."""
    if file_format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    entries: list[dict[str, Any]] = []
    modules: dict[str, nn.Module] = {}
    first: dict[int, str] = {}
    for key, item in zip(reft_model.keys, reft_model.representations, strict=True):
        module = reft_model.interventions[key]
        entry = checkpoint.describe_representation(key, item, module)
        if id(module) in first:
            entry["same_as"] = first[id(module)]
        else:
            first[id(module)], modules[key] = key, module
        entries.append(entry)
    description = {
        "base_model": _describe_base(reft_model.model),
        "config": reft_model.config.to_dict(),
        "representations": entries,
    }
    base_tensors = _trainable(reft_model.model) if include_model else None
    if file_format == "adapterhub":
        if base_tensors is not None:
            raise ValueError("include_model: AdapterHub's format has no place for the base model's parameters")
        adapterhub.save_adapter(folder, description, modules, reft_model.model, _check_replaceable)
    else:
        write = checkpoint.save_adapter if file_format == "reft_kernels" else pyreft_files.save_adapter
        write(folder, description, modules, base_tensors, _check_replaceable)


def save_weights(reft_model: SavedModel, folder: Path, include_model: bool) -> None:
    """The body of ``ReftModel.save_intervention``."""
    base_tensors = _trainable(reft_model.model) if include_model else None
    pyreft_files.save_weights(folder, dict(reft_model.interventions.items()), base_tensors)


def _check_replaceable(target: Path) -> None:
    """Raises FileExistsError where a folder holds anything but an adapter, of any format."""
    try:
        found = find_format(target)
    except FileNotFoundError:
        found = "reft_kernels"
    checks = {"reft_kernels": checkpoint.check_replaceable, "adapterhub": adapterhub.check_replaceable}
    checks.get(found, pyreft_files.check_replaceable)(target)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _describe_base(model: nn.Module) -> dict[str, Any]:
    config = text_config(model)
    return {
        "name_or_path": getattr(config, "_name_or_path", None) or None,
        "class": type(inner_model(model)).__name__,
        "model_type": getattr(config, "model_type", None),
        "hidden_size": hidden_size(model),
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
    }


def read_adapter(folder: Path, model: nn.Module, options: ReadOptions) -> checkpoint.SavedAdapter:
    """The adapter of a folder in any format. Raises FileNotFoundError or ValueError naming file and key."""
    found = find_format(folder)
    if found == "pyreft weights":
        raise FileNotFoundError(
            f"{folder} has pyreft's weights without its {pyreft_files.CONFIG_FILE}, so what they edit is not known: "
            "make the model with get_reft_model and use its load_intervention"
        )
    unused = {
        "reft_kernels": ("act_fn", "method", "orthogonality", "positions"),
        "pyreft": ("method",),
        "adapterhub": ("act_fn", "positions"),
    }[found]
    for name in unused:
        if getattr(options, name) is not None:
            raise ValueError(f"{name}: {folder} says it itself, got {getattr(options, name)!r}")
    if found == "reft_kernels":
        return checkpoint.read_adapter(folder, options.classes)
    if found == "pyreft":
        return pyreft_files.read_adapter(
            folder, options.classes, options.act_fn, options.orthogonality, options.positions
        )
    return adapterhub.read_adapter(folder, model, options.method, options.orthogonality)


def check_base(folder: Path, saved: checkpoint.SavedAdapter, model: nn.Module) -> None:
    """Raises ValueError where an adapter was made for a model of another width; warns of another architecture."""
    base, size = saved.document["base_model"], hidden_size(model)
    if None not in (size, base.get("hidden_size")) and base["hidden_size"] != size:
        raise ValueError(
            f"the adapter in {folder} was made for a base model of hidden size {base['hidden_size']} "
            f"({base.get('name_or_path') or base.get('class')}), {type(model).__name__} has {size}"
        )
    kind = getattr(text_config(model), "model_type", None)
    if None not in (kind, base.get("model_type")) and base["model_type"] != kind:
        warnings.warn(
            f"the adapter in {folder} was made for a {base['model_type']} model, this one is a {kind}", stacklevel=3
        )


def config_of(saved: checkpoint.SavedAdapter) -> ReftConfig:
    """The config of a saved adapter, with its interventions."""
    representations = [
        Representation(
            layer=entry["layer"],
            component=entry["component"],
            low_rank_dimension=entry["low_rank_dimension"],
            intervention=module,
            positions=entry["positions"],
        )
        for entry, module in zip(saved.document["representations"], saved.interventions, strict=True)
    ]
    return ReftConfig.restore(saved.document["config"], representations)


def read_base_tensors(folder: Path, model: nn.Module, optional: bool = False) -> dict[str, Tensor]:
    """The base model's own saved parameters, which fit it; none where the file is missing and that is ``optional``.

    Raises FileNotFoundError where the file is missing and ValueError naming the first parameter that does not fit.
    """
    ours = find_format(folder) in ("reft_kernels", "adapterhub")
    place = folder if ours else pyreft_files.weights_folder(folder) or folder
    path = place / (checkpoint.BASE_FILE if ours else pyreft_files.BASE_FILE)
    if optional and not path.is_file():
        return {}
    return checkpoint.check_base_tensors(path, (read_safetensors if ours else read_pickle)(path), model)


def load_adapter(reft_model: SavedModel, folder: Path, include_model: bool = False) -> None:
    """The body of ``ReftModel.load_adapter`` and of ``load_intervention``."""
    states = _read_states(reft_model, folder)
    base_tensors = {}
    if include_model:
        base_tensors = read_base_tensors(folder, reft_model.model, optional=not _trainable(reft_model.model))
    for key, state in states.items():
        reft_model.interventions[key].load_state_dict(state)
    checkpoint.put_base_tensors(base_tensors, reft_model.model)


def _read_states(reft_model: SavedModel, folder: Path) -> dict[str, dict[str, Any]]:
    """The states of a saved adapter's interventions that this model's own can load, by key."""
    modules = reft_model.interventions
    found = find_format(folder)
    if found.startswith("pyreft"):
        return _read_pyreft_states(reft_model, folder)
    options = ReadOptions(classes=_classes(modules))
    if found == "adapterhub":
        options = ReadOptions(method=adapterhub.method_of(next(iter(modules.values()))))
    saved = read_adapter(folder, reft_model.model, options)
    entries = saved.document["representations"]
    _check_same_places(reft_model, folder, entries)
    states = {}
    for key, loaded in zip(reft_model.keys, saved.interventions, strict=True):
        place, mine = f"the adapter in {folder}: {key}", modules[key]
        if isinstance(loaded, Intervention) and isinstance(mine, Intervention):
            _check_same_edit(place, mine, loaded.settings(), (*_EDIT, "orthogonal_to"))
            _match_orthogonality(place, loaded, mine)
        states[key] = loaded.state_dict()
    return states


def _read_pyreft_states(reft_model: SavedModel, folder: Path) -> dict[str, dict[str, Any]]:
    """As ``_read_states``, of a folder that may not say more than places and classes, or not even those."""
    modules = reft_model.interventions
    if find_format(folder) == "pyreft":
        entries = pyreft_files.read_entries(folder, _classes(modules))
        _check_same_places(reft_model, folder, entries)
        for entry in pyreft_files.read_sidecar(folder, entries)["representations"]:
            place, mine = f"the adapter in {folder}: {entry['key']}", modules[entry["key"]]
            _check_same_edit(place, mine, entry["settings"], _EDIT)
    places = [
        {"key": key, "layer": item.layer, "component": item.component}
        for key, item in zip(reft_model.keys, reft_model.representations, strict=True)
    ]
    states = {}
    for key, (path, state) in pyreft_files.read_states(pyreft_files.weights_folder(folder) or folder, places).items():
        trial = copy.deepcopy(modules[key])
        pyreft_files.load_state(path, trial, state)
        states[key] = trial.state_dict()
    return states


def _classes(modules: nn.ModuleDict) -> dict[str, type[nn.Module]]:
    return {type(module).__name__: type(module) for module in modules.values()}


def _check_same_places(reft_model: SavedModel, folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    keys = [entry["key"] for entry in entries]
    if keys != reft_model.keys:
        odd = sorted(set(keys) ^ set(reft_model.keys)) or keys
        raise ValueError(f"the adapter in {folder} is another one: {odd[0]} is not in both, or not in order")
    for entry in entries:
        key, kind = entry["key"], entry["intervention"]
        mine = type(reft_model.interventions[key]).__name__
        if mine != kind:
            raise ValueError(f"the adapter in {folder} has a {kind} at {key}, this model a {mine}")


def _check_same_edit(place: str, mine: nn.Module, theirs: Mapping[str, Any], names: Iterable[str]) -> None:
    """Dropout and dtype are how an adapter is trained; the other settings are what it is."""
    ours = mine.settings() if isinstance(mine, Intervention) else {}
    for name in names if ours else ():
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"{place} has {name}={theirs.get(name)!r}, this model has {ours.get(name)!r}")


def _match_orthogonality(place: str, loaded: Intervention, mine: Intervention) -> None:
    """Brings a loaded R into the parametrisation of the model's own."""
    if not loaded.orthonormal:
        return
    wanted = mine.rotate_layer.rows.orthogonality
    if loaded.rotate_layer.rows.orthogonality != wanted:
        try:
            loaded.rotate_layer.set_orthogonality(wanted)
        except ValueError as error:
            raise ValueError(f"{place} cannot be made {wanted}: {error}") from error
