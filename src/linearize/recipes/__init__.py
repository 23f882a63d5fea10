"""Recipes: a plan, data and stages, as a checked schema and one YAML per recipe."""

from linearize.recipes.plan import PlanConfig
from linearize.recipes.schema import DEFAULT_RECIPE, Recipe, load_recipe, recipe_names

__all__ = ["DEFAULT_RECIPE", "PlanConfig", "Recipe", "load_recipe", "recipe_names"]
