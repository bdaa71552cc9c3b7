"""Recipes out of their JSON files, ours or the user's."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from reft_kernels.recipes.settings import JobSettings

_FOLDER = Path(__file__).parent
_FIELDS = {"title", "source", "seeds", "settings", "extends"}
_DEFAULT_SEEDS = (42,)


@dataclass(frozen=True)
class Recipe:
    """Settings under a name: what they are of, where the numbers come from, and the seeds they were run with."""

    name: str
    title: str
    source: str
    seeds: tuple[int, ...]
    values: Mapping[str, Any]

    @property
    def settings(self) -> JobSettings:
        """The job's settings, the ones that the recipe does not say at their defaults."""
        return JobSettings.of(self.values)


def read_recipes(path: str | Path) -> dict[str, Recipe]:
    """The recipes of a JSON file, by name.

    The file is ``{"recipes": {name: {"title", "source", "seeds", "settings", "extends"}}}``; `extends` names another
    recipe of the file, or one that comes with the package, whose settings are the defaults of this one's. A
    ``"family"`` is a table: one recipe for each of its tasks and variants, whose columns hold a value for each task.

    Raises ValueError naming file, recipe and setting where something is wrong, and FileNotFoundError.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, Mapping) or not set(content) & {"recipes", "family"}:
        raise ValueError(f'{path}: expected an object with "recipes"')
    try:
        entries = {**content.get("recipes", {}), **(_family(content["family"]) if "family" in content else {})}
        return {name: _recipe(name, entries, own=path.parent == _FOLDER) for name in entries}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


@cache
def list_recipes() -> dict[str, Recipe]:
    """All recipes that come with the package, by name."""
    found: dict[str, Recipe] = {}
    for path in sorted(_FOLDER.glob("*.json")):
        found |= read_recipes(path)
    return found


def find_recipe(name: str) -> Recipe:
    """A recipe of the package by its name, or the one of a JSON file: ``my.json``, ``my.json:name`` if it has several.

    Raises ValueError that lists near names, or the file's.
    """
    path, _, wanted = name.partition(".json")
    if wanted or name.endswith(".json"):
        inside = read_recipes(Path(f"{path}.json").expanduser())
        wanted = wanted.removeprefix(":")
        if not wanted and len(inside) == 1:
            return next(iter(inside.values()))
        if wanted not in inside:
            raise ValueError(f"{path}.json has the recipes {', '.join(inside)}: name one as {path}.json:NAME")
        return inside[wanted]
    recipes = list_recipes()
    if name not in recipes:
        near = (
            difflib.get_close_matches(name, recipes, n=4, cutoff=0.5) or [r for r in recipes if r.startswith(name)][:4]
        )
        raise ValueError(f"unknown recipe {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    return recipes[name]


def _recipe(name: str, entries: Mapping[str, Any], *, own: bool) -> Recipe:
    chain: list[Mapping[str, Any]] = []
    at: str | None = name
    seen: set[str] = set()
    while at is not None:
        if at in seen:
            raise ValueError(f"recipe {name!r} extends itself")
        seen.add(at)
        if at not in entries:
            if own:
                raise ValueError(f"recipe {name!r} extends {at!r}, which is not there")
            if at not in list_recipes():
                raise ValueError(f"recipe {name!r} extends {at!r}, which is neither in the file nor in the package")
            base = list_recipes()[at]
            chain.append({"seeds": base.seeds, "settings": base.values, "title": base.title, "source": base.source})
            break
        entry = entries[at]
        if not isinstance(entry, Mapping) or not isinstance(entry.get("settings", {}), Mapping):
            raise ValueError(f"recipe {at!r} must be an object with settings, got {entry!r}")
        if unknown := set(entry) - _FIELDS:
            raise ValueError(f"recipe {at!r} has unknown fields: {', '.join(sorted(unknown))}")
        chain.append(entry)
        at = entry.get("extends")
    joined: dict[str, Any] = {"settings": {}}
    for entry in reversed(chain):
        joined = {**joined, **entry, "settings": {**joined["settings"], **entry.get("settings", {})}}
    try:
        JobSettings.of(joined["settings"])
    except ValueError as error:
        raise ValueError(f"recipe {name!r}: {error}") from None
    seeds = tuple(int(seed) for seed in joined.get("seeds", _DEFAULT_SEEDS))
    return Recipe(name, str(joined.get("title", name)), str(joined.get("source", "")), seeds, joined["settings"])


def _family(family: Mapping[str, Any]) -> dict[str, Any]:
    """One entry for each task and variant of a table."""
    tasks = family["tasks"]
    entries: dict[str, Any] = {}
    for ending, variant in family["variants"].items():
        columns = {**family.get("columns", {}), **variant["columns"]}
        for name, column in columns.items():
            if len(column) != len(tasks):
                raise ValueError(
                    f"column {name!r} of variant {ending!r} has {len(column)} values for {len(tasks)} tasks"
                )
        for index, task in enumerate(tasks):
            own = {name: column[index] for name, column in columns.items()}
            settings = {"glue": task, **family["settings"], **variant["settings"], **own}
            entries[_filled(family["name"], task) + ending] = {
                "title": _filled(variant["title"], task),
                "source": variant["source"],
                "seeds": family["seeds"],
                "settings": {name: _filled(value, task) for name, value in settings.items()},
            }
    return entries


def _filled(value: Any, task: str) -> Any:
    if isinstance(value, str):
        return value.replace("{task}", task)
    return [_filled(item, task) for item in value] if isinstance(value, list) else value
