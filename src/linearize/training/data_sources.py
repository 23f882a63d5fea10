"""Where text comes from: the rows of files and Hub datasets."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.files import read_json, read_text
from linearize.training.documents import Example
from linearize.training.row_formats import example_of, first_line

Numbered = Iterable[tuple[int, object]]  # (line or row number from 1, row)
Parsed = TypeVar("Parsed")


def read_examples(spec: str, tokenizer: PreTrainedTokenizerBase, *, answer_only: bool = False) -> list[Example]:
    """The texts of one data SPEC (a file or a Hub dataset `name` or `name:config`), empty ones left out.

    Raises:
        InputError: no such file or dataset, unknown extension, broken file, wrong fields, or no text in it.
    """
    examples = read_as(spec, lambda row: example_of(row, tokenizer, answer_only))
    examples = [example for example in examples if example.text.strip()]
    if not examples:
        raise InputError(f"data {spec!r}: is empty, it holds no text; give data with at least two documents")
    return examples


def read_as(spec: str, parse: Callable[[object], Parsed]) -> list[Parsed]:
    """All rows of one data SPEC, each through `parse`; an `InputError` of it is told with the row's number.

    Raises:
        InputError: no such file or dataset, unknown extension, broken file, or a row that `parse` refuses.
    """
    rows = _file_rows(Path(spec).expanduser()) if _looks_like_path(spec) else _hub_rows(spec)
    parsed = []
    for number, row in rows:
        try:
            parsed.append(parse(row))
        except InputError as error:
            raise InputError(f"data {spec!r}, row {number}: {error}") from error
    return parsed


def _looks_like_path(spec: str) -> bool:
    suffixed = re.search(r"\.[A-Za-z][A-Za-z0-9]{0,7}$", spec) is not None
    pathy = spec.startswith((".", "/", "~")) or "\\" in spec or spec.count("/") > 1
    return suffixed or pathy or Path(spec).exists()


def _file_rows(path: Path) -> Numbered:
    if path.is_dir():
        raise InputError(f"data {str(path)!r}: is a folder; name a file in it ({', '.join(_READERS)})")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"data {str(path)!r}: unknown extension {path.suffix or '(none)'!r}; allowed: {', '.join(_READERS)}, "
            "a Hub dataset name, or self"
        )
    if not path.exists():
        raise InputError(f"data {str(path)!r}: no such file; check the path")
    return reader(path)


def _txt_rows(path: Path) -> Numbered:
    """Documents separated by one or more blank lines; single line ends belong to the document."""
    parts = re.split(r"\n(?:[ \t]*\n)+", read_text(path))
    return ((number, {"text": part.strip("\n")}) for number, part in enumerate(parts, 1))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"data {str(path)!r}, line {number}: no valid JSON ({error.msg})") from error


def _json_rows(path: Path) -> Numbered:
    if not read_text(path).strip():
        return ()
    try:
        document = read_json(path)
    except InputError as error:
        if "Extra data" in str(error):  # JSON lines under the name .json, as many datasets have it
            return _jsonl_rows(path)
        raise
    rows = document.get("data", document) if isinstance(document, dict) else document
    if not isinstance(rows, list):
        found = ", ".join(sorted(rows)) if isinstance(rows, dict) else type(rows).__name__
        raise InputError(f"data {str(path)!r}: must hold a list of rows, or it under the key 'data'; found: {found}")
    return enumerate(rows, 1)


def _parquet_rows(path: Path) -> Numbered:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data {str(path)!r}: no valid parquet file ({first_line(error)})") from error


_READERS: dict[str, Callable[[Path], Numbered]] = {
    ".txt": _txt_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}


def _hub_rows(spec: str) -> Numbered:
    """Rows of the train split of a Hub dataset."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", spec):
        raise InputError(f"data {spec!r}: neither a file nor a Hub dataset name (owner/name or owner/name:config)")
    import datasets

    name, _, config = spec.partition(":")
    try:
        with _quiet("huggingface_hub"):
            return enumerate(datasets.load_dataset(name, config or None, split="train"), 1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"data {spec!r}: no such file, and no Hub dataset that can be read from here ({first_line(error)}); "
            "check the name and the network, or give a file"
        ) from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
