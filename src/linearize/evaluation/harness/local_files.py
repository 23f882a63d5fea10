"""Local task files: which are missing, and their rows as lm-eval's definitions expect them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.evaluation.harness.catalogue import KNOWN, Entry, Known
from linearize.evaluation.harness.definitions import definitions
from linearize.storage.files import read_text, well_formed

Rows = list[dict[str, Any]]


def missing(entries: Sequence[Entry], root: Path) -> dict[str, str]:
    """The tasks that a folder of local files cannot serve, each with what is needed and where it comes from."""
    found = {}
    for entry in entries:
        known = entry.known
        if entry.own is not None:  # its definition says where its data are
            continue
        if known is None:
            found[entry.task] = f"no local layout is defined for it (those that have one: {', '.join(KNOWN)})"
            continue
        absent = [path for path in files(entry.task, known, root) if not path.is_file()]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            found[entry.task] = f"{absent[0]}{more} (fields {', '.join(known.fields)}; from the Hub's {known.hub})"
    return found


def refuse(lacking: Mapping[str, str], root: Path) -> InputError:
    """One line for all of them."""
    each = "; ".join(f"{task}: {need}" for task, need in lacking.items())
    return InputError(f"tasks without a file under {root}: {each}. Put them there, or leave them out (--skip-missing)")


def files(task: str, known: Known, root: Path) -> list[Path]:
    """Every file that a task reads."""
    if task != "mmlu":
        return [root / known.file]
    return [root / "mmlu" / split / f"{s}_{split}.csv" for s in subjects() for split in ("dev", "test")]


def subjects() -> list[str]:
    """MMLU's, by lm-eval's own definitions."""
    return sorted(path.stem.removeprefix("mmlu_") for path in (definitions() / "mmlu" / "default").glob("mmlu_*.yaml"))


def rows(task: str, known: Known, root: Path) -> Rows:
    """The rows of a task of one file, as on the Hub.

    Raises InputError with file and line for a row that is not of the layout.
    """
    path = root / known.file
    return _original(path, known, _json_lines(path))


def subject_rows(subject: str, split: str, root: Path) -> Rows:
    """The rows of an MMLU subject; the same errors."""
    path = root / "mmlu" / split / f"{subject}_{split}.csv"
    return _original(path, KNOWN["mmlu"], enumerate(csv.reader(io.StringIO(read_text(path))), start=1))


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, well_formed(json.loads(line))
            except ValueError as error:
                raise InputError(f"{path}, line {number}: no JSON ({error})") from error


def _original(path: Path, known: Known, numbered: Iterator[tuple[int, Any]]) -> Rows:
    found = []
    for number, row in numbered:
        if isinstance(row, dict) and (lacking := [name for name in known.fields if name not in row]):
            raise InputError(
                f"{path}, line {number}: no field {', '.join(lacking)}; expected {', '.join(known.fields)}"
            )
        try:
            found.append(known.original(row))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: not of the expected layout ({error})") from error
    if not found:
        raise InputError(f"{path}: holds no items")
    return found
