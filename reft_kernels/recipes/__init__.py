"""The paper's experiments as named settings of a training job; the numbers are in the JSON files beside this one."""

from reft_kernels.recipes.option import Option
from reft_kernels.recipes.reader import Recipe, find_recipe, list_recipes, read_recipes
from reft_kernels.recipes.settings import OPTIONS, JobSettings, read_assignment

__all__ = [
    "OPTIONS",
    "JobSettings",
    "Option",
    "Recipe",
    "find_recipe",
    "list_recipes",
    "read_assignment",
    "read_recipes",
]
