"""Rows that took long to make, appended to a file as they come, so that a killed run reads them back and continues.

Each line is a JSON document: alone, or after its checksum and a space.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.storage.atomic import atomic_write_text
from linearize.storage.disk import is_disk_full, writing
from linearize.storage.files import expand_home
from linearize.storage.locks import lock

LOG = logging.getLogger("linearize")


class Journal:
    """The rows so far, and a file that takes further ones; threads may share it.

    With `checksums` each row continues from the one before: a damaged line and all after it are dropped, with a warning
    unless a kill explains it. Without, lines are plain JSON for other programs to read and rows are independent: only
    lines that are not JSON objects are dropped, and rows for which `stale` is true.

    `path` None keeps the rows in memory alone. `contents` is what the file holds, for messages. Processes that share a
    file take turns by `open_journal`.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        checksums: bool = True,
        contents: str = "the text that the teacher writes",
        stale: Callable[[Any], bool] | None = None,
    ) -> None:
        self.path, self.checksums, self.contents = path, checksums, contents
        self.rows: list[Any] = []
        self._end = 0
        self._lock = threading.Lock()
        lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.is_file() else []
        self._read_checked(lines) if checksums else self._read_plain(lines, stale)

    def append(self, row: Any) -> Any:
        """Add a row (JSON), on the disk when this returns; returns it as JSON keeps it.

        Raises:
            DiskFullError: the file stays as it was.
        """
        text = json.dumps(row)
        with self._lock:
            if self.path is not None:
                self._write(self.path, self._line(text))
            self.rows.append(json.loads(text))
            return self.rows[-1]

    def _line(self, text: str) -> bytes:
        line = f"{text}\n".encode()
        return f"{zlib.crc32(line[:-1]):08x} ".encode() + line if self.checksums else line

    def _write(self, path: Path, line: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = "r+b" if path.exists() else "w+b"
        with writing(self.contents, path.parent, len(line)), path.open(mode) as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)

    def _read_checked(self, lines: list[bytes]) -> None:
        for number, line in enumerate(lines, 1):
            row = _checked_row(line)
            if row is None:
                if line.endswith(b"\n"):
                    LOG.warning("%s is damaged from line %d on: that is made again", self.path, number)
                break
            self.rows.append(row)
            self._end += len(line)

    def _read_plain(self, lines: list[bytes], stale: Callable[[Any], bool] | None) -> None:
        """Reads the rows, and rewrites the file where some are dropped."""
        rows = [_object(line) for line in lines]
        self.rows = [row for row in rows if row is not None and not (stale and stale(row))]
        content = b"".join(self._line(json.dumps(row)) for row in self.rows)
        if len(self.rows) < len(lines) or (lines and not lines[-1].endswith(b"\n")):
            assert self.path is not None
            atomic_write_text(self.path, content.decode())
            self._end = len(content)
        else:
            self._end = sum(map(len, lines))


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Open the journal at this path for this process alone; waits, and prints so, while another process has it open.

    Raises:
        InputError: its folder cannot be created or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = lock(path.with_suffix(".lock"), path, waits=lambda holder: _report_wait(path, holder))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise InputError(
            f"{path.parent}, which caches the teacher's text, cannot be written ({error.strerror}): set "
            "LINEARIZE_CACHE to a folder that can"
        ) from error
    try:
        yield Journal(path)
    finally:
        os.close(descriptor)


def default_cache(kind: str) -> Path:
    """The cache folder of one kind of text that teachers wrote: in `$LINEARIZE_CACHE`, else in `linearize` under
    `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("LINEARIZE_CACHE"):
        return Path(expand_home(own)) / kind
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "linearize" / kind


def _report_wait(path: Path, holder: str) -> None:
    print(f"linearize: {holder} is writing the same text ({path}): waiting for it", file=sys.stderr, flush=True)


def _checked_row(line: bytes) -> Any:
    """The row of a line that is complete and fits its checksum, else None."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != f"{zlib.crc32(text):08x}".encode():
        return None
    return json.loads(text)


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line; None where there is none, as on a line that a kill cut."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
