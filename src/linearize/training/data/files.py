"""The rows of data files, by the extension of their names; text may be compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.errors import InputError, one_line
from linearize.storage.files import read_text

Numbered = Iterable[tuple[int, object]]
"""Row (or line) numbers from 1, and rows."""
END_OF_TEXT = "<|endoftext|>"
"""GPT-2's end of a text, which many text files (TinyStories) have between documents, whatever the tokenizer."""


def file_rows(path: Path, ends: Sequence[str] = ()) -> Numbered:
    """The rows of a file. `ends`: lines that separate the documents of a text file, besides `END_OF_TEXT`.

    Raises:
        InputError: a folder, an unknown extension, no such file, or a file whose contents do not fit its name.
    """
    kind = path.with_suffix("").suffix.lower() if path.suffix.lower() in _UNPACK else path.suffix.lower()
    if path.is_dir():
        raise InputError(f"data {str(path)!r}: is a folder; name a file in it ({', '.join(EXTENSIONS)})")
    if kind not in EXTENSIONS or (kind == ".parquet" and kind != path.suffix.lower()):
        raise InputError(
            f"data {str(path)!r}: unknown extension {''.join(path.suffixes[-2:]) or '(none)'!r}; allowed: "
            f"{', '.join(EXTENSIONS)} (text also as {', '.join(_UNPACK)}), a Hub dataset name, or self"
        )
    if not path.exists():
        raise InputError(f"data {str(path)!r}: no such file; check the path")
    return _txt_rows(path, ends) if kind == ".txt" else _READERS[kind](path)


def _txt_rows(path: Path, ends: Sequence[str]) -> Numbered:
    return enumerate(({"text": text} for text in text_documents(_text(path), (END_OF_TEXT, *ends))), 1)


def text_documents(text: str, ends: Iterable[str]) -> list[str]:
    """The documents of a text: separated by lines of one of `ends` if there are two or more, else by blank lines.

    Blank lines between paragraphs stay where such lines separate documents; single line ends always do.
    """
    lines = "|".join(map(re.escape, ends))
    parts = [part for part in re.split(rf"(?m)^[ \t]*(?:{lines})[ \t]*$", text) if part.strip()]
    if len(parts) < 2:
        parts = [part for whole in parts for part in re.split(r"\n(?:[ \t]*\n)+", whole) if part.strip()]
    return [part.strip("\n") for part in parts]


def _jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"data {str(path)!r}, line {number}: not valid JSON ({error.msg})") from error


def _json_rows(path: Path) -> Numbered:
    text = _text(path)
    if not text.strip():
        return ()
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json, as many datasets have it
            return _jsonl_rows(path)
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


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, object]]:
    """Rows under the names in the first line; a row with fewer cells than names has null in the others."""
    table = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
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


def _parquet_rows(path: Path) -> Numbered:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return enumerate(map(without_fill, pyarrow.parquet.read_table(path).to_pylist()), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data {str(path)!r}: not a valid parquet file ({one_line(error)}); write it again") from error


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


def _text(path: Path) -> str:
    """The text of a file, decompressed according to its name."""
    kind = path.suffix.lower()
    if kind not in _UNPACK:
        return read_text(path)
    try:
        text = _UNPACK[kind](path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise InputError(f"{path}: not a valid {kind[1:]} file ({one_line(error)}); get it again") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _zstd(path: Path) -> bytes:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise InputError(f"{path}: this build of pyarrow cannot read .zst: unpack the file first (zstd -d)")
    with pyarrow.OSFile(str(path)) as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
        unpacked: bytes = stream.read()
        return unpacked


_UNPACK: dict[str, Callable[[Path], bytes]] = {
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
    ".zst": _zstd,
    ".bz2": lambda path: bz2.decompress(path.read_bytes()),
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
}
_READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": lambda path: _table_rows(path, ","),
    ".tsv": lambda path: _table_rows(path, "\t"),
}
EXTENSIONS = (".txt", *_READERS)
