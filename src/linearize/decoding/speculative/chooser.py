"""How many tokens to guess: fixed, or by what a round costs and what is accepted."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, Protocol

from linearize.errors import InputError

MOST = 8  # the most that `auto` guesses
FIRST = 4  # what `auto` begins with
RECENT = 5  # timings of each width that count
FORGET = 0.95  # what an older round counts in the acceptance, per round
REFRESH = 64  # rounds with guesses after which one without is timed again
PROBE = 24  # rounds without guesses before `auto` tries again; doubled each time it does not help, up to eight times


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
    """Says how many tokens to guess."""

    def next(self) -> int:
        """Guesses of the next round."""

    def observe(self, seen: Round) -> None:
        """How it went."""


@dataclass(frozen=True)
class Fixed:
    """Always the same number."""

    count: int

    def next(self) -> int:
        """Guesses of the next round."""
        return self.count

    def observe(self, seen: Round) -> None:
        """Nothing to learn."""


@dataclass
class Auto:
    """The number with the most expected tokens per second, 0 where guessing loses; then it is tried again at times.

    What is drawn with it in sampling depends on timings; greedy text does not.
    """

    most: int = MOST
    target: dict[int, deque[float]] = field(default_factory=dict)
    draft: dict[int, deque[float]] = field(default_factory=dict)
    _kept: list[float] = field(default_factory=list)  # rounds in which guess i stayed, older ones counting less
    _tried: list[float] = field(default_factory=list)  # rounds in which all guesses before i stayed
    _plan: deque[int] = field(default_factory=deque)
    _plain: int = 0  # rounds without guesses since the last with some
    _guessing: int = 0
    _patience: int = PROBE

    def __post_init__(self) -> None:
        first = min(FIRST, self.most)
        self._plan.extend([0, 0, first, first, first])

    def next(self) -> int:
        """Guesses of the next round."""
        if self._plan:
            return self._plan.popleft()
        best = self.best(0)
        if best == 0 and self._plain >= self._patience:
            self._patience = min(2 * self._patience, 8 * PROBE)
            best = self.best(1)
            self._plan.append(best)
        elif best > 0:
            self._patience, self._guessing = PROBE, self._guessing + 1
            if self._guessing % REFRESH == 0:
                return 0
        return best

    def best(self, least: int) -> int:
        """The best number of at least `least`, by what was seen."""
        times = [{width: median(seen) for width, seen in table.items()} for table in (self.target, self.draft)]
        if not times[0]:
            return least
        return max(least, choose(times[0], times[1], self.acceptance(), self.most))

    def acceptance(self) -> list[float]:
        """How often guess i stayed where those before it did."""
        return [kept / tried for kept, tried in zip(self._kept, self._tried, strict=True) if tried > 0]

    def observe(self, seen: Round) -> None:
        """Timings and acceptance of a round."""
        self.target.setdefault(seen.drafted + 1, deque(maxlen=RECENT)).append(seen.target_seconds)
        self._plain = self._plain + 1 if seen.drafted == 0 else 0
        if not seen.drafted:
            return
        self.draft.setdefault(seen.drafted, deque(maxlen=RECENT)).append(seen.draft_seconds)
        self._kept = [FORGET * count for count in self._kept]
        self._tried = [FORGET * count for count in self._tried]
        missing = seen.drafted - len(self._kept)
        self._kept += [0.0] * missing
        self._tried += [0.0] * missing
        for i in range(seen.drafted):
            self._tried[i] += sum(kept >= i for kept in seen.kept)
            self._kept[i] += sum(kept > i for kept in seen.kept)


def chooser(draft_tokens: int | Literal["auto"]) -> Chooser:
    """What `draft_tokens` asks for. Raises InputError for a number below 1."""
    if draft_tokens == "auto":
        return Auto()
    if isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int) or draft_tokens < 1:
        raise InputError(f"draft_tokens is {draft_tokens!r}: give a number of at least 1, or auto")
    return Fixed(draft_tokens)
