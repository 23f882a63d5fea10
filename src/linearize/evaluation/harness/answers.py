"""Answers of a model to single requests, kept while a task runs, so that an interrupted one continues.

Requests are answered in a fixed order, longest first, and what is kept is always the beginning of that order: the rest
falls into the same batches as without the interruption, so that the numbers are the same to the last bit.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

COMMIT_EVERY = 2.0  # seconds


class Answers:
    """A small database (in memory without a path). It stands in the place of lm-eval's cache hook."""

    def __init__(self, path: Path | None, progress: Callable[[int, int], None]) -> None:
        self.base = _open(path)
        self.progress = progress
        self.done = self.asked = 0
        self.saved = time.monotonic()

    def find(self, kind: str, request: Iterable[Any]) -> Any:
        """The answer; None where there is none."""
        row = self.base.execute("SELECT answer FROM answers WHERE request = ?", (_key(kind, request),)).fetchone()
        return None if row is None else json.loads(row[0])

    def add_partial(self, kind: str, request: Iterable[Any], answer: Any) -> None:
        """Keep one (lm-eval calls this for every request as soon as it is answered)."""
        self.base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (_key(kind, request), json.dumps(answer)))
        self.done += 1
        if time.monotonic() - self.saved > COMMIT_EVERY:
            self.save()
            self.progress(self.done, self.asked)

    def save(self) -> None:
        """Write what was added."""
        self.base.commit()
        self.saved = time.monotonic()

    def close(self) -> None:
        """Write and let go."""
        self.save()
        self.base.close()


def _open(path: Path | None) -> sqlite3.Connection:
    """The database; a file that is none (cut off by a full disk) is begun anew."""
    for fresh in (False, True):
        if fresh and path is not None:
            path.unlink(missing_ok=True)
        base = sqlite3.connect(path or ":memory:")
        try:
            base.execute("PRAGMA synchronous = OFF")  # a killed process loses nothing; a power cut may, and costs time
            base.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)")
            return base
        except sqlite3.DatabaseError:
            base.close()
            if path is None or fresh:
                raise
    raise AssertionError


def _key(kind: str, request: Iterable[Any]) -> str:
    from lm_eval.api.model import hash_args

    return str(hash_args(kind, request))
