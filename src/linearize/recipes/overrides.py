"""Change single values of a recipe by dotted keys: `plan.mixer.window=16`, `stages.0.tokens=1e6`."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.recipes.schedule import SCHEDULES
from linearize.training.stages import STAGES

Key = tuple[str, ...]
_LAYERS = ("plan", "layers")
_SCHEDULE = ("plan", "schedule")
_HEADS = ("plan", "heads")
_MIXER = ("plan", "mixer")
_LAYER_FORMS = ({"keep", "select"}, {"every"})


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`["plan.mixer.window=16", ...]` as a mapping; values are read as YAML.

    Raises:
        InputError: no `=` or no value, a value that is not YAML, or a key that occurs twice.
    """
    result: dict[str, Any] = {}
    for override in settings:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not (key and equals and text.strip()):
            raise InputError(f"setting {override!r}: write KEY=VALUE, like plan.mixer.window=16 (null for no value)")
        if key in result:
            raise InputError(f"setting {key!r} is given twice; give it once")
        try:
            result[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(
                f"setting {override!r}: the value is not valid YAML; give a number, a word, [..] or {{..}}"
            ) from error
    return result


def renamed(data: dict[str, Any], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Apply the overrides that choose a kind of mixer, stage or schedule; return the data and the other overrides.

    Another kind starts from its own defaults and keeps those values of the recipe that it has a field for.
    """
    data, rest = copy.deepcopy(data), dict(overrides)
    for text, value in overrides.items():
        *parent, leaf = text.split(".")
        table, section = _table(tuple(parent)), _find(data, tuple(parent))
        tag = "kind" if table is SCHEDULES else "name"
        if leaf == tag and table and isinstance(section, dict) and isinstance(value, str) and value in table:
            fields = table[value].model_fields
            for field in [field for field in section if field not in fields]:
                del section[field]
            section[tag] = rest.pop(text)
    return data, rest


def applied(data: dict[str, Any], overrides: Mapping[str, Any], everything: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's data with these keys set, shortest first.

    Args:
        everything: the whole recipe with its defaults spelled out, which defines the keys that exist.

    Raises:
        InputError: an unknown key (names the nearest), or an index past the end of a list.
    """
    data = copy.deepcopy(data)
    for text in sorted(overrides, key=lambda text: text.count(".")):
        key, value = tuple(text.split(".")), copy.deepcopy(overrides[text])
        if form := _layer_form(key):
            before = _find(data, _LAYERS)
            kept = {k: v for k, v in before.items() if k in form} if isinstance(before, dict) else {}
            key, value = key[:-1], kept | {key[-1]: value}
        elif not _opens(key, everything):
            _check(key, data, everything)
        _set(data, key, value)
    return data


def _opens(key: Key, everything: Mapping[str, Any]) -> bool:
    """Whether a key may create a section that the recipe lacks; its value is checked with the recipe."""
    if key[:2] == ("plan", "overrides"):
        return len(key) in (3, 4)
    return key[:-1] in (_SCHEDULE, _HEADS) or (key[:-1] == _MIXER and _find(everything, _MIXER) is None)


def _layer_form(key: Key) -> set[str]:
    """The keys that may be combined with this one in `plan.layers`; none for other keys."""
    return next((form for form in _LAYER_FORMS if key[:-1] == _LAYERS and key[-1] in form), set())


def _check(key: Key, data: Mapping[str, Any], everything: Mapping[str, Any]) -> None:
    known = {".".join(path) for source in (everything, data) for path in _paths(source)}
    text = ".".join(key)
    if text in known:
        return
    for depth, part in enumerate(key):
        section = _find(data, key[:depth])
        if isinstance(section, list) and part.lstrip("-").isdigit() and _find(section, (part,)) is None:
            raise InputError(f"recipe key {text!r}: {'.'.join(key[:depth])} has {len(section)} entries, counted from 0")
    raise InputError(f"unknown recipe key {text!r}: {_nearest(text, sorted(known))}")


def _nearest(text: str, known: list[str]) -> str:
    """Suggest known keys for an unknown one: siblings, the same last part elsewhere, whole keys."""
    parent, _, leaf = text.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    near = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=2)]
    near += [key for key in known if key.rpartition(".")[2] == leaf]
    near += difflib.get_close_matches(text, known, n=2, cutoff=0.8)
    if near:
        return f"did you mean {' or '.join(map(repr, list(dict.fromkeys(near))[:3]))}?"
    return f"known: {', '.join(siblings.values() or known)}"


def _set(data: dict[str, Any], key: Key, value: Any) -> None:
    """Set a checked key; a section that the recipe leaves to its defaults is opened."""
    node: Any = data
    for part in key[:-1]:
        if isinstance(node, list):
            node = node[int(part)]
            continue
        if not isinstance(node.get(part), (dict, list)):
            node[part] = {}
        node = node[part]
    if isinstance(node, list):
        node[int(key[-1])] = value
    else:
        node[key[-1]] = value


def _paths(node: Any, prefix: Key = ()) -> Iterator[Key]:
    """Every key of nested mappings and lists of mappings, inner ones included."""
    if isinstance(node, list) and all(isinstance(entry, dict) for entry in node):
        node = {str(index): entry for index, entry in enumerate(node)}
    if isinstance(node, dict):
        for name, value in node.items():
            yield (*prefix, str(name))
            yield from _paths(value, (*prefix, str(name)))


def _find(node: Any, key: Key) -> Any:
    """The value at a key, or None."""
    for part in key:
        if isinstance(node, list):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _table(key: Key) -> Mapping[str, type[BaseModel]] | None:
    """The table of names that this key may have; None for other keys."""
    if key == _MIXER or (key[:2] == ("plan", "overrides") and len(key) == 3):
        return MIXERS
    if key == _SCHEDULE:
        return SCHEDULES
    return STAGES if key[:1] == ("stages",) and len(key) == 2 else None
