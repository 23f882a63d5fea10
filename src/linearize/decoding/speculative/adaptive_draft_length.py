"""The number of guesses by what they cost and how many stay; none where guessing loses."""

from __future__ import annotations

from collections import deque
from typing import Literal

from linearize.decoding.speculative.acceptance_stats import CREDIT, SHARE, Experience
from linearize.decoding.speculative.draft_length import MOST, Chooser, Fixed, Round, choose, expected_tokens, seconds_at

FIRST = 3  # what it begins with: a pass over four tokens is the cheapest of its kind
PLAIN = 2  # plain steps that are timed before the first guess
REFRESH = 64  # rounds with guesses after which a plain step is timed again
WIDEN = 8  # rounds with guesses after which a larger number is tried than seems best
BENEFIT = 0.06  # of the doubt: what a single timing may be too long; less by the root of how many there are
PROVEN = 4  # rounds with guesses before which nothing is said to pay


class Auto:
    """The number with the most expected tokens per second, 0 where guessing loses.

    What it may lose is bounded: `ALLOWANCE` steps of the target until guessing proves itself (`CREDIT` more where it
    seems to pay and does not), and `SHARE` of all steps after that, on trying whether it pays by now. What is drawn
    with it in sampling depends on timings; greedy text does not.
    """

    def __init__(self, experience: Experience | None = None, *, rows: int = 1, most: int = MOST) -> None:
        self.known = Experience() if experience is None else experience
        self.known.begin(rows)
        self.most = most
        self._plan: deque[int] = deque()
        self._steady = True  # whether the last round had no guesses: the next plain step does nothing but step
        self._guessing = 0

    @property
    def pays(self) -> bool:
        """Whether guessing is known to pay, so that preparing for more of it is worth some time."""
        return self.known.rounds >= PROVEN and self._best() > 0

    def next(self) -> int:
        """Guesses of the next round."""
        if self._plan:
            return self._plan.popleft()
        if len(self.known.target.get(1, ())) < PLAIN:
            return 0
        if not self.known.rounds:
            return min(FIRST, self.most)
        best = self._best()
        if best == 0 or self.known.allowance <= -CREDIT:
            return self._try()
        self._guessing += 1
        if self._guessing % REFRESH == 0:
            self._plan.append(0)
            return 0
        return min(best + 2, self.most) if self._guessing % WIDEN == 0 else best

    def _best(self, *, hopeful: bool = False) -> int:
        target, draft = self.known.seconds()
        for width, seen in self.known.target.items():
            target[width] *= 1 - BENEFIT / len(seen) ** 0.5
        return choose(target, draft, self.known.acceptance(hopeful=hopeful), self.most) if target else 0

    def _try(self) -> int:
        """Guesses that lose by what was seen, where that much may be lost; else none."""
        count = max(1, min(self._best(hopeful=True), FIRST))
        target, draft = self.known.seconds()
        seconds = seconds_at(target, count + 1) + seconds_at({0: 0.0, **draft}, count)
        loss = seconds / target[1] - expected_tokens(self.known.acceptance(), count)
        return count if loss <= self.known.allowance else 0

    def observe(self, seen: Round) -> None:
        """Timings and acceptance of a round."""
        known = self.known
        if seen.drafted == 0:
            if self._steady:
                known.time(known.target, 1, seen.target_seconds)
            self._steady = True
            known.allowance = min(CREDIT, known.allowance + SHARE)
            return
        self._steady = False
        known.time(known.target, seen.drafted + 1, seen.target_seconds)
        known.time(known.draft, seen.drafted, seen.draft_seconds)
        known.count(seen.drafted, seen.kept)
        step = known.seconds()[0].get(1)
        if step is not None:
            won = 1 + sum(seen.kept) / len(seen.kept) - (seen.target_seconds + seen.draft_seconds) / step
            known.allowance = min(CREDIT, known.allowance + won)


def pace_of(draft_tokens: int | Literal["auto"], experience: Experience, rows: int) -> Chooser:
    """What `draft_tokens` asks for: a number, or `Auto` with what is known already, for `rows` texts at a time."""
    return Auto(experience, rows=rows) if draft_tokens == "auto" else Fixed(draft_tokens)
