"""The version, and the versions of other libraries that it was tested with."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"
TRIED = {"torch": ("2.8", "2.14"), "transformers": ("5.17", "5.24"), "peft": ("0.18", "0.21")}
"""The oldest and the newest release of each library on which the tests pass; the bounds in pyproject.toml."""


def report_untried_versions() -> None:
    """Log one line if a library is installed in a release that the tests have not run on.

    A newer one may have renamed an argument: models then give wrong text without an error.
    """
    problems = [problem for library, bounds in TRIED.items() if (problem := untried(library, *bounds))]
    if problems:
        logging.getLogger("linearize").warning(
            "linearize %s was not tested with %s: results may be wrong", __version__, ", ".join(problems)
        )


def untried(library: str, oldest: str, newest: str) -> str | None:
    """What is installed and what was tested, or None where the two agree."""
    try:
        installed = version(library)
    except PackageNotFoundError:
        return None
    numbers, lowest, highest = (_numbers(text) for text in (installed, oldest, newest))
    if lowest <= numbers and numbers[: len(highest)] <= highest:
        return None
    return f"{library} {installed} (tested: {oldest} to {newest})"


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` is (2, 13, 0), `5.25.0.dev0` is (5, 25, 0)."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
