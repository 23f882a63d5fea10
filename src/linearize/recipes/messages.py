"""Pydantic's errors about a recipe as one line: the key, the value, what is allowed."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from linearize.errors import InputError, unknown
from linearize.mixers import MIXERS, MixerConfig
from linearize.registry import Table
from linearize.training.config import StageConfig
from linearize.training.stages import STAGES

_MOST_SHOWN = 3
_SEPARATOR = " given; "
_MAPPING_EXPECTED = ("model_type", "model_attributes_type", "dict_type")


def explain(error: ValidationError, model: type[BaseModel], data: object, where: str = "") -> InputError:
    """The errors as one `InputError`.

    Args:
        error: what `model.model_validate(data)` raised.
        where: what `data` is, as a prefix (a file's path).
    """
    by_key: dict[str, list[str]] = {}
    for finding in error.errors():
        key = _key(finding["loc"], data, finding["type"])
        by_key.setdefault(key, []).append(_describe(key, dict(finding), model))
    lines = [_join(list(dict.fromkeys(texts))) for texts in by_key.values()]
    more = f"; and {len(lines) - _MOST_SHOWN} more" if len(lines) > _MOST_SHOWN else ""
    return InputError((f"{where}: " if where else "") + "; ".join(lines[:_MOST_SHOWN]) + more)


def _join(texts: list[str]) -> str:
    """Join several errors about one key (each member of a union has its own), with key and value written once."""
    head = texts[0].partition(_SEPARATOR)[0] + _SEPARATOR
    return " or ".join([texts[0], *(text.removeprefix(head) for text in texts[1:])])


def _key(loc: Sequence[int | str], data: object, kind: str) -> str:
    """The dotted key of an error: pydantic's path without the names of union members, which `data` lacks."""
    parts: list[str] = []
    for position, part in enumerate(loc):
        if isinstance(data, Mapping) and str(part) in {str(key) for key in data}:
            data = next(value for key, value in data.items() if str(key) == str(part))
        elif isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not (kind == "missing" and position == len(loc) - 1):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _describe(key: str, finding: dict[str, Any], model: type[BaseModel]) -> str:
    kind, context = finding["type"], finding.get("ctx", {})
    if kind == "extra_forbidden":
        parent = key.rpartition(".")[0]
        fields = {field for part in _models(model, finding["loc"][:-1]) for field in part.model_fields}
        return str(unknown("recipe key", key, [f"{parent}.{field}" if parent else field for field in fields]))
    if kind == "union_tag_invalid":
        tag = _tag(context)
        names = [name.strip(" '") for name in context["expected_tags"].split(",")]
        return f"{key}.{tag}: {unknown(tag, context['tag'], names)}"
    if kind == "union_tag_not_found":
        names = sorted(name for part in _models(model, finding["loc"]) for name in _names(part))
        return f"{key}.{_tag(context)} is missing; known: {', '.join(names)}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        return f"{key}: {context['error']}"
    value = repr(finding["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    message = "input should be a mapping" if kind in _MAPPING_EXPECTED else finding["msg"]
    return f"{key or 'the recipe'}: {value}{_SEPARATOR}{message[:1].lower()}{message[1:]}"


def _tag(context: Mapping[str, Any]) -> str:
    """The key that chooses the member of a union."""
    return str(context["discriminator"]).strip("'")


def _models(model: type[BaseModel], loc: Sequence[int | str]) -> list[type[BaseModel]]:
    """The models that a path may lead to: a field is followed, a name picks its union member, an index is skipped."""
    models = [model]
    for part in loc:
        picked = [candidate for candidate in models if part in _names(candidate)] or _registered(part)
        followed = [_inside(m.model_fields[part].annotation) for m in models if part in m.model_fields]
        if picked:
            models = picked
        elif followed:
            models = [member for members in followed for member in members]
    return models


def _registered(part: int | str) -> list[type[BaseModel]]:
    """The config that another package registered under this name, if any."""
    tables: tuple[Table[type[MixerConfig]] | Table[type[StageConfig]], ...] = (MIXERS, STAGES)
    return [table[part] for table in tables if isinstance(part, str) and part in table and part not in table.own]


def _names(model: type[BaseModel]) -> tuple[str, ...]:
    """The values that a model's `name` (or `kind`): `Literal[...]` allows; none for other models."""
    field = model.model_fields.get("name") or model.model_fields.get("kind")
    return typing.get_args(field.annotation) if field is not None else ()


def _inside(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [member for argument in typing.get_args(annotation) for member in _inside(argument)]
