"""Recipes: a data set, a network and the options to train it with, by name.

A new recipe is one file here with one subclass of `Recipe`; it is found by itself.
"""

from importlib import import_module
from pkgutil import iter_modules

from hbll.recipes.base import Network, Recipe, Schedule, TrainingRule, flag
from hbll.recipes.measures import Measure

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in Recipe.__subclasses__()}

__all__ = ["RECIPES", "Measure", "Network", "Recipe", "Schedule", "TrainingRule", "flag"]
