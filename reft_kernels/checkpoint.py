"""Adapters on disk: a JSON file with every setting and a safetensors file with the exact weights."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels.config import Representation
from reft_kernels.folders import replace_folder
from reft_kernels.interventions import INTERVENTIONS, Intervention, read_dtype
from reft_kernels.tensor_files import read_json, read_safetensors, write_json, write_safetensors

CONFIG_FILE = "reft_config.json"
ADAPTER_FILE = "adapter.safetensors"
BASE_FILE = "base_trainable.safetensors"
FORMAT = "reft_kernels"
FORMAT_VERSION = 1

_FILES = {CONFIG_FILE, ADAPTER_FILE, BASE_FILE}


class SavedAdapter(NamedTuple):
    """An adapter as a folder holds it, whoever wrote the folder.

    Attributes:
        document: what :func:`read_description` returns: ``base_model``, ``config`` and ``representations``.
        interventions: one for each representation, on the CPU.
    """

    document: Mapping[str, Any]
    interventions: list[nn.Module]


def describe_representation(key: str, representation: Representation, intervention: nn.Module) -> dict[str, Any]:
    """One representation as JSON-able values: its place, the class of its intervention and that one's settings.

    Warns of arguments of an own class that its ``settings`` do not name, and of an f that was put in place of f.
    """
    get_settings: Any = getattr(intervention, "settings", None)
    settings = get_settings() if callable(get_settings) else {}
    for lost in _lost(intervention, settings):
        warnings.warn(f"{key}: {lost}", stacklevel=5)
    return {
        "key": key,
        "layer": representation.layer,
        "component": representation.component,
        "low_rank_dimension": representation.low_rank_dimension,
        "positions": representation.positions,
        "intervention": type(intervention).__name__,
        "settings": settings,
        "same_as": None,
    }


def _lost(intervention: nn.Module, settings: Mapping[str, Any]) -> list[str]:
    """What a loaded intervention would lack."""
    name = type(intervention).__name__
    found = []
    if isinstance(intervention, Intervention) and intervention.act_fn is not intervention._activation.function:
        found.append(f"the act_fn of this {name} was replaced, and is not saved")
    if INTERVENTIONS.get(name) is None:
        parameters = inspect.signature(type(intervention).__init__).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = [one.name for one in parameters if one.kind in kinds and one.name != "self"]
        unsaved = [one for one in names if one not in settings]
        if unsaved:
            found.append(f"{', '.join(unsaved)} of {name} is not saved: return it from its settings() too")
    return found


def save_adapter(
    folder: str | os.PathLike[str],
    description: Mapping[str, Any],
    interventions: Mapping[str, nn.Module],
    base_tensors: Mapping[str, Tensor] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter folder: all of it or nothing, see :func:`reft_kernels.folders.replace_folder`.

    Args:
        folder: new, empty, or an adapter of ours; parents are made and links followed.
        description: of the base model, the config and the representations.
        interventions: by key; representations that share one name it once.
        base_tensors: the base model's own trained parameters, where they are saved too.
        check: raises where the files of a folder must not be replaced; by default where they are no adapter of ours.

    Raises:
        FileExistsError: ``folder`` holds anything else.
        TypeError: the state of an intervention is not all tensors.
    """
    tensors = {}
    for key, intervention in interventions.items():
        for name, value in tensors_of(key, intervention).items():
            tensors[f"{key}.{name}"] = value

    def write(fresh: Path) -> None:
        write_safetensors(fresh / ADAPTER_FILE, tensors)
        if base_tensors is not None:
            write_safetensors(fresh / BASE_FILE, base_tensors)
        write_json(fresh / CONFIG_FILE, stamped(description))

    replace_folder(folder, write, check or check_replaceable)


def stamped(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description with the name and version of this format."""
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **description}


def tensors_of(key: str, intervention: nn.Module) -> dict[str, Tensor]:
    """The state of an intervention. Raises TypeError where it is not all tensors."""
    state = dict(intervention.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key}: cannot save {name!r}, a {type(value).__name__}: only tensors are saved")
    return state


def check_replaceable(target: Path) -> None:
    """Raises FileExistsError where a folder holds anything but an adapter of ours."""
    refuse_other_files(target, {path.name for path in target.iterdir()} - _FILES)
    try:
        read_description(target)
    except (ValueError, OSError) as error:
        raise FileExistsError(f"cannot save to {target}: what it holds is no adapter of ours ({error})") from error


def refuse_other_files(target: Path, others: set[str]) -> None:
    """Raises FileExistsError naming the files of a folder that are not an adapter's, where there are any."""
    if others:
        raise FileExistsError(
            f"cannot save to {target}: it holds files that are not an adapter's "
            f"({', '.join(sorted(others)[:5])}); save to a new folder"
        )


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON file of an adapter folder, checked for what every reader needs.

    Raises FileNotFoundError where there is none and ValueError, naming file and key, where it is not as written.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no adapter folder: there is no {CONFIG_FILE}")
    return read_document(path)


def read_document(path: Path) -> dict[str, Any]:
    """The JSON file that ``stamped`` made. Raises ValueError, naming file and key, where it is not as written."""
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise ValueError(f'{path} was not written by {FORMAT}: it lacks "format": "{FORMAT}"')
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {document.get('format_version')!r}, this version reads {FORMAT_VERSION}"
        )
    _require(path, document, "", {"base_model": dict, "config": dict, "representations": list})
    _require(path, document["config"], "config.", dict.fromkeys(LISTED_CONFIG, object))
    for index, entry in enumerate(document["representations"]):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: representations[{index}] must be an object, got {type(entry).__name__}")
        fields = {
            "key": str,
            "layer": object,
            "component": str,
            "low_rank_dimension": object,
            "positions": object,
        }
        _require(
            path,
            entry,
            f"representations[{index}].",
            {**fields, "intervention": str, "settings": dict, "same_as": object},
        )
    return document


