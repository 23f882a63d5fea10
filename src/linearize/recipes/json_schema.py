"""The JSON schema of recipe files, by which editors complete and check them."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from linearize.recipes.schema import OWN_KEYS, Recipe

FILE = "recipe.schema.json"
"""Name of the schema next to the packaged recipes."""


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe file: a whole recipe, or a `base` with what is `set` in it."""
    whole = Recipe.model_json_schema()
    definitions = whole.pop("$defs")
    own = {key: whole["properties"][key] for key in OWN_KEYS}
    base = {"type": "string", "description": "a packaged recipe's name, or a .yaml file"}
    changes = {"type": "object", "description": "dotted keys and their values, like plan.mixer.window: 16"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of linearize",
        "if": {"type": "object", "required": ["base"]},
        "then": {
            "properties": {"base": base, "set": changes, **own},
            "required": ["base"],
            "additionalProperties": False,
        },
        "else": whole,
        "$defs": definitions,
    }


def schema_text() -> str:
    """The schema as the packaged file holds it."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def editor_line() -> str:
    """The comment by which an editor finds the schema of this installation (the convention of yaml-language-server)."""
    return f"# yaml-language-server: $schema={files('linearize.recipes') / FILE}"
