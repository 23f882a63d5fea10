"""Where text comes from: the rows of files and Hub datasets, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.storage.files import well_formed
from linearize.training.data.documents import Example
from linearize.training.data.files import Numbered, file_rows, is_txt
from linearize.training.data.hub import hub_rows
from linearize.training.data.row_fields import Note, NullError, RowNotes
from linearize.training.data.row_formats import example_of
from linearize.training.data.specs import DataSource, data_source
from linearize.training.data.text_lines import END_OF_TEXT, Advance, cuts_at_blank_lines, ignore_bytes

Parsed = TypeVar("Parsed")


def read_examples(spec: str, tokenizer: PreTrainedTokenizerBase, *, answer_only: bool = False) -> list[Example]:
    """The texts of one data SPEC (see `specs`), empty ones left out.

    Raises:
        InputError: no such file or dataset, unknown extension, broken file, wrong fields, or no text in it.
    """
    notes = RowNotes()
    examples = list(iterate_examples(data_source(spec), tokenizer, notes, answer_only=answer_only))
    notes.report(spec)
    return examples


def iterate_examples(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    notes: RowNotes,
    *,
    answer_only: bool = False,
    advance: Advance = ignore_bytes,
) -> Iterator[Example]:
    """As `read_examples`, one text at a time. `notes` has afterwards what is to be reported; `advance` gets bytes."""
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

    empty = True
    for example in _parsed(source, parse, notes, (eos,), advance):
        if example is not None:
            empty = False
            yield example
    if empty:
        raise InputError(f"data {source.spec!r}: is empty, it holds no text; give data with at least two documents")


def is_cut_at_blank_lines(source: DataSource, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether blank lines separate the documents of a text file of this source."""
    ends = (END_OF_TEXT, str(tokenizer.eos_token))
    return not source.whole and any(is_txt(file) and cuts_at_blank_lines(file, ends) for file in source.files)


def read_as(spec: str, parse: Callable[[object, Note], Parsed], *, ends: Sequence[str] = ()) -> list[Parsed]:
    """All rows of one data SPEC, each through `parse`; an `InputError` of it is raised with the row's number.

    A row that is null, or whose text is (a `NullError`), is left out; how many are, and what `parse` notes, is
    reported in one line each. `ends`: see `file_rows`.

    Raises:
        InputError: no such file or dataset, unknown extension, broken file, a row that `parse` refuses, or no row that
            is not null.
    """
    notes = RowNotes()
    parsed = list(_parsed(data_source(spec), parse, notes, ends, ignore_bytes))
    notes.report(spec)
    return parsed


def _parsed(
    source: DataSource,
    parse: Callable[[object, Note], Parsed],
    notes: RowNotes,
    ends: Sequence[str],
    advance: Advance,
) -> Iterator[Parsed]:
    spec, first_null, num_parsed = source.spec, None, 0
    for name, number, row in _rows(source, ends, advance):
        notes.begin(number)
        whole = well_formed(row)
        if whole != row:
            notes("have half of a surrogate pair in their text, replaced by U+FFFD")
        try:
            if whole is None:
                raise NullError("row")
            result = parse(whole, notes)
        except NullError as error:
            first_null = first_null or error
            notes("hold null where their text should be and are left out")
        except InputError as error:
            raise InputError(f"data {name!r}, row {number}: {error}") from error
        else:
            num_parsed += 1
            yield result
    if first_null is not None and not num_parsed:
        raise InputError(
            f"data {spec!r}: no text is left, all {notes.num_rows} rows hold null ({first_null}); give other data"
        )


def _rows(source: DataSource, ends: Sequence[str], advance: Advance) -> Iterator[tuple[str, int, object]]:
    """The rows, each with where it is: the name of its file and its number there."""
    if source.hub is not None:
        yield from _named(source.spec, hub_rows(source.hub, source.spec))
    for file in source.files:
        rows = file_rows(file, ends, whole=source.whole, advance=advance)
        yield from _named(source.spec if len(source.files) == 1 else str(file), rows)


def _named(name: str, rows: Numbered) -> Iterator[tuple[str, int, object]]:
    return ((name, number, row) for number, row in rows)