LISTED_CONFIG: Mapping[str, Any] = {
    "method": None, "layers": None, "rank": None, "positions": None, "tied": True, "component": "block_output",
    "dropout": 0.0, "act_fn": None, "add_bias": False, "dtype": None,
}  # fmt: skip
"""``config`` of an adapter whose representations and interventions say everything."""


def _require(path: Path, part: Mapping[str, Any], prefix: str, fields: Mapping[str, type]) -> None:
    for name, kind in fields.items():
        if name not in part:
            raise ValueError(f"{path}: the key {prefix}{name} is missing")
        if not isinstance(part[name], kind):
            raise ValueError(f"{path}: {prefix}{name} must be a {kind.__name__}, got {type(part[name]).__name__}")


def read_adapter(folder: str | os.PathLike[str], classes: Mapping[str, type[nn.Module]] | None = None) -> SavedAdapter:
    """The adapter of a folder that :func:`save_adapter` wrote.

    Args:
        folder: the folder.
        classes: own intervention classes, see :func:`build_interventions`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: naming file and key, for an unknown class, a truncated file, a missing or left-over key, a wrong
            shape or dtype.
    """
    document = read_description(folder)
    path = Path(folder) / ADAPTER_FILE
    tensors = read_safetensors(path)

    def fill(key: str, intervention: nn.Module) -> None:
        prefix = f"{key}."
        state = {full[len(prefix) :]: tensors.pop(full) for full in list(tensors) if full.startswith(prefix)}
        _load_state(path, key, intervention, state)

    found = build_interventions(Path(folder) / CONFIG_FILE, document["representations"], fill, classes)
    if tensors:
        raise ValueError(f"{path}: the key {min(tensors)} belongs to no representation of {CONFIG_FILE}")
    return SavedAdapter(document, found)


def build_interventions(
    place: Path,
    representations: Sequence[Mapping[str, Any]],
    fill: Callable[[str, nn.Module], None],
    classes: Mapping[str, type[nn.Module]] | None = None,
) -> list[nn.Module]:
    """The interventions of a description, on the CPU.

    Classes are looked up by name among the library's and those of ``classes``, never imported by a string of the file.

    Args:
        place: the file of the description, for messages.
        representations: its entries.
        fill: puts the weights into the intervention of a key.
        classes: own intervention classes, by name.

    Raises ValueError naming the file and the key for an unknown class or settings that it does not take.
    """
    known: dict[str, type[nn.Module]] = {**INTERVENTIONS, **(classes or {})}
    built: dict[str, nn.Module] = {}
    found = []
    for index, entry in enumerate(representations):
        key, shared = entry["key"], entry["same_as"]
        if shared is not None:
            if shared not in built:
                raise ValueError(f"{place}: representations[{index}].same_as names {shared!r}, which is not above it")
            found.append(built[shared])
            continue
        name = entry["intervention"]
        if name not in known:
            raise ValueError(
                f"{place}: {key} is a {name}, which is none of {sorted(known)}; pass the class of an own "
                f"intervention as classes={{{name!r}: ...}}"
            )
        try:
            intervention = known[name](**_with_dtype(entry["settings"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: cannot make the {name} of {key} from its settings: {error}") from error
        fill(key, intervention)
        built[key] = intervention
        found.append(intervention)
    return found


def _with_dtype(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: read_dtype(value) if name == "dtype" else value for name, value in settings.items()}


def _load_state(path: Path, key: str, intervention: nn.Module, state: dict[str, Tensor]) -> None:
    expected = {name: value for name, value in intervention.state_dict().items() if isinstance(value, Tensor)}
    for name, own in expected.items():
        if name not in state:
            raise ValueError(f"{path}: the key {key}.{name} is missing")
        value = state[name]
        # A model may be cast before it is saved; what is loaded is what was saved.
        same_kind = value.dtype == own.dtype or (value.is_floating_point() and own.is_floating_point())
        if value.shape != own.shape or not same_kind:
            raise ValueError(
                f"{path}: {key}.{name} must be {own.dtype} {list(own.shape)}, got {value.dtype} {list(value.shape)}"
            )
    for name in state:
        if name not in expected:
            raise ValueError(f"{path}: the key {key}.{name} is not one of {type(intervention).__name__}")
    intervention.load_state_dict(state, assign=True)


def check_base_tensors(path: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The base model's own saved parameters. Raises ValueError naming the first that does not fit the model."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name not in parameters:
            raise ValueError(f"{path}: {type(model).__name__} has no parameter {name}")
        if parameters[name].shape != value.shape:
            raise ValueError(f"{path}: {name} must be {list(parameters[name].shape)}, got {list(value.shape)}")
    return dict(tensors)


@torch.no_grad()
def put_base_tensors(tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Copies parameters that fit into the base model."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameters[name].copy_(value)


def load_base_tensors(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Put the base model's own saved parameters into it. Raises ValueError naming the first that does not fit."""
    path = Path(folder) / BASE_FILE
    put_base_tensors(check_base_tensors(path, read_safetensors(path), model), model)
