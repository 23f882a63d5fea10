"""How the command line prints results: as text and tables, or as one JSON document."""

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
def json_only(wanted: bool) -> Iterator[None]:
    """Where `wanted`, send everything that is printed inside to stderr, so that stdout holds the document alone."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def show(result: Any, *, as_json: bool = False) -> None:
    """Print a result: one JSON document, or `key  value` lines with a table for each list of mappings."""
    data = plain(result)
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
        return
    for line in lines(data):
        print(line)


def lines(data: Any, title: str = "") -> Iterator[str]:
    """Plain data as aligned lines of text."""
    if isinstance(data, Mapping):
        if title:
            yield f"\n{title}"
        simple = {key: value for key, value in data.items() if not _is_nested(value)}
        width = max(map(len, simple), default=0)
        yield from (f"{key:<{width}}  {text(value)}" for key, value in simple.items())
        for key, value in data.items():
            if _is_nested(value):
                yield from lines(value, f"{title}.{key}" if title else key)
    elif _is_nested(data):
        yield from ([f"\n{title}"] if title else [])
        yield from table(data)
    else:
        yield text(data)


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Mappings as the rows of a table, with a column for every key; numbers are aligned to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]
    for row in cells:
        padded = (
            cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right, strict=True)
        )
        yield "  ".join(padded).rstrip()


def text(value: Any) -> str:
    """One value as text: four decimals, thousands separated, `-` for None."""
    if value is None:
        return "-"
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
