"""List the recipes, or show one with its settings and where they come from."""

from __future__ import annotations

import argparse
import json

from reft_kernels.jobs.errors import user_errors
from reft_kernels.recipes import OPTIONS, Recipe, find_recipe, list_recipes

HELP = "list the settings of the paper's experiments"
USAGE = "[NAME] [--json]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `recipes`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one: its settings and their source")
    parser.add_argument("--json", action="store_true", help="print JSON, such as an own file of recipes holds")


def run(arguments: argparse.Namespace) -> None:
    """Prints the recipes, or one of them."""
    if arguments.name is None:
        recipes = list_recipes()
        if arguments.json:
            print(json.dumps({"recipes": {name: _entry(recipe) for name, recipe in recipes.items()}}, indent=1))
        else:
            width = max(map(len, recipes))
            for name, recipe in recipes.items():
                print(f"{name:{width}}  {recipe.title}")
        return
    with user_errors("recipe"):
        recipe = find_recipe(arguments.name)
    if arguments.json:
        print(json.dumps({"recipes": {recipe.name: _entry(recipe)}}, indent=1))
        return
    print(f"{recipe.name}: {recipe.title}\nsource   {recipe.source}\nseeds    {', '.join(map(str, recipe.seeds))}\n")
    settings = recipe.settings.as_dict()
    for name in OPTIONS:
        if name in recipe.values:
            print(f"{name:18} {_text(settings[name])}")


def _entry(recipe: Recipe) -> dict[str, object]:
    return {"title": recipe.title, "source": recipe.source, "seeds": recipe.seeds, "settings": dict(recipe.values)}


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
