"""The one exception for people: bad usage or bad input, told in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was given, what is allowed and what to do."""


def unknown(kind: str, given: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not in a table; names the nearest known ones, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return InputError(f"unknown {kind} {given!r}: {hint}known: {', '.join(names)}")


def one_line(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
