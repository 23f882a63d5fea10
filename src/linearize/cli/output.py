"""How the command line prints results: as tables for people, or as one JSON document."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from linearize.tables import NOTHING, print_pairs, print_table, stdout_console


def plain(value: Any) -> Any:
    """A result as JSON: mappings, lists, text and numbers; numbers that are not finite become None."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a result holds {type(value).__name__}, which JSON cannot represent")


@contextlib.contextmanager
def json_only(active: bool) -> Iterator[None]:
    """While `active`, send everything that is printed to stderr, so that stdout holds the document alone."""
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield


def show(result: Any, *, as_json: bool = False) -> None:
    """Print a result: one JSON document, or names and values with a table for each list of mappings."""
    data = plain(result)
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
    else:
        _print(data, stdout_console())


def show_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print mappings as the rows of a table, with a column for every key."""
    print_table(stdout_console(), [{key: text(value) for key, value in row.items()} for row in rows])


def _print(data: Any, console: Console, title: str = "") -> None:
    """Plain data: single values first, then what is nested, each part under the path of its keys."""
    if title:
        console.print(f"\n{title}", style="bold")
    if isinstance(data, Mapping):
        nested = {key: value for key, value in data.items() if _is_nested(value)}
        print_pairs(console, {key: text(value) for key, value in data.items() if key not in nested})
        for key, value in nested.items():
            _print(value, console, f"{title}.{key}" if title else key)
    elif _is_nested(data):
        show_rows(data)
    else:
        console.print(text(data))


def text(value: Any) -> str:
    """One value as text: four decimals, thousands separated, `-` for None."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    if isinstance(value, (list, Mapping)):
        return json.dumps(value)
    return str(value)


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
