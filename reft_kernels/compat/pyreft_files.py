"""Adapters in the folders of pyreft: every layout that it wrote, and its present one for it to read.

    config.json                 places, classes and ranks (``save`` alone writes it)
    intkey_{key}.bin            the state dict of one intervention
    pytorch_model.bin           the base model's trained parameters
    reft_kernels.json           what pyreft's files do not hold: dtype, dropout, act_fn, add_bias, positions and how
                                rows are kept orthonormal. This library's own; pyreft does not look at it.

Keys are ``layer_3_comp_block_output_unit_pos_nunit_1#0`` and ``comp_model_layers[3]_output_unit_pos_nunit_1#0`` since
pyvene 0.1.7, and had dots instead of the underscores before.

Source: pyvene/models/intervenable_base.py (save, load, save_intervention, load_intervention) and
configuration_intervenable_model.py.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reft_kernels.checkpoint import (
    LISTED_CONFIG,
    SavedAdapter,
    build_interventions,
    read_document,
    refuse_other_files,
    stamped,
    tensors_of,
)
from reft_kernels.folders import replace_files, replace_folder
from reft_kernels.interventions import INTERVENTIONS, Intervention, NodireftIntervention
from reft_kernels.positions import parse_positions
from reft_kernels.pyreft_layout import Operands, read_operands, with_plain_rotation, without_base, write_state
from reft_kernels.representation import PYVENE_FIELDS
from reft_kernels.tensor_files import read_json, read_pickle, write_json, write_pickle

CONFIG_FILE = "config.json"
BASE_FILE = "pytorch_model.bin"
SIDECAR_FILE = "reft_kernels.json"
TRAINER_FOLDER = "intervenable_model"
"""Where pyreft's trainer puts the files, below each of its checkpoints."""

_WEIGHTS = "intkey_*.bin"
_EDIT_PARTS = ("rotate_layer", "proj_layer", "learned_source", "embed_dim", "interchange_dim")
_COMPONENT = re.compile(r"[\w.\[\]]+")  # it becomes part of a file's name

# Names that pyreft's classes had in its first days.
_OLD_NAMES = {
    "ConditionedSourceLowRankRotatedSpaceIntervention": "LoreftIntervention",
    "ConditionedSourceLowRankIntervention": "NoreftIntervention",
}

Entry = dict[str, Any]
"""A representation as :func:`reft_kernels.checkpoint.describe_representation` makes it."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder has a config.json of pyreft (and not of a model, say)."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return False
    return "representations" in config and "intervention_types" in config


def weights_folder(folder: Path) -> Path | None:
    """The folder itself or its ``intervenable_model``, where that has files of interventions."""
    return next((one for one in (folder, folder / TRAINER_FOLDER) if any(one.glob(_WEIGHTS))), None)


def read_adapter(
    folder: Path,
    classes: Mapping[str, type[nn.Module]] | None = None,
    act_fn: str | None = None,
    orthogonality: str | None = None,
    positions: str | None = None,
) -> SavedAdapter:
    """The adapter of a folder that pyreft's ``ReftModel.save`` wrote, or this library's with format="pyreft".

    Args:
        folder: the folder.
        classes: own intervention classes, by the name in the file; they are built from ``embed_dim`` and
            ``low_rank_dimension``. No code is taken from the folder.
        act_fn: f, which pyreft's files do not hold (None: linear).
        orthogonality: how rows shall be kept orthonormal (None: as saved, "householder" where that is not known).
        positions: "f7+l7" and the like, which pyreft's files do not hold either (None: every token). Where the second
            half of the interventions has the places of the first, the first half takes the prefix and the second the
            suffix, as in pyreft.

    Returns:
        Dropout is 0 where the folder does not say.

    Raises:
        FileNotFoundError: an intervention has no file.
        ValueError: naming file and key: a class that is not known, a representation of another kind, weights that do
            not fit, a file that is damaged or holds more than tensors, an ``act_fn`` or ``positions`` that the folder
            contradicts.
    """
    path, known = folder / CONFIG_FILE, {**INTERVENTIONS, **(classes or {})}
    entries = read_entries(folder, classes)
    document = read_sidecar(folder, entries)
    described = bool(document["representations"])
    if described:
        path, entries = folder / SIDECAR_FILE, document["representations"]
        _check_given(path, entries, act_fn, positions)
    elif positions is not None:
        document = {**document, "config": {**LISTED_CONFIG, "tied": _place(entries, positions)}}
    files = {entry["key"]: find_weights(folder, entry) for entry in entries if entry["same_as"] is None}
    states = {key: _read_state(file) for key, file in files.items()}
    for entry in entries:
        key, kind = entry["same_as"] or entry["key"], known.get(entry["intervention"])
        if kind is None or not issubclass(kind, Intervention):
            continue
        if not described:
            entry["settings"] = _settings_of(files[key], kind, states[key], act_fn)
            entry["low_rank_dimension"] = entry["settings"]["low_rank_dimension"]
        if orthogonality is not None and kind.orthonormal:
            entry["settings"] = {**entry["settings"], "orthogonality": orthogonality}

    def fill(key: str, intervention: nn.Module) -> None:
        load_state(files[key], intervention, states[key])

    interventions = build_interventions(path, entries, fill, classes)
    return SavedAdapter({**document, "representations": entries}, interventions)


def read_entries(folder: Path, classes: Mapping[str, type[nn.Module]] | None = None) -> list[Entry]:
    """The representations of a pyreft folder's config.json, without what only the weights can tell.

    Raises ValueError naming the file and the representation that is of no kind that ReFT has.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    listed, kinds = config.get("representations"), config.get("intervention_types")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: representations must be a list of at least one, got {listed!r}")
    kinds = [kinds] * len(listed) if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or len(kinds) != len(listed):
        raise ValueError(f"{path}: intervention_types must be one for each of the {len(listed)} representations")
    widths = config.get("intervention_dimensions")
    if not isinstance(widths, list) or len(widths) != len(listed):
        widths = [None] * len(listed)
    entries: list[Entry] = []
    for index, (item, kind, width) in enumerate(zip(listed, kinds, widths, strict=True)):
        fields = _fields(f"{path}: representations[{index}]", item)
        layer = None if "." in fields["component"] else fields["layer"]
        key = key_of(layer, fields["component"], _count(entries, layer, fields["component"]))
        name = _class_name(path, kind)
        if name not in (classes or {}):
            name = _OLD_NAMES.get(name, name)
        entries.append(
            {
                "key": key,
                "layer": layer,
                "component": fields["component"],
                "low_rank_dimension": fields["low_rank_dimension"],
                "positions": None,
                "intervention": name,
                "settings": {"embed_dim": width, "low_rank_dimension": fields["low_rank_dimension"]},
                "same_as": None,
            }
        )
    return entries


