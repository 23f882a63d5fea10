"""Rows that took long to make, appended to a file as they come: what a kill leaves is read back, up to the first line
that is not whole, and the rest is made again.

Each line is a checksum, a space and a JSON document. One process at a time writes a journal; others wait.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.storage.disk import is_disk_full, lock, writing
from linearize.storage.files import expand_home

LOG = logging.getLogger("linearize")


class Journal:
    """The rows so far, and a file that takes further ones; see `open_journal`."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a damaged line and all after it are dropped, which is said unless a kill explains it."""
        self.path = path
        self.rows: list[Any] = []
        self._end = 0
        content = path.read_bytes() if path.is_file() else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            found = _parsed(line)
            if found is None:
                if line.endswith(b"\n"):
                    LOG.warning("%s is damaged from line %d on: that is made again", path, number)
                break
            self.rows.append(found)
            self._end += len(line)

    def append(self, row: Any) -> None:
        """Adds a row (JSON) to the file, on the disk when this returns. Raises DiskFullError; the file stays whole."""
        text = json.dumps(row)
        line = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        mode = "r+b" if self.path.exists() else "w+b"
        with writing("the text that the teacher writes", self.path.parent, len(line)), self.path.open(mode) as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)
        self.rows.append(row)


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """The journal at this path, for this process alone; waits, and says so, while another one writes it.

    Raises:
        InputError: its folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = lock(path.with_suffix(".lock"), path, waits=lambda holder: _tell(path, holder))
    except OSError as error:
        if is_disk_full(error):
            raise
        raise InputError(
            f"{path.parent}, where the teacher's text is kept, cannot be written ({error.strerror}): set "
            "LINEARIZE_CACHE to a folder that can"
        ) from error
    try:
        yield Journal(path)
    finally:
        os.close(descriptor)


def default_cache(kind: str) -> Path:
    """The folder of a kind of texts that teachers wrote, in `$LINEARIZE_CACHE`, or `linearize` in `$XDG_CACHE_HOME` or
    `~/.cache`."""
    if own := os.environ.get("LINEARIZE_CACHE"):
        return Path(expand_home(own)) / kind
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "linearize" / kind


def _tell(path: Path, holder: str) -> None:
    print(f"linearize: {holder} is writing the same text ({path}): waiting for it", file=sys.stderr, flush=True)


def _parsed(line: bytes) -> Any:
    """The document of a line that is whole, else None."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != f"{zlib.crc32(text):08x}".encode():
        return None
    return json.loads(text)
