"""The rows of data files, by the extension of their names; text may be compressed."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.errors import InputError, one_line
from linearize.training.data.text_lines import (
    END_OF_TEXT,
    OPENERS,
    Advance,
    cuts_at_blank_lines,
    ignore_bytes,
    text_documents,
    text_lines,
    whole_text,
)

Numbered = Iterable[tuple[int, object]]
"""Row (or line) numbers from 1, and rows."""
_ROWS = 1024  # of a table that are in memory at once


def file_rows(
    path: Path, ends: Sequence[str] = (), *, whole: bool = False, advance: Advance = ignore_bytes
) -> Numbered:
    """The rows of a file, read a few at a time (`.json` alone as a whole).

    Args:
        ends: lines that separate the documents of a text file, besides `END_OF_TEXT`; else blank lines do.
        whole: blank lines in a text file do not.
        advance: called with the bytes read.
    Raises:
        InputError: a folder, an unknown extension, no such file, or a file whose contents do not fit its name.
    """
    check_file(path)
    if is_txt(path):
        return _txt_rows(path, (END_OF_TEXT, *ends), whole, advance)
    return _READERS[data_kind(path)](path, advance)


def check_file(path: Path) -> None:
    """Refuse what `file_rows` cannot read, by its name. Raises InputError."""
    kind = data_kind(path)
    if path.is_dir():
        raise InputError(f"data {str(path)!r}: is a folder; name a file in it ({', '.join(EXTENSIONS)})")
    if kind not in EXTENSIONS or (kind in _BINARY and kind != path.suffix.lower()):
        raise InputError(
            f"data {str(path)!r}: unknown extension {''.join(path.suffixes[-2:]) or '(none)'!r}; allowed: "
            f"{', '.join(EXTENSIONS)} (text also as {', '.join(OPENERS)}), a Hub dataset name, or self"
        )
    if not path.exists():
        raise InputError(f"data {str(path)!r}: no such file; check the path")


def is_txt(path: Path) -> bool:
    """Whether a file is one of plain text."""
    return data_kind(path) == ".txt"


def data_kind(path: Path) -> str:
    """The extension that says what a file holds."""
    return (path.with_suffix("") if path.suffix.lower() in OPENERS else path).suffix.lower()


def _txt_rows(path: Path, ends: Sequence[str], whole: bool, advance: Advance) -> Numbered:
    blank_lines = not whole and cuts_at_blank_lines(path, ends)
    texts = text_documents(text_lines(path, advance), ends, blank_lines=blank_lines)
    return enumerate(({"text": text} for text in texts), 1)


def _jsonl_rows(path: Path, advance: Advance) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text_lines(path, advance), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"data {str(path)!r}, line {number}: not valid JSON ({error.msg})") from error


def _json_rows(path: Path, advance: Advance) -> Numbered:
    text = whole_text(path, advance)
    if not text.strip():
        return ()
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json, as many datasets have it
            return _jsonl_rows(path, ignore_bytes)
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"data {str(path)!r}: not valid JSON, {error.msg} ({where})") from error
    rows = document.get("data", document) if isinstance(document, dict) else document
    if isinstance(rows, dict) and {type(cells) for cells in rows.values()} in ({list}, {dict}):
        rows = _from_columns(rows, path)
    if not isinstance(rows, list):
        kind = ", ".join(sorted(rows)) if isinstance(rows, dict) else type(rows).__name__
        raise InputError(
            f"data {str(path)!r}: must hold a list of rows or lists by column, or either under the key 'data'; "
            f"found: {kind}"
        )
    return enumerate(rows, 1)


def _from_columns(columns: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """Rows of an object of lists, or of objects with the same keys, as pandas writes them."""
    keys = [list(cells) if isinstance(cells, dict) else range(len(cells)) for cells in columns.values()]
    if any(key != keys[0] for key in keys):
        sizes = ", ".join(f"{name} {len(cells)}" for name, cells in columns.items())
        raise InputError(f"data {str(path)!r}: columns of unequal length: {sizes}; give each row a value in each")
    cells = [list(cells.values()) if isinstance(cells, dict) else cells for cells in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]


def _table_rows(path: Path, delimiter: str, advance: Advance) -> Iterator[tuple[int, object]]:
    """Rows under the names in the first line; a row with fewer cells than names has null in the others."""
    table = csv.DictReader(text_lines(path, advance), delimiter=delimiter, strict=True)
    with _cells_of_any_size():
        try:
            for number, row in enumerate(table, 1):
                if None in row:
                    raise InputError(f"data {str(path)!r}, row {number}: has more cells than the first line has names")
                yield number, row
        except csv.Error as error:
            raise InputError(f"data {str(path)!r}, line {table.line_num}: not a valid table ({error})") from error


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_rows(path: Path, advance: Advance) -> Iterator[tuple[int, object]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _valid(path, (pyarrow.ArrowException, OSError)), pyarrow.parquet.ParquetFile(path) as file:
        share = path.stat().st_size // max(1, file.metadata.num_rows)
        yield from enumerate(_batch_rows(file.iter_batches(_ROWS), lambda rows: advance(rows * share)), 1)


def _arrow_rows(path: Path, advance: Advance) -> Iterator[tuple[int, object]]:
    """Rows as `save_to_disk` of `datasets` writes them."""
    import pyarrow

    with _valid(path, (pyarrow.ArrowException, OSError)), pyarrow.memory_map(str(path)) as file:
        yield from enumerate(_batch_rows(pyarrow.ipc.open_stream(file), ignore_bytes), 1)
    advance(path.stat().st_size)


def _batch_rows(batches: Iterable[Any], advance: Advance) -> Iterator[Any]:
    for batch in batches:
        yield from map(without_fill, batch.to_pylist())
        advance(len(batch))


@contextmanager
def _valid(path: Path, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        kind = path.suffix.lower().removeprefix(".")
        raise InputError(f"data {str(path)!r}: not a valid {kind} file ({one_line(error)}); write it again") from error


def without_fill(row: Any) -> Any:
    """A row of Arrow's without the keys of nested objects that are null: Arrow gives all objects of a column the same
    keys, so that a message without calls of tools would have some that are null."""
    return {name: _without_nulls(value) for name, value in row.items()} if isinstance(row, Mapping) else row


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None or name == "content"}
    return value


_READERS: dict[str, Callable[[Path, Advance], Numbered]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".csv": lambda path, advance: _table_rows(path, ",", advance),
    ".tsv": lambda path, advance: _table_rows(path, "\t", advance),
}
_BINARY = (".parquet", ".arrow")
EXTENSIONS = (".txt", *_READERS)
