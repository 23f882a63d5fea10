"""The one exception for users: bad usage or bad input, reported in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used; the message says what was given, what is allowed and what to do."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the `InputError` for a name that is not in a table: the nearest known names, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")


def one_line(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]
