"""The verb `recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli.options import Json
from linearize.cli.output import show, show_rows


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this recipe, with every default spelled out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one."""
    from linearize.recipes import DEFAULT_RECIPE, load_recipe, recipe_names

    if name is not None:
        recipe = load_recipe(name)
        show(recipe, as_json=True) if as_json else print(recipe.to_yaml(), end="")
        return
    known = [load_recipe(each) for each in recipe_names()]
    rows = [{"name": r.name, "default": r.name == DEFAULT_RECIPE, "description": r.description} for r in known]
    if as_json:
        show(rows, as_json=True)
        return
    show_rows(rows)
