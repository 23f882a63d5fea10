"""Where text comes from: the rows of files and Hub datasets."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError, one_line
from linearize.storage.files import expand_home, well_formed
from linearize.training.data.documents import Example
from linearize.training.data.files import END_OF_TEXT, Numbered, file_rows, without_fill
from linearize.training.data.row_fields import Note, NullError, RowNotes
from linearize.training.data.row_formats import example_of

Parsed = TypeVar("Parsed")


def read_examples(spec: str, tokenizer: PreTrainedTokenizerBase, *, answer_only: bool = False) -> list[Example]:
    """The texts of one data SPEC (a file or a Hub dataset `name` or `name:config`), empty ones left out.

    Raises:
        InputError: no such file or dataset, unknown extension, broken file, wrong fields, or no text in it.
    """
    eos = str(tokenizer.eos_token)

    def parse(row: object, note: Note) -> Example | None:
        example = example_of(row, tokenizer, answer_only, note)
        if not example.text.strip():
            note("are empty and are left out")
            return None
        if example.answers is None:
            for end in dict.fromkeys((END_OF_TEXT, eos)):
                if end in example.text.strip().removesuffix(eos):
                    note(f"have {end!r} within their text, which is not split there: put it on a line of its own")
        return example

    examples = [example for example in read_as(spec, parse, ends=(eos,)) if example is not None]
    if not examples:
        raise InputError(f"data {spec!r}: is empty, it holds no text; give data with at least two documents")
    return examples


def read_as(spec: str, parse: Callable[[object, Note], Parsed], *, ends: Sequence[str] = ()) -> list[Parsed]:
    """All rows of one data SPEC, each through `parse`; an `InputError` of it is raised with the row's number.

    A row that is null, or whose text is (a `NullError`), is left out; how many are, and what `parse` notes, is
    reported in one line each. `ends`: see `file_rows`.

    Raises:
        InputError: no such file or dataset, unknown extension, broken file, a row that `parse` refuses, or no row that
            is not null.
    """
    notes, parsed, null = RowNotes(), list[Parsed](), list[NullError]()
    for number, row in file_rows(Path(expand_home(spec)), ends) if _looks_like_path(spec) else _hub_rows(spec):
        notes.begin(number)
        whole = well_formed(row)
        if whole != row:
            notes("have half of a surrogate pair in their text, replaced by U+FFFD")
        try:
            if whole is None:
                raise NullError("row")
            parsed.append(parse(whole, notes))
        except NullError as error:
            null.append(error)
            notes("hold null where their text should be and are left out")
        except InputError as error:
            raise InputError(f"data {spec!r}, row {number}: {error}") from error
    if null and not parsed:
        raise InputError(f"data {spec!r}: no text is left, all {len(null)} rows hold null ({null[0]}); give other data")
    notes.report(spec)
    return parsed


def _looks_like_path(spec: str) -> bool:
    suffixed = re.search(r"\.[A-Za-z][A-Za-z0-9]{0,7}$", spec) is not None
    pathy = spec.startswith((".", "/", "~")) or "\\" in spec or spec.count("/") > 1
    return suffixed or pathy or Path(spec).exists()


def _hub_rows(spec: str) -> Numbered:
    """Rows of the train split of a Hub dataset."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", spec):
        raise InputError(f"data {spec!r}: neither a file nor a Hub dataset name (owner/name or owner/name:config)")
    import datasets

    name, _, config = spec.partition(":")
    try:
        with _quiet("huggingface_hub"):
            return enumerate(map(without_fill, datasets.load_dataset(name, config or None, split="train")), 1)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"data {spec!r}: no such file, and no Hub dataset that can be read from here ({one_line(error)}); "
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
