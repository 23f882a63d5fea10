"""A file of JSON lines that only grows: an interrupted run is read back, a line that a kill cut is dropped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.storage.atomic import atomic_write_text
from linearize.storage.files import read_text

Record = dict[str, Any]


def file_name(name: str) -> str:
    """A name of a model as a file name: what a path cannot hold becomes `_`, and a few digits keep such names apart."""
    safe = re.sub(r"[^\w.+-]+", "_", name).lstrip(".")
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


class Journal:
    """Records in the order in which they came. Each one is on the disk before `append` returns; threads may share it.

    `path` None keeps them in memory only. `stale` tells records that no longer hold: they leave the file. Raises
    InputError for a file that cannot be read or written.
    """

    def __init__(self, path: Path | None, stale: Callable[[Record], bool] = lambda record: False) -> None:
        self.path = path
        self.records: list[Record] = []
        self._lock = threading.Lock()
        if path is not None and path.is_file():
            self._read(path, stale)

    def _read(self, path: Path, stale: Callable[[Record], bool]) -> None:
        text = read_text(path)
        found = [_record(line) for line in text.splitlines()]
        self.records = [record for record in found if record is not None and not stale(record)]
        if len(self.records) < len(found) or (text and not text.endswith("\n")):
            atomic_write_text(path, "".join(_line(record) for record in self.records))

    def append(self, record: Mapping[str, Any]) -> Record:
        """Add one; it comes back as JSON keeps it."""
        line = _line(record)
        with self._lock:
            if self.path is not None:
                _write(self.path, line)
            kept: Record = json.loads(line)
            self.records.append(kept)
        return kept


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"  # ASCII, so that no cut falls into a character


def _record(line: str) -> Record | None:
    """The object on a line; None for a line that is none (cut short by a kill)."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, line: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free some space or give another --out"
        ) from error
