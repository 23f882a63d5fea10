"""Fields of a data row, and what is to be reported of the rows of one data SPEC."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from linearize.errors import InputError

LOG = logging.getLogger("linearize")

Row = Mapping[str, Any]
Note = Callable[[str], None]
"""Takes what is to be reported of the row at hand, as the rest of a sentence: `have no answer`."""


class NullError(InputError):
    """A row whose text is null: it is left out and counted, where any other fault of a row is an error."""

    def __init__(self, field: str) -> None:
        super().__init__(f"field {field!r} must be text, it is NoneType (null)")


class RowNotes:
    """Counts what is noted of each row, and reports each kind of note in one line."""

    def __init__(self) -> None:
        self.row = 0
        """The number of the row at hand, from 1."""
        self.num_rows = 0
        self._rows: dict[str, list[int]] = {}

    def begin(self, row: int) -> None:
        """The next row is at hand."""
        self.row, self.num_rows = row, self.num_rows + 1

    def __call__(self, note: str) -> None:
        """Note something of the row at hand; a second note of the same kind changes nothing."""
        rows = self._rows.setdefault(note, [])
        if rows[-1:] != [self.row]:
            rows.append(self.row)

    def report(self, spec: str) -> None:
        """One warning for each kind of note."""
        for note, rows in self._rows.items():
            LOG.warning("data %r: %d of %d rows (the first: row %d) %s", spec, len(rows), self.num_rows, rows[0], note)


def ignore(_note: str) -> None:
    """The `Note` of a row by itself, of which nothing is reported."""


def is_null(value: object) -> bool:
    """Whether a value stands for none; pandas writes NaN for a text that is missing."""
    return value is None or (isinstance(value, float) and value != value)


def holds(row: Row, *fields: str) -> bool:
    """Whether a row has a value in each of these fields."""
    return not any(is_null(row.get(field)) for field in fields)


def string(row: Row, field: str) -> str:
    """The text in a field. Raises InputError for anything else."""
    value = row[field]
    if is_null(value):
        raise NullError(field)
    if not isinstance(value, str):
        raise InputError(f"field {field!r} must be text, it is {type(value).__name__}")
    return value


def from_json_text(value: object) -> Any:
    """What a JSON text stands for, as tables hold lists and objects; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
