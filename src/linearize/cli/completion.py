"""Words that a shell completes: names from files of the package, and from lists that tests compare with the tables.

Nothing here imports torch, so that a word is completed in a few tenths of a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Any

TARGETS = ("granite-hybrid", "qwen3.5", "hf", "mlx")
ENGINES = ("transformers", "mlx", "vllm", "llama.cpp")
SUITES = ("quick", "lolcats", "open-llm", "mamba-in-llama", "long-context", "chat", "held-out")
TRACKERS = ("tensorboard", "wandb")
BASES = ("8bit", "4bit")
DEVICES = ("cpu", "cuda")
_STAGES = 4  # stages whose keys are completed

Words = list[str | tuple[str, str]]


def recipe_names(incomplete: str) -> Words:
    """Names of recipes, each with its description."""
    import yaml

    entries = [entry for entry in (files("linearize") / "recipes").iterdir() if entry.name.endswith(".yaml")]
    names = {entry.name.removesuffix(".yaml"): entry for entry in entries if entry.name.startswith(incomplete)}
    return [(name, yaml.safe_load(names[name].read_text("utf-8"))["description"]) for name in sorted(names)]


def targets(incomplete: str) -> Words:
    """Targets of `export`."""
    return _starting(TARGETS, incomplete)


def engines(incomplete: str) -> Words:
    """Engines of `verify`."""
    return _starting(ENGINES, incomplete)


def suites(incomplete: str) -> Words:
    """Suites of `eval`."""
    return _starting(SUITES, incomplete)


def trackers(incomplete: str) -> Words:
    """Values of `convert --track`."""
    return _starting(TRACKERS, incomplete)


def bases(incomplete: str) -> Words:
    """Values of `--base`."""
    return _starting(BASES, incomplete)


def devices(incomplete: str) -> Words:
    """Values of `--device` where something runs."""
    return _starting(DEVICES, incomplete)


def planned_devices(incomplete: str) -> Words:
    """Kinds of devices that `plan` knows."""
    import yaml

    return _starting(yaml.safe_load((files("linearize") / "planning" / "devices.yaml").read_text("utf-8")), incomplete)


def settings(incomplete: str) -> Words:
    """`KEY=` for every key of a recipe; behind the `=` the values of keys that have a few."""
    key, equals, _ = incomplete.partition("=")
    known = recipe_values()
    if equals:
        return _starting([f"{key}={value}" for value in known.get(key, ())], incomplete)
    return _starting([f"{key}=" for key in known], incomplete)


def recipe_values() -> dict[str, list[str]]:
    """Dotted keys of a recipe, each with its values where the schema lists them: `plan.mixer.name` has the mixers."""
    schema = json.loads((files("linearize") / "recipes" / "recipe.schema.json").read_text("utf-8"))
    values: dict[str, list[str]] = {}
    for key, value in _walk(schema["else"], schema["$defs"], ()):
        known = values.setdefault(key, [])
        known += [value] if value is not None and value not in known else []
    return values


def _walk(node: dict[str, Any], definitions: dict[str, Any], key: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """The keys below a part of the schema, with a value each or None."""
    if "$ref" in node:
        yield from _walk(definitions[node["$ref"].rpartition("/")[2]], definitions, key)
        return
    for form in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _walk(form, definitions, key)
    for value in (*node.get("enum", ()), *([node["const"]] if "const" in node else ())):
        yield ".".join(key), str(value)
    if node.get("type") == "boolean":
        yield from ((".".join(key), value) for value in ("true", "false"))
    for name, entry in node.get("properties", {}).items():
        yield ".".join((*key, name)), None
        yield from _walk(entry, definitions, (*key, name))
    if node.get("type") == "array" and "oneOf" in node.get("items", {}):
        for number in range(_STAGES):
            yield from _walk(node["items"], definitions, (*key, str(number)))


def _starting(words: Iterable[str], incomplete: str) -> Words:
    return [word for word in words if word.startswith(incomplete)]
