"""pyreft's files: what it loses is kept beside them, and what it cannot read is read."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.checkpoint import LISTED_CONFIG, check_base_tensors, put_base_tensors, refuse_other_files, stamped
from reft_kernels.compat import pyreft_files
from reft_kernels.compat.patched_interventions import activation_name, has_own_parts, rows
from reft_kernels.compat.replacement import Replacement
from reft_kernels.folders import replace_folder
from reft_kernels.hub import local_folder
from reft_kernels.interventions import INTERVENTIONS, Intervention, read_dtype
from reft_kernels.pyreft_layout import Operands, read_operands, write_state
from reft_kernels.rotate_layer import RotateLayer
from reft_kernels.tensor_files import read_pickle, write_json


def replacements(pyreft: Any, pyvene: Any) -> Iterator[Replacement]:
    """State dicts, folders, and the trainer's checkpoints."""
    for name, ours in INTERVENTIONS.items():
        cls = getattr(pyreft, name)
        write, read = _state_dict(cls.state_dict, ours), _load_state_dict(cls.load_state_dict, ours)
        yield Replacement(cls, "state_dict", write, "pyreft's keys alone, nn.Module's inside of a model")
        yield Replacement(cls, "load_state_dict", read, "R stays orthonormal when training goes on")
    model, reft_model, trainer = pyvene.IntervenableModel, pyreft.ReftModel, pyreft.ReftTrainer
    yield Replacement(
        model, "load_intervention", _load_intervention, "any device; no code from files; names of older pyvene"
    )
    yield Replacement(model, "save", _save(model.save), f"{pyreft_files.SIDECAR_FILE} beside: dropout, act_fn, dtype")
    yield Replacement(
        reft_model,
        "load",
        staticmethod(_load(pyreft, reft_model.load)),
        "NoReFT, NodiReFT, module paths, act_fn, dropout, dtype; no code from files; names of older pyvene",
    )
    yield Replacement(
        trainer, "save_model", _save_model, "a checkpoint replaces an older one, and ReftModel.load reads it"
    )
    yield Replacement(trainer, "_load_from_checkpoint", _load_from_checkpoint, "resuming", new=True)


# One intervention


def operands(intervention: Any, ours: type[Intervention]) -> Operands:
    """R, W, b and c of one of pyreft's interventions."""
    R = rows(intervention) if ours.orthonormal else intervention.proj_layer.weight
    source = intervention.learned_source
    c = None if ours.orthonormal else intervention.proj_layer.bias
    W, b = (source.weight, source.bias) if ours.has_W else (None, source)
    return Operands(R, W, b, c)


def _state_dict(stock: Callable[..., Any], ours: type[Intervention]) -> Callable[..., dict[str, Any]]:
    def state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if args or kwargs.get("destination") is not None or kwargs.get("prefix"):
            return nn.Module.state_dict(self, *args, **kwargs)
        if not has_own_parts(self, ours):
            return dict(stock(self, **kwargs))
        found = operands(self, ours)
        bias = not ours.orthonormal and found.c is not None
        return write_state(found, orthonormal=ours.orthonormal, subtract=ours.subtract, add_bias=bias)

    return state_dict


