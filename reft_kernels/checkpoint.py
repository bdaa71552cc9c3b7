"""Adapters on disk: a JSON file with every setting and a safetensors file with the exact weights."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from reft_kernels.config import Representation
from reft_kernels.interventions import INTERVENTIONS, read_dtype

CONFIG_FILE = "reft_config.json"
ADAPTER_FILE = "adapter.safetensors"
BASE_FILE = "base_trainable.safetensors"
FORMAT = "reft_kernels"
FORMAT_VERSION = 1

_FILES = {CONFIG_FILE, ADAPTER_FILE, BASE_FILE}
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)


def describe_representation(key: str, representation: Representation, intervention: nn.Module) -> dict[str, Any]:
    """One representation as JSON-able values: its place, the class of its intervention and that one's settings."""
    settings: Any = getattr(intervention, "settings", None)
    return {
        "key": key,
        "layer": representation.layer,
        "component": representation.component,
        "low_rank_dimension": representation.low_rank_dimension,
        "positions": representation.positions,
        "intervention": type(intervention).__name__,
        "settings": settings() if callable(settings) else {},
        "same_as": None,
    }


def save_adapter(
    folder: str | os.PathLike[str],
    description: Mapping[str, Any],
    interventions: Mapping[str, nn.Module],
    base_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter folder: all of it or nothing.

    The files are written to a temporary folder beside ``folder``, flushed to the disk and moved into its place. An
    adapter that is there already is replaced as a whole.

    Args:
        folder: new, empty, or an adapter of ours; parents are made and links followed.
        description: of the base model, the config and the representations.
        interventions: by key; representations that share one name it once.
        base_tensors: the base model's own trained parameters, where they are saved too.

    Raises:
        FileExistsError: ``folder`` holds anything else.
        TypeError: the state of an intervention is not all tensors.
    """
    target = Path(os.path.realpath(folder))
    _check_replaceable(target)
    tensors = {}
    for key, intervention in interventions.items():
        for name, value in intervention.state_dict().items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{key}: cannot save {name!r}, a {type(value).__name__}: only tensors are saved")
            tensors[f"{key}.{name}"] = value
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **description}
    text = json.dumps(document, indent=2) + "\n"

    target.parent.mkdir(parents=True, exist_ok=True)
    # Not mkdtemp, which keeps everybody else out: an adapter is as readable as any new folder.
    fresh = target.parent / f".{target.name}.{secrets.token_hex(8)}.saving"
    fresh.mkdir()
    try:
        _write_tensors(fresh / ADAPTER_FILE, tensors)
        if base_tensors is not None:
            _write_tensors(fresh / BASE_FILE, base_tensors)
        (fresh / CONFIG_FILE).write_text(text, encoding="utf-8")
        for path in (*fresh.iterdir(), fresh):
            _flush(path)
        _replace(fresh, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies: safetensors refuses tensors that share memory.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    # Written here, not by save_file, which makes files that nobody else may read.
    path.write_bytes(serialize(copies, metadata={"format": "pt"}))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"cannot save to {target}: it exists and is not a folder")
    names = {path.name for path in target.iterdir()}
    if not names:
        return
    if names - _FILES:
        raise FileExistsError(
            f"cannot save to {target}: it holds files that are not an adapter's "
            f"({', '.join(sorted(names - _FILES)[:5])}); save to a new folder"
        )
    try:
        read_description(target)
    except (ValueError, OSError) as error:
        raise FileExistsError(f"cannot save to {target}: what it holds is no adapter of ours ({error})") from error


def _replace(fresh: Path, target: Path) -> None:
    """Put the fresh folder in the target's place, leaving what was there in the fresh one's.

    One step where the system can swap folders. Elsewhere two renames, undone if the second fails; a process killed
    between them leaves both folders beside the target under names of their own.
    """
    if not target.exists() or not any(target.iterdir()):
        os.replace(fresh, target)
        return
    if _exchange(fresh, target):
        return
    old = fresh.with_name(fresh.name + ".old")
    os.replace(target, old)
    try:
        os.replace(fresh, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, where the system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here = -100  # AT_FDCWD
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), _EXCHANGE) == 0)


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON file of an adapter folder, checked for what every reader needs.

    Raises FileNotFoundError where there is none and ValueError, naming file and key, where it is not as written.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no adapter folder: there is no {CONFIG_FILE}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON (cut off?): {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'{path} was not written by {FORMAT}: it lacks "format": "{FORMAT}"')
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {document.get('format_version')!r}, this version reads {FORMAT_VERSION}"
        )
    _require(path, document, "", {"base_model": dict, "config": dict, "representations": list})
    _require(path, document["config"], "config.", dict.fromkeys(_CONFIG_KEYS, object))
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


_CONFIG_KEYS = (
    "method", "layers", "rank", "positions", "tied", "component", "dropout", "act_fn", "add_bias", "dtype",
)  # fmt: skip


def _require(path: Path, part: Mapping[str, Any], prefix: str, fields: Mapping[str, type]) -> None:
    for name, kind in fields.items():
        if name not in part:
            raise ValueError(f"{path}: the key {prefix}{name} is missing")
        if not isinstance(part[name], kind):
            raise ValueError(f"{path}: {prefix}{name} must be a {kind.__name__}, got {type(part[name]).__name__}")


def build_interventions(
    folder: str | os.PathLike[str],
    document: Mapping[str, Any],
    classes: Mapping[str, type[nn.Module]] | None = None,
) -> list[nn.Module]:
    """The interventions of a description, with the weights of the folder, on the CPU.

    Classes are looked up by name among the library's and those of ``classes``, never imported by a string of the file.

    Raises ValueError naming file and key for an unknown class, a truncated file, a missing or left-over key, a
    wrong shape or dtype.
    """
    config_path, path = Path(folder) / CONFIG_FILE, Path(folder) / ADAPTER_FILE
    known: dict[str, type[nn.Module]] = {**INTERVENTIONS, **(classes or {})}
    tensors = read_tensors(path)
    built: dict[str, nn.Module] = {}
    found = []
    for index, entry in enumerate(document["representations"]):
        key, shared = entry["key"], entry["same_as"]
        if shared is not None:
            if shared not in built:
                raise ValueError(
                    f"{config_path}: representations[{index}].same_as names {shared!r}, which is not above it"
                )
            found.append(built[shared])
            continue
        name = entry["intervention"]
        if name not in known:
            raise ValueError(
                f"{config_path}: {key} is a {name}, which is none of {sorted(known)}; pass the class of an own "
                f"intervention as classes={{{name!r}: ...}}"
            )
        try:
            intervention = known[name](**_with_dtype(entry["settings"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_path}: cannot make the {name} of {key} from its settings: {error}") from error
        prefix = f"{key}."
        state = {full[len(prefix) :]: tensors.pop(full) for full in list(tensors) if full.startswith(prefix)}
        _load_state(path, key, intervention, state)
        built[key] = intervention
        found.append(intervention)
    if tensors:
        raise ValueError(f"{path}: the key {min(tensors)} belongs to no representation of {CONFIG_FILE}")
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises FileNotFoundError where it is missing and ValueError where it is cut off or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def load_base_tensors(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Put the base model's own saved parameters into it. Raises ValueError naming the first that does not fit."""
    path = Path(folder) / BASE_FILE
    parameters = dict(model.named_parameters())
    tensors = read_tensors(path)
    for name, value in tensors.items():
        if name not in parameters:
            raise ValueError(f"{path}: {type(model).__name__} has no parameter {name}")
        if parameters[name].shape != value.shape:
            raise ValueError(f"{path}: {name} must be {list(parameters[name].shape)}, got {list(value.shape)}")
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)