def _fields(place: str, item: Any) -> dict[str, Any]:
    """A representation, listed or by name, with the defaults of what it leaves out."""
    if isinstance(item, list) and len(item) <= len(PYVENE_FIELDS):
        item = dict(zip(PYVENE_FIELDS, item, strict=False))
    if not isinstance(item, Mapping) or set(item) - set(PYVENE_FIELDS):
        raise ValueError(f"{place} must be a list or an object of pyvene's fields, got {item!r}")
    fields = {**dict.fromkeys(PYVENE_FIELDS), "layer": 0, "component": "block_output", **item}
    component, layer = fields["component"], fields["layer"]
    readable = isinstance(component, str) and _COMPONENT.fullmatch(component) is not None
    if not readable or ("." not in component and not isinstance(layer, int)):
        raise ValueError(f"{place}: cannot read its place, {component!r} of layer {layer!r}")
    # A linked intervention of pyvene's edits what the first of its links has edited, wherever it is itself.
    only_known = {"unit": "pos", "max_number_of_units": 1, "subspace_partition": None, "intervention_link_key": None}
    for name, only in only_known.items():
        if fields[name] not in (None, only):
            raise ValueError(f"{place}: {name}={fields[name]!r} is not supported, only {only!r}")
    return fields


def _class_name(path: Path, kind: Any) -> str:
    """ "LoreftIntervention" from "<class 'pyreft.interventions.LoreftIntervention'>"."""
    match = re.fullmatch(r"(?:<class ')?(?:[\w<>]+\.)*(\w+)(?:'>)?", kind) if isinstance(kind, str) else None
    if match is None:
        raise ValueError(f"{path}: intervention_types must name classes, got {kind!r}")
    return match[1]


def _count(entries: Sequence[Entry], layer: int | None, component: str) -> int:
    """How many of the representations above are of the same place."""
    return sum((entry["layer"], entry["component"]) == (layer, component) for entry in entries)


def key_of(layer: int | None, component: str, number: int, dot: str = "_") -> str:
    """pyvene's name of the representation; ``dot`` is "." for versions before 0.1.7."""
    place = ("comp", component) if layer is None else ("layer", str(layer), "comp", component)
    return dot.join((*place, "unit", "pos", "nunit", "1")).replace(".", dot) + f"#{number}"