def _load_state_dict(stock: Callable[..., Any], ours: type[Intervention]) -> Callable[..., Any]:
    @torch.no_grad()
    def load_state_dict(self: Any, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        as_written = isinstance(getattr(self, "rotate_layer", None), RotateLayer)
        if as_written and any(name.startswith("rotate_layer.rows.") for name in state_dict):
            return nn.Module.load_state_dict(self, state_dict, *args, **kwargs)
        if not has_own_parts(self, ours):
            return stock(self, state_dict, *args, **kwargs)
        R, W, b, c = read_operands(state_dict)
        mine = operands(self, ours)
        found = {"R": (R, mine.R), "W": (W, mine.W), "b": (b, mine.b), "c": (c, mine.c)}
        for name, (loaded, own) in found.items():
            shapes = [None if t is None else list(t.shape) for t in (loaded, own)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{type(self).__name__}: {name} must be {shapes[1]}, the state dict has {shapes[0]}")
        if R is not None and ours.orthonormal:
            if not isinstance(self.rotate_layer, RotateLayer):
                layer = RotateLayer(R.shape[1], R.shape[0]).to(mine.b.device if mine.b is not None else None)
                self.rotate_layer = layer
            self.rotate_layer.load_state_dict(self.rotate_layer.state_of(R))
            found.pop("R")
        for loaded, own in found.values():
            if loaded is not None and own is not None:
                own.copy_(loaded)
        return None

    return load_state_dict


# Folders


def _load_intervention(self: Any, load_directory: str | os.PathLike[str], include_model: bool = True) -> None:
    folder = Path(load_directory)
    trained = {key: module for key, module in self.interventions.items() if getattr(module, "trainable", False)}
    files = {key: pyreft_files.find_weights(folder, _entry(self, key)) for key in trained}
    states = {key: read_pickle(path) for key, path in files.items()}
    base_is_trained = any(parameter.requires_grad for parameter in self.model.parameters())
    base = _read_base(folder, self.model, optional=not base_is_trained) if include_model else {}
    for key, module in trained.items():
        module.load_state_dict(states[key])
    put_base_tensors(base, self.model)


def _read_base(folder: Path, model: nn.Module, optional: bool = False) -> dict[str, Tensor]:
    """The base model's trained parameters; none where there is no file of them and that is ``optional``.

    Raises FileNotFoundError where the file is missing and ValueError naming the first parameter that does not fit.
    """
    path = folder / pyreft_files.BASE_FILE
    if optional and not path.is_file():
        return {}
    return check_base_tensors(path, read_pickle(path), model)


def _entry(self: Any, key: str) -> dict[str, Any]:
    """One representation as :func:`reft_kernels.checkpoint.describe_representation` has it."""
    item, module = self.representations[key], self.interventions[key]
    component = item.component
    return {
        "key": key,
        "layer": None if "." in component else item.layer,
        "component": component,
        "low_rank_dimension": item.low_rank_dimension,
        "positions": None,
        "intervention": type(module).__name__,
        "settings": _settings(module),
        "same_as": None,
    }


def _settings(module: Any) -> dict[str, Any]:
    ours = INTERVENTIONS.get(type(module).__name__)
    if ours is None or not has_own_parts(module, ours):
        return {}
    found = operands(module, ours)
    assert found.R is not None
    r, d = found.R.shape
    matrix = found.W if found.W is not None else found.R
    return {
        "embed_dim": d,
        "low_rank_dimension": r,
        "dtype": str(matrix.dtype).removeprefix("torch."),
        "dropout": module.dropout.p if ours.takes_dropout else 0.0,
        "act_fn": activation_name(module),
        "add_bias": found.c is not None,
    }


def _save(stock: Callable[..., Any]) -> Callable[..., Any]:
    """pyvene's, with a sidecar beside, on the hub too. One that described what was in the folder before is removed."""

    @functools.wraps(stock)
    def save(
        self: Any,
        save_directory: str | os.PathLike[str],
        save_to_hf_hub: bool = False,
        hf_repo_name: str = "my-awesome-model",
        include_model: bool = False,
    ) -> Any:
        path = Path(save_directory) / pyreft_files.SIDECAR_FILE
        path.unlink(missing_ok=True)
        result = stock(self, save_directory, save_to_hf_hub, hf_repo_name, include_model)
        entries = [_entry(self, key) for key in self.sorted_keys]
        # A sidecar describes all interventions; an own class, or an f of no name, it cannot.
        if all(entry["settings"].get("act_fn") for entry in entries):
            document = {"base_model": {}, "config": LISTED_CONFIG, "representations": entries}
            write_json(path, stamped(document))
            if save_to_hf_hub:
                _upload(path, hf_repo_name)
        return result

    return save


def _upload(path: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    HfApi().upload_file(path_or_fileobj=str(path), path_in_repo=path.name, repo_id=repository, repo_type="model")


def _load(pyreft: Any, stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def load(
        load_directory: str | os.PathLike[str],
        model: nn.Module,
        local_directory: str | None = None,
        from_huggingface_hub: bool = False,
        include_model: bool = False,
    ) -> Any:
        folder = local_folder(load_directory, local_directory, from_huggingface_hub)
        entries = pyreft_files.read_entries(folder, {})
        if any(entry["intervention"] not in INTERVENTIONS for entry in entries):
            return stock(str(folder), model, include_model=include_model)
        saved = pyreft_files.read_adapter(folder)
        listed = []
        for entry, ours in zip(saved.document["representations"], saved.interventions, strict=True):
            module = getattr(pyreft, entry["intervention"])(**_keywords(ours))
            module.load_state_dict(pyreft_files.state_of(entry["key"], ours))
            place = {"layer": entry["layer"] or 0, "component": entry["component"]}
            listed.append({**place, "low_rank_dimension": entry["low_rank_dimension"], "intervention": module})
        base = _read_base(folder, model) if include_model else {}
        reft_model = pyreft.ReftModel(pyreft.ReftConfig(representations=listed), model)
        put_base_tensors(base, model)
        return reft_model

    return load


def _keywords(ours: Any) -> dict[str, Any]:
    """Keywords for the constructor of pyreft's class, from our intervention."""
    names = ("embed_dim", "low_rank_dimension", "dropout", "act_fn", "add_bias")
    settings = ours.settings()
    return {**{name: settings[name] for name in names}, "dtype": read_dtype(settings["dtype"])}


# The trainer


def _save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
    if not self.is_world_process_zero():
        return
    folder = Path(output_dir or self.args.output_dir) / pyreft_files.TRAINER_FOLDER
    replace_folder(folder, lambda fresh: self.model.save(str(fresh), include_model=True), _check_replaceable)


def _check_replaceable(target: Path) -> None:
    own = (pyreft_files.CONFIG_FILE, pyreft_files.BASE_FILE, pyreft_files.SIDECAR_FILE)
    names = {path.name for path in target.iterdir()}
    refuse_other_files(target, {name for name in names if name not in own and not name.startswith("intkey_")})


def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
    self.model.load_intervention(Path(resume_from_checkpoint) / pyreft_files.TRAINER_FOLDER, include_model=True)
