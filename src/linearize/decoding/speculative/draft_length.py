"""How many tokens to guess: fixed, or by what a round costs and what is accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from linearize.errors import InputError

MOST = 8  # the most that `auto` guesses


def expected_tokens(acceptance: Sequence[float], count: int) -> float:
    """Tokens of a round with `count` guesses; `acceptance[i]`: how often guess i stays if those before it did.

    Guesses beyond the list stay as often as its last one (2211.17192, equation 1 for one rate).
    """
    tokens = chance = 1.0
    for i in range(count):
        chance *= acceptance[min(i, len(acceptance) - 1)] if acceptance else 0.0
        tokens += chance
    return tokens


def choose(
    target_seconds: Mapping[int, float], draft_seconds: Mapping[int, float], acceptance: Sequence[float], most: int
) -> int:
    """The number of guesses, 0 to `most`, that gives the most tokens per second; the smaller of equals.

    `target_seconds`: of one pass over so many tokens (at least one entry). `draft_seconds`: of guessing so many.
    Other widths are read off the straight line between their neighbours.
    """
    drafting = {0: 0.0, **draft_seconds}

    def rate(count: int) -> float:
        seconds = seconds_at(target_seconds, count + 1) + (seconds_at(drafting, count) if count else 0.0)
        return expected_tokens(acceptance, count) / max(seconds, 1e-12)

    return max(range(most + 1), key=lambda count: (rate(count), -count))


def seconds_at(measured: Mapping[int, float], width: int) -> float:
    """Seconds at a width, linear between measured ones, never falling beyond the last."""
    if width in measured:
        return measured[width]
    below = [w for w in sorted(measured) if w < width]
    above = [w for w in sorted(measured) if w > width]
    if below and above:
        low, high = below[-1], above[0]
    elif len(below) > 1:
        low, high = below[-2], below[-1]
    elif len(above) > 1:
        low, high = above[0], above[1]
    else:
        return measured[(below or above)[0]]
    slope = (measured[high] - measured[low]) / (high - low)
    if not (below and above):
        slope = max(slope, 0.0)
    return max(measured[low] + slope * (width - low), 1e-9)


@dataclass(frozen=True)
class Round:
    """One round as it went: `drafted` guesses per row, `kept` by each row, seconds of both models."""

    drafted: int
    kept: Sequence[int]
    target_seconds: float
    draft_seconds: float


class Chooser(Protocol):
    """Says how many tokens to guess. `pays`: whether guessing is known to pay."""

    @property
    def pays(self) -> bool:
        """Whether guessing is known to pay."""

    def next(self) -> int:
        """Guesses of the next round."""

    def observe(self, seen: Round) -> None:
        """How it went."""


@dataclass(frozen=True)
class Fixed:
    """Always the same number."""

    count: int
    pays = True

    def next(self) -> int:
        """Guesses of the next round."""
        return self.count

    def observe(self, seen: Round) -> None:
        """Nothing to learn."""


def check_draft_tokens(draft_tokens: int | Literal["auto"]) -> None:
    """Raises InputError for anything but `auto` and a number of at least 1."""
    whole = isinstance(draft_tokens, int) and not isinstance(draft_tokens, bool)
    if draft_tokens != "auto" and not (whole and int(draft_tokens) >= 1):
        raise InputError(f"draft_tokens is {draft_tokens!r}: give a number of at least 1, or auto")