def find_weights(folder: Path, entry: Mapping[str, Any]) -> Path:
    """The file of a representation's intervention. Raises FileNotFoundError where it is under none of its names."""
    number = int(entry["key"].rpartition("#")[2])
    names = [f"intkey_{key_of(entry['layer'], entry['component'], number, dot)}.bin" for dot in ("_", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder / names[0]} is missing, and so is {names[1]}")


def read_states(folder: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """File and state dict of each entry's intervention, by its key, from a folder that needs no config.json.

    Raises:
        FileNotFoundError: an entry has no file.
        ValueError: the folder has files of other interventions, or one that is damaged.
    """
    files = {entry["key"]: find_weights(folder, entry) for entry in entries}
    others = {path.name for path in folder.glob(_WEIGHTS)} - {path.name for path in files.values()}
    if others and not is_adapter(folder):
        raise ValueError(f"{folder} is of another adapter: {min(others)} belongs to no intervention of this model")
    return {key: (path, _read_state(path)) for key, path in files.items()}


def _read_state(path: Path) -> dict[str, Tensor]:
    """One at a time without its d x d base: those of a model's interventions are gigabytes."""
    state = read_pickle(path)
    try:
        return without_base(state)
    except ValueError as error:
        raise ValueError(f"{path} does not fit together: {error}") from error


def load_state(path: Path, intervention: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts a state dict of pyreft into an intervention. Raises ValueError naming the file where it does not fit.

    Rows that this library's modules wrote are taken as they are where the intervention has the same form of them.
    """
    try:
        rows = {name for name in state if name.startswith("rotate_layer.rows.")}
        same_form = rows <= set(intervention.state_dict())
        intervention.load_state_dict(dict(state) if same_form else with_plain_rotation(state))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} does not fit: {error}") from error


def _settings_of(
    path: Path, kind: type[Intervention], state: Mapping[str, Tensor], act_fn: str | None
) -> dict[str, Any]:
    """The constructor's arguments, from the weights."""
    try:
        R, W, _, c = read_operands(state)
    except ValueError as error:
        raise ValueError(f"{path} does not fit together: {error}") from error
    if R is None:
        raise ValueError(f"{path}: there is no R of a {kind.__name__} among {sorted(state)}")
    r, d = R.shape
    settings: dict[str, Any] = {"embed_dim": d, "low_rank_dimension": r, "add_bias": c is not None}
    if W is not None:
        settings |= {"dtype": str(W.dtype).removeprefix("torch."), "act_fn": act_fn}
    return settings


def read_sidecar(folder: Path, entries: Sequence[Entry]) -> Mapping[str, Any]:
    """What this library wrote beside pyreft's files; without representations where it did not write them.

    Raises ValueError where it belongs to another adapter than config.json, whose representations ``entries`` are.
    """
    path = folder / SIDECAR_FILE
    if not path.is_file():
        return {"base_model": {}, "config": LISTED_CONFIG, "representations": []}
    document = read_document(path)
    for name in ("key", "layer", "component", "intervention"):
        saved = [entry[name] for entry in document["representations"]]
        if saved != [entry[name] for entry in entries]:
            raise ValueError(
                f"{path} is of another adapter than the {CONFIG_FILE} beside it: their {name} differ; delete the one "
                "that is not meant"
            )
    return document


def _check_given(path: Path, entries: Sequence[Entry], act_fn: str | None, positions: str | None) -> None:
    given = {
        "act_fn": (act_fn, {entry["settings"].get("act_fn") for entry in entries}),
        "positions": (positions, {entry["positions"] for entry in entries}),
    }
    for name, (value, saved) in given.items():
        if value is not None and value not in saved:
            raise ValueError(f"{name}: {path} says {', '.join(sorted(map(str, saved)))}, the argument is {value!r}")


def _place(entries: Sequence[Entry], positions: str) -> bool:
    """Gives the entries their positions. Returns whether prefix and suffix are tied."""
    span, half = parse_positions(positions), len(entries) // 2
    places = [(entry["layer"], entry["component"]) for entry in entries]
    if span is None or 0 in span or places[:half] != places[half:]:
        for entry in entries:
            entry["positions"] = positions
        return True
    for index, entry in enumerate(entries):
        entry["positions"] = f"f{span[0]}" if index < half else f"l{span[1]}"
    return False


def save_adapter(
    folder: Path,
    description: Mapping[str, Any],
    interventions: Mapping[str, nn.Module],
    base_tensors: Mapping[str, Tensor] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter that pyreft's ``ReftModel.load`` reads: all of it or nothing.

    W, b, c and R (as float32) are there bit for bit; an R with orthonormal rows takes d^2 floats in all classes but
    LoReFT, as it does in pyreft. Where pyreft makes another edit of the folder all the same, a warning says so.

    Args: those of :func:`reft_kernels.checkpoint.save_adapter`.

    Raises:
        FileExistsError: ``folder`` holds anything but an adapter.
        TypeError: the state of an own intervention is not all tensors.
        ValueError: it has a name that pyreft's state dicts have for something else.
    """
    entries = [_without_fixed_rows(entry) for entry in description["representations"]]
    modules = {entry["key"]: interventions[entry["same_as"] or entry["key"]] for entry in entries}
    lost = sorted({sentence for entry in entries for sentence in _lost(entry, modules[entry["key"]])})
    if lost:
        warnings.warn(f"pyreft's ReftModel.load, unlike this library's, {'; '.join(lost)}", stacklevel=4)
    if entries != list(description["representations"]):
        warnings.warn("pyreft's files do not hold the rows of orthogonal_to: R is saved without them", stacklevel=4)
    config = {
        "intervention_constant_sources": [True] * len(entries),
        "intervention_dimensions": [entry["settings"].get("embed_dim") for entry in entries],
        "intervention_types": [_pyreft_class(type(module)) for module in modules.values()],
        "mode": "parallel",
        "representations": [_listed(entry) for entry in entries],
        "sorted_keys": list(modules),
    }

    def write(fresh: Path) -> None:
        _write_weights(fresh, modules, base_tensors)
        write_json(fresh / CONFIG_FILE, config)
        write_json(fresh / SIDECAR_FILE, stamped({**description, "representations": entries}))

    replace_folder(folder, write, check or check_replaceable)


def save_weights(
    folder: Path, interventions: Mapping[str, nn.Module], base_tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write the files of pyreft's ``save_intervention`` into a folder, whatever else it holds."""
    replace_files(folder, lambda fresh: _write_weights(fresh, interventions, base_tensors))


def _write_weights(folder: Path, modules: Mapping[str, nn.Module], base: Mapping[str, Tensor] | None) -> None:
    for key, module in modules.items():
        write_pickle(folder / f"intkey_{key}.bin", state_of(key, module))
    if base is not None:
        write_pickle(folder / BASE_FILE, base)


def state_of(key: str, intervention: nn.Module) -> dict[str, Tensor]:
    """The state dict that pyreft's class of an intervention loads, with whatever an own class has beside it.

    Raises TypeError where it is not all tensors and ValueError where an own name is one of pyreft's.
    """
    state = tensors_of(key, intervention)
    if not isinstance(intervention, Intervention):
        return state
    R, W, b, c = intervention.edit_weights()[:4]
    theirs = write_state(
        Operands(R, W, b, c),
        orthonormal=intervention.orthonormal,
        subtract=intervention.subtract,
        add_bias=isinstance(intervention, NodireftIntervention) and intervention.add_bias,
    )
    own = {name: value for name, value in state.items() if name.partition(".")[0] not in _EDIT_PARTS}
    if both := sorted(set(own) & set(theirs)):
        raise ValueError(f"{key}: cannot save its {both[0]!r} in pyreft's layout, which has another of that name")
    return {**theirs, **own}


def _without_fixed_rows(entry: Mapping[str, Any]) -> Entry:
    """The entry of an intervention that no longer knows the rows which its R was kept orthogonal to."""
    return {**entry, "settings": {k: v for k, v in entry["settings"].items() if k != "orthogonal_to"}}


def _listed(entry: Mapping[str, Any]) -> list[Any]:
    """A representation as pyvene's named tuple in JSON."""
    fields = {
        **dict.fromkeys(PYVENE_FIELDS),
        "layer": 0 if entry["layer"] is None else entry["layer"],
        "component": entry["component"],
        "unit": "pos",
        "max_number_of_units": 1,
        "low_rank_dimension": entry["low_rank_dimension"],
    }
    return list(fields.values())


def _pyreft_class(kind: type[nn.Module]) -> str:
    if INTERVENTIONS.get(kind.__name__) is kind:
        return f"<class 'pyreft.interventions.{kind.__name__}'>"
    return str(kind)


def _lost(entry: Mapping[str, Any], module: nn.Module) -> list[str]:
    """What pyreft's load does not take from its own files."""
    found = []
    if "." in entry["component"]:
        found.append("cannot load interventions of a module path")
    if isinstance(module, Intervention):
        settings = module.settings()
        if not module.orthonormal:
            found.append(f"cannot load a {type(module).__name__}; its load_intervention takes the weights")
        if settings["act_fn"] != "linear":
            found.append(f"takes act_fn={settings['act_fn']!r} as linear")
        if module.has_W and settings["dtype"] != "bfloat16":
            found.append(f"rounds W and b from {settings['dtype']} to bfloat16")
    return found


def check_replaceable(target: Path) -> None:
    """Raises FileExistsError where a folder holds anything but an adapter in pyreft's layout."""
    own = {CONFIG_FILE, BASE_FILE, SIDECAR_FILE, *(path.name for path in target.glob(_WEIGHTS))}
    refuse_other_files(target, {path.name for path in target.iterdir()} - own)
    if not is_adapter(target):
        raise FileExistsError(f"cannot save to {target}: what it holds is no adapter")
