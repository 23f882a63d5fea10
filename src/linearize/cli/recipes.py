"""The verb `recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli.completion import recipe_names as recipe_completions
from linearize.cli.options import Json
from linearize.cli.output import show, show_rows
from linearize.errors import InputError


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Print this recipe, with every default spelled out; --recipe takes it back from a .yaml file.",
            autocompletion=recipe_completions,
        ),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipe files, for editors.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the recipes, or print one."""
    from linearize.recipes import DEFAULT_RECIPE, load_recipe, recipe_names
    from linearize.recipes.json_schema import editor_line, schema_text

    if schema:
        if name is not None:
            raise InputError(f"recipes --schema prints one schema for all recipes: leave {name!r} out")
        print(schema_text(), end="")
        return
    if name is not None:
        recipe = load_recipe(name)
        show(recipe, as_json=True) if as_json else print(f"{editor_line()}\n{recipe.to_yaml()}", end="")
        return
    known = [load_recipe(each) for each in recipe_names()]
    rows = [{"name": r.name, "default": r.name == DEFAULT_RECIPE, "description": r.description} for r in known]
    if as_json:
        show(rows, as_json=True)
        return
    show_rows(rows)
