"""What the command line prints: results for people or as one JSON document, and errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

from linearize.errors import InputError
from linearize.storage.disk import DiskFullError, is_disk_full

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
_PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def plain(value: Any) -> Any:
    """A result as JSON knows it: mappings, lists, text and numbers; what is not finite becomes None."""
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
    raise TypeError(f"a result holds {type(value).__name__}, which JSON does not know")


@contextlib.contextmanager
def json_only(wanted: bool) -> Iterator[None]:
    """While `wanted`, everything that is printed goes to stderr, so that stdout holds the document alone."""
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
    """Mappings as the rows of a table; a column for each key that any of them has, numbers to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]
    for row in cells:
        padded = (
            cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(row, widths, right, strict=True)
        )
        yield "  ".join(padded).rstrip()


def conversion_lines(folder: Path) -> Iterator[str]:
    """The losses of a conversion, from the report in the student's folder, and where the student is."""
    from linearize.metrics.report import read_report

    report = read_report(folder)
    if report is None:
        return
    losses = [("teacher", report.teacher_loss), ("bare swap", report.swap_loss)]
    losses += [(f"after {name}", loss) for name, loss, stage in report.moments() if stage is not None]
    yield f"held-out loss, nats per token ({report.heldout_tokens:,} tokens)"
    yield from table([{"": name, "loss": loss, "above": loss - report.teacher_loss} for name, loss in losses])
    yield f"KL(teacher||student) {report.student_kl:.4f}, same most likely token {report.student_top1:.1%}"
    yield f"student written to {folder}"


def text(value: Any) -> str:
    """One value for people: four decimals, thousands separated, `-` for none."""
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


def one_line(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line for an error that ends a command."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, InputError):
        return BAD_USAGE, message
    if isinstance(error, typer.TyperException):
        command = getattr(getattr(error, "ctx", None), "command_path", "linearize")
        return error.exit_code, f"{' '.join(error.format_message().split())} (see {command} --help)"
    if isinstance(error, DiskFullError):
        return FAILED, message
    if is_disk_full(error):
        return FAILED, f"no space left on the device; free some or choose another folder ({message})"
    if isinstance(error, _PATH_ERRORS) and error.filename is not None:
        return BAD_USAGE, f"{error.filename}: {error.strerror}; check the path"
    return FAILED, f"failed: {type(error).__name__}: {message}"


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(entry, Mapping) for entry in value)
