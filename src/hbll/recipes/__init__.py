"""Recipes: a data set, a network and the options to train it with, by name.

A new recipe is one file here with one subclass of `Recipe` that has a name, most often of `TreeRecipe`; it is found by
itself.
"""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from hbll.recipes.base import Recipe, Schedule, flag
from hbll.recipes.measures import Measure

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def _named(kind: type[Recipe]) -> Iterator[type[Recipe]]:
    for recipe in kind.__subclasses__():
        if "name" in vars(recipe):
            yield recipe
        yield from _named(recipe)


RECIPES: dict[str, type[Recipe]] = dict(sorted((recipe.name, recipe) for recipe in _named(Recipe)))

__all__ = ["RECIPES", "Measure", "Recipe", "Schedule", "flag"]
