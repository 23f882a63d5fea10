"""The JSON schema of recipes: as committed, true of every packaged recipe, and against what the loader refuses."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from linearize.cli.main import main
from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.recipes import Recipe, load_recipe, recipe_names
from linearize.recipes.json_schema import FILE, recipe_schema, schema_text

jsonschema = pytest.importorskip("jsonschema")
COMMITTED = Path(str(files("linearize.recipes") / FILE))


class Editor(yaml.SafeLoader):
    """YAML 1.2 as editors read it: `1e-2` is a number."""


Editor.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def faults(text: str) -> list[str]:
    """What an editor would underline."""
    validator = jsonschema.Draft202012Validator(recipe_schema())
    return [error.message for error in validator.iter_errors(yaml.load(text, Editor))]


def test_the_committed_file_is_the_schema_of_today() -> None:
    assert COMMITTED.read_text("utf-8") == schema_text(), (
        f"run: linearize recipes --schema > {COMMITTED.relative_to(Path(__file__).resolve().parents[1])}"
    )


def test_it_is_a_valid_schema_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    assert main(["recipes", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()
    assert main(["recipes", "lolcats", "--schema"]) == 2


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_are_valid_as_committed_and_as_printed(name: str) -> None:
    assert faults((files("linearize.recipes") / f"{name}.yaml").read_text("utf-8")) == []
    assert faults(load_recipe(name).to_yaml()) == []


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_is_the_named_one(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", name]) == 0
    mine = tmp_path / "my.yaml"
    mine.write_text(capsys.readouterr().out, "utf-8")
    assert load_recipe(mine) == load_recipe(name)
    path = re.match(r"# yaml-language-server: \$schema=(.+)\n", mine.read_text("utf-8"))
    assert path is not None and Path(path[1]) == COMMITTED
    changed = load_recipe(mine).override({"seed": 3})
    assert changed == load_recipe(name).override({"seed": 3}) != load_recipe(name)


CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({"base": "lolcats", "set": {"plan.mixer.window": 16}}, True),
    ({"base": "lolcats", "seed": 3, "description": "mine"}, True),
    ({"base": "lolcats", "plan": {"mixer": {"name": "lolcats"}}}, False),
    ({"plan": {"mixer": {"name": "lolcats"}}, "stages": [{"name": "lowrank", "tokens": "2M", "lr": 1}]}, True),
    ({"plan": {"mixer": {"name": "lolcats", "windw": 7}}, "stages": []}, False),
    ({"plan": {"mixer": {"name": "lolcat"}}, "stages": []}, False),
    ({"plan": {"mixer": {"name": "mamba2"}, "layers": {"keep": 0.5}}, "stages": []}, True),
    ({"plan": {"mixer": {"name": "mamba2"}, "layers": "most"}, "stages": []}, False),
    ({"plan": {"mixer": {"name": "mamba2"}}, "stages": [{"name": "distill", "tokens": 5, "lr": -1}]}, False),
    ({"plan": {"mixer": {"name": "mamba2"}}, "stages": [{"name": "distil", "tokens": 5, "lr": 1}]}, False),
    ({"stages": []}, False),
]  # fmt: skip


@pytest.mark.parametrize(("data", "valid"), CHANGES)
def test_editor_and_loader_agree(data: dict[str, Any], valid: bool, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data), "utf-8")
    assert (faults(path.read_text("utf-8")) == []) == valid
    if valid:
        assert isinstance(load_recipe(path), Recipe)
    else:
        with pytest.raises(InputError):
            load_recipe(path)


def test_every_mixer_is_in_it() -> None:
    names = {
        entry["properties"]["name"].get("const")
        for entry in recipe_schema()["$defs"].values()
        if "name" in entry["properties"]
    }
    assert set(MIXERS) <= names
