"""Recipes: a plan, data and stages, as a checked schema and one YAML per recipe.

The package can be called: `linearize.recipes()` is `schema.recipes()`.
"""

from __future__ import annotations

import sys
from types import ModuleType

from linearize.recipes.plan import PlanConfig
from linearize.recipes.schema import DEFAULT_RECIPE, Recipe, load_recipe, recipe_names, recipes

__all__ = ["DEFAULT_RECIPE", "PlanConfig", "Recipe", "load_recipe", "recipe_names", "recipes"]


class _Callable(ModuleType):
    """A package whose name is that of a public function, too."""

    def __call__(self) -> dict[str, str]:
        """See `schema.recipes`."""
        return recipes()


sys.modules[__name__].__class__ = _Callable
