"""A recipe: the plan, the data and the stages of a conversion; frozen, and checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linearize.errors import InputError, unknown
from linearize.modeling.io.quantized import BaseWeights
from linearize.recipes import overrides as dotted
from linearize.recipes.messages import explain
from linearize.recipes.plan import PlanConfig
from linearize.registry import choice
from linearize.storage.files import expand_home, read_text
from linearize.training.data.loading import DataConfig
from linearize.training.stages import STAGES

if TYPE_CHECKING:
    from linearize.training.config import StageConfig

    StageChoice: TypeAlias = StageConfig
else:
    StageChoice = choice(STAGES.own.values(), lambda: STAGES)

DEFAULT_RECIPE = "window-linear"
_SUFFIXES = (".yaml", ".yml")
OWN_KEYS = ("name", "description", "source", "seed")  # keys that a recipe with a base may have of its own


class Recipe(BaseModel):
    """`{plan, data, stages}`. Unknown keys are refused; a default lives in the config class that has the field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("custom", description="shown in reports and model cards")
    description: str = ""
    source: str = Field("", description="where the numbers come from")
    plan: PlanConfig
    data: DataConfig = Field(default_factory=DataConfig)
    stages: tuple[StageChoice, ...]
    seed: int = Field(0, ge=0)
    base_weights: BaseWeights = Field(
        "full", description="The frozen linear layers in memory: 8bit by torchao, 4bit by bitsandbytes"
    )

    @classmethod
    def from_data(cls, data: object, *, where: str = "") -> Self:
        """A recipe from plain data, as YAML gives it.

        Args:
            where: what the data is, for messages (a file's path).

        Raises:
            InputError: an invalid key or value; the message says what was given and what is allowed.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise explain(error, cls, data, where) from error

    def override(self, settings: Mapping[str, Any]) -> Self:
        """This recipe with dotted keys set: `.override({"plan.mixer.window": 16, "stages.0.tokens": "1e6"})`.

        A new `plan.mixer.name` (or `stages.N.name`) brings that mixer's defaults and keeps the settings both have.

        Raises:
            InputError: an unknown key (names the nearest), an index out of range, or a value that is not allowed.
        """
        if not settings:
            return self
        data, rest = dotted.renamed(self.model_dump(mode="json", exclude_unset=True), settings)
        everything = type(self).from_data(data).model_dump(mode="json")
        return type(self).from_data(dotted.applied(data, rest, everything))

    def to_yaml(self) -> str:
        """The whole recipe as YAML, every default spelled out; `load_recipe` reads it back."""
        data = self.model_dump(mode="json")
        plan = data["plan"]
        plan["mixer"] = plan["mixer"] and _name_first(plan["mixer"])
        plan["overrides"] = {int(layer): _name_first(mixer) for layer, mixer in plan["overrides"].items()}
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def _name_first(mixer: dict[str, Any]) -> dict[str, Any]:
    """The settings as people read them."""
    return {"name": mixer["name"], **mixer}


def recipe_names() -> list[str]:
    """The names of the packaged recipes, sorted."""
    entries = (Path(entry.name) for entry in files("linearize.recipes").iterdir())
    return sorted(entry.stem for entry in entries if entry.suffix == ".yaml")


def recipes() -> dict[str, str]:
    """The packaged recipes: name to description, sorted by name; `load_recipe` gives one."""
    return {name: load_recipe(name).description for name in recipe_names()}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A packaged recipe by name, or the one in a .yaml or .yml file.

    A file may name another recipe as its `base` and change it by dotted keys under `set`, as `--set` does.

    Raises:
        InputError: an unknown name (names the nearest), a file that cannot be read, or a recipe that is not valid.
    """
    return _load(expand_home(name_or_path), ())


def _load(name: str, above: tuple[str, ...]) -> Recipe:
    path = Path(name)
    if path.suffix.lower() in _SUFFIXES:
        text, where, name = read_text(path), str(path), path.stem
    elif name in recipe_names():
        text, where = (files("linearize.recipes") / f"{name}.yaml").read_text("utf-8"), f"recipe {name}"
    else:
        raise InputError(f"{unknown('recipe', name, recipe_names())} (or give a .yaml file)")
    data = {"name": name, **_parse(text, where)}
    if where in above:
        raise InputError(f"{where}: its base leads back to itself ({' -> '.join([*above, where])}); name another base")
    return _from_base(data, where, above) if "base" in data else Recipe.from_data(data, where=where)


def _from_base(data: dict[str, Any], where: str, above: tuple[str, ...]) -> Recipe:
    """The base with the file's own keys, then with those under `set`."""
    if others := sorted(set(data) - {"base", "set", *OWN_KEYS}):
        raise InputError(
            f"{where}: {others[0]!r} given with base; allowed with it: {', '.join(OWN_KEYS)}, and set: {{KEY: VALUE}}"
        )
    base, settings = data["base"], data.get("set") or {}
    if not isinstance(base, str) or not isinstance(settings, dict):
        raise InputError(f"{where}: base is a recipe's name or file, set a mapping of dotted keys to values")
    if Path(base).suffix.lower() in _SUFFIXES:
        base = str((Path(where).parent / expand_home(base)).resolve())
    recipe = _load(base, (*above, where))
    try:
        own = {key: value for key, value in data.items() if key in OWN_KEYS}
        return recipe.override({**own, **{str(key): value for key, value in settings.items()}})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise InputError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}{place}") from error
    if not isinstance(data, dict):
        raise InputError(f"{where}: a recipe is a mapping with plan, data and stages; this is {type(data).__name__}")
    return data


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that occurs twice in a mapping is an error; plain YAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if key.value in keys[:position]:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep=deep)
