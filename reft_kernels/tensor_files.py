"""Files of tensors and of settings. They are data: reading one never runs code from it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file."""
    # Written here, not by save_file, which makes files that nobody else may read.
    path.write_bytes(serialize(_copies(tensors), metadata={"format": "pt"}))


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of ``torch.save`` with a dict of tensors on the CPU."""
    torch.save(_copies(tensors), path)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """A JSON file, indented."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Copies: safetensors refuses tensors that share memory, and torch.save writes the whole storage of a view.
    return {name: _whole(t.detach()).to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over processes, each of which calls this."""
    whole: Any = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises ValueError where it is no readable JSON or another kind of value."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON (cut off?): {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises FileNotFoundError where it is missing and ValueError where it is cut off or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The dict of tensors of a file of ``torch.save``, on the CPU, whatever device they were saved from.

    The file is data: a pickle that holds anything but tensors and plain containers is refused, not run.

    Raises FileNotFoundError where it is missing and ValueError where it is cut off or refused, or no such dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is refused: it is not a file of tensors alone ({reason})") from error
    except Exception as error:  # a damaged file fails wherever its damage is
        raise ValueError(f"{path} is truncated or not a file of torch.save: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold a dict of tensors, got {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} must hold a dict of tensors, got a {type(value).__name__} at {name!r}")
    return {name: value.detach() for name, value in found.items()}
