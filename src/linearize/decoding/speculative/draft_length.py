"""How many tokens to draft in a round: a fixed number, or the number with the most expected tokens per second.

`AcceptanceStats` is what was measured of one target with one draft: seconds, acceptance, and the time that speculation
may still lose. It is kept between calls, per pair, as long as both models live.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from linearize.errors import InputError

MAX_DRAFT_TOKENS = 8  # the most that `auto` drafts
FIRST_DRAFT = 3  # the first number of draft tokens: a pass over four tokens is the cheapest of its kind
PLAIN_STEPS = 2  # plain steps that are timed before the first draft
REFRESH_EVERY = 64  # speculative rounds after which a plain step is timed again
WIDEN_EVERY = 8  # speculative rounds after which a larger number than the best one is tried
TIMING_DOUBT = 0.06  # by how much a single timing may be too long; divided by the root of the number of timings
MIN_ROUNDS = 4  # speculative rounds before speculation counts as profitable

RECENT = 8  # timings of each width that count
FORGET = 0.95  # weight of the earlier rounds in the acceptance, per round
NEW_TEXT = 0.5  # weight of everything accepted before when another text begins
ALLOWANCE = 2.5  # the most that speculation may lose before it proves itself, in steps of the target
CREDIT = 6.0  # the most that earlier gains allow to be lost again
ALLOWANCE_PER_STEP = 0.0075  # allowance gained by each plain step
FRESH = 1.0  # the least allowance at the beginning of a text

DraftTokens = int | Literal["auto"]


@dataclass(frozen=True)
class Round:
    """One round: `drafted` tokens per row, the number `kept` by each row, and the seconds of both models."""

    drafted: int
    kept: Sequence[int]
    target_seconds: float
    draft_seconds: float


class DraftLength(Protocol):
    """Chooses the number of tokens to draft, round by round."""

    @property
    def pays(self) -> bool:
        """Whether speculation is known to be faster than plain decoding."""

    def next(self) -> int:
        """Return the number of tokens to draft in the next round."""

    def observe(self, seen: Round) -> None:
        """Learn from a round."""


@dataclass(frozen=True)
class FixedDraftLength:
    """Always the same number."""

    count: int
    pays = True

    def next(self) -> int:
        """Return the number of tokens to draft in the next round."""
        return self.count

    def observe(self, seen: Round) -> None:
        """Ignore the round."""


@dataclass
class AcceptanceStats:
    """Measurements of one target with one draft.

    `target[n]`: seconds of a pass over n tokens; `draft[n]`: seconds to draft n tokens; the last few of each.
    `kept[i]`, `tried[i]`: rounds that kept draft token i, and rounds that kept all draft tokens before it.
    `allowance`: steps of the target that speculation may still lose: rounds that gain fill it, plain steps fill it
    slowly, rounds that lose drain it. `rounds`: speculative rounds so far. `rows`: the batch size that was timed.
    """

    target: dict[int, deque[float]] = field(default_factory=dict)
    draft: dict[int, deque[float]] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)
    tried: list[float] = field(default_factory=list)
    allowance: float = ALLOWANCE
    rounds: int = 0
    rows: int = 0

    def begin(self, rows: int) -> None:
        """Begin another batch: earlier acceptance counts less, timings of another batch size are dropped."""
        self.kept, self.tried = ([NEW_TEXT * count for count in counts] for counts in (self.kept, self.tried))
        self.allowance = min(max(self.allowance, FRESH), ALLOWANCE)
        if rows != self.rows:
            self.target, self.draft, self.rows = {}, {}, rows

    def seconds(self) -> tuple[dict[int, float], dict[int, float]]:
        """Return the target's seconds by tokens and the draft's by draft tokens.

        Each is the lower median of its timings, since disturbances only add time.
        """
        target, draft = (
            {width: median_low(times) for width, times in table.items()} for table in (self.target, self.draft)
        )
        return target, draft

    def time(self, table: dict[int, deque[float]], width: int, seconds: float) -> None:
        """Add a timing to `target` or `draft`."""
        table.setdefault(width, deque(maxlen=RECENT)).append(seconds)

    def count(self, drafted: int, kept: Sequence[int]) -> None:
        """Add a round: the number of tokens drafted and the number that each row kept."""
        missing = drafted - len(self.kept)
        self.kept = [FORGET * count for count in self.kept] + [0.0] * missing
        self.tried = [FORGET * count for count in self.tried] + [0.0] * missing
        for i in range(drafted):
            self.tried[i] += sum(one >= i for one in kept)
            self.kept[i] += sum(one > i for one in kept)
        self.rounds += 1

    def acceptance(self, *, optimistic: bool = False) -> list[float]:
        """Return how often each draft token is kept when all before it are.

        The counts are smoothed by one more round in which the token was kept as often as the one before it (the first:
        half of the time), or always, if `optimistic`.
        """
        rates, before = [], 0.5
        for kept, tried in zip(self.kept or [0.0], self.tried or [0.0], strict=True):
            before = (kept + (1.0 if optimistic else before)) / (tried + 1)
            rates.append(before)
        return rates


class AdaptiveDraftLength:
    """The number with the most expected tokens per second; 0 where speculation loses.

    The loss is bounded: `ALLOWANCE` steps of the target until speculation proves itself (`CREDIT` more where it seems
    to pay and does not), and after that `ALLOWANCE_PER_STEP` of all steps, spent on trying again. Sampled text depends
    on the numbers chosen, and so on timings; greedy text does not.
    """

    def __init__(self, stats: AcceptanceStats | None = None, *, rows: int = 1, most: int = MAX_DRAFT_TOKENS) -> None:
        self.stats = AcceptanceStats() if stats is None else stats
        self.stats.begin(rows)
        self.most = most
        self._plan: deque[int] = deque()
        self._steady = True  # whether the last round was plain: the next plain step has nothing to catch up with
        self._speculative = 0

    @property
    def pays(self) -> bool:
        """Whether speculation is known to pay, so that preparing for more of it is worth some time."""
        return self.stats.rounds >= MIN_ROUNDS and self._best() > 0

    def next(self) -> int:
        """Return the number of tokens to draft in the next round."""
        if self._plan:
            return self._plan.popleft()
        if len(self.stats.target.get(1, ())) < PLAIN_STEPS:
            return 0
        if not self.stats.rounds:
            return min(FIRST_DRAFT, self.most)
        best = self._best()
        if best == 0 or self.stats.allowance <= -CREDIT:
            return self._try()
        self._speculative += 1
        if self._speculative % REFRESH_EVERY == 0:
            self._plan.append(0)
            return 0
        return min(best + 2, self.most) if self._speculative % WIDEN_EVERY == 0 else best

    def _best(self, *, optimistic: bool = False) -> int:
        target, draft = self.stats.seconds()
        for width, times in self.stats.target.items():
            target[width] *= 1 - TIMING_DOUBT / len(times) ** 0.5
        return best_length(target, draft, self.stats.acceptance(optimistic=optimistic), self.most) if target else 0

    def _try(self) -> int:
        """Return a number that loses by the measurements, if the allowance covers the loss; else 0."""
        count = max(1, min(self._best(optimistic=True), FIRST_DRAFT))
        target, draft = self.stats.seconds()
        seconds = seconds_at(target, count + 1) + seconds_at({0: 0.0, **draft}, count)
        loss = seconds / target[1] - expected_tokens(self.stats.acceptance(), count)
        return count if loss <= self.stats.allowance else 0

    def observe(self, seen: Round) -> None:
        """Learn timings and acceptance from a round."""
        stats = self.stats
        if seen.drafted == 0:
            if self._steady:
                stats.time(stats.target, 1, seen.target_seconds)
            self._steady = True
            stats.allowance = min(CREDIT, stats.allowance + ALLOWANCE_PER_STEP)
            return
        self._steady = False
        stats.time(stats.target, seen.drafted + 1, seen.target_seconds)
        stats.time(stats.draft, seen.drafted, seen.draft_seconds)
        stats.count(seen.drafted, seen.kept)
        step = stats.seconds()[0].get(1)
        if step is not None:
            gain = 1 + sum(seen.kept) / len(seen.kept) - (seen.target_seconds + seen.draft_seconds) / step
            stats.allowance = min(CREDIT, stats.allowance + gain)


def draft_length_for(draft_tokens: DraftTokens, stats: AcceptanceStats, rows: int) -> DraftLength:
    """Return what `draft_tokens` asks for: a fixed number, or `auto` for `rows` texts at a time."""
    return AdaptiveDraftLength(stats, rows=rows) if draft_tokens == "auto" else FixedDraftLength(draft_tokens)


def check_draft_tokens(draft_tokens: DraftTokens) -> None:
    """Raise InputError for anything but `auto` and a number of at least 1."""
    whole = isinstance(draft_tokens, int) and not isinstance(draft_tokens, bool)
    if draft_tokens != "auto" and not (whole and int(draft_tokens) >= 1):
        raise InputError(f"draft_tokens is {draft_tokens!r}: give a number of at least 1, or auto")


def expected_tokens(acceptance: Sequence[float], count: int) -> float:
    """Return the tokens to expect of a round with `count` draft tokens.

    `acceptance[i]`: how often draft token i is kept when all before it are; tokens beyond the list are kept as often as
    its last one (2211.17192, equation 1 for one rate).
    """
    tokens = chance = 1.0
    for i in range(count):
        chance *= acceptance[min(i, len(acceptance) - 1)] if acceptance else 0.0
        tokens += chance
    return tokens


def best_length(
    target_seconds: Mapping[int, float], draft_seconds: Mapping[int, float], acceptance: Sequence[float], most: int
) -> int:
    """Return the number of draft tokens, 0 to `most`, with the most tokens per second; the smaller of equals.

    `target_seconds[n]`: one pass over n tokens (at least one entry). `draft_seconds[n]`: drafting n tokens. Seconds of
    other widths are interpolated.
    """
    drafting = {0: 0.0, **draft_seconds}

    def rate(count: int) -> float:
        seconds = seconds_at(target_seconds, count + 1) + (seconds_at(drafting, count) if count else 0.0)
        return expected_tokens(acceptance, count) / max(seconds, 1e-12)

    return max(range(most + 1), key=lambda count: (rate(count), -count))


def seconds_at(measured: Mapping[int, float], width: int) -> float:
    """Return the seconds at a width: linear between measured widths, and never falling beyond the last one."""
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


@dataclass
class _Pairs:
    """The statistics of one target, by draft model and by the name of another kind of draft."""

    models: MutableMapping[PreTrainedModel, AcceptanceStats] = field(default_factory=WeakKeyDictionary)
    others: dict[Hashable, AcceptanceStats] = field(default_factory=dict)


_PAIRS: WeakKeyDictionary[PreTrainedModel, _Pairs] = WeakKeyDictionary()


def acceptance_stats(target: PreTrainedModel, draft: PreTrainedModel | Hashable) -> AcceptanceStats:
    """Return what was measured of this target with this draft (a model, or the name of another kind of draft)."""
    pairs = _PAIRS.setdefault(target, _Pairs())
    if isinstance(draft, PreTrainedModel):
        return pairs.models.setdefault(draft, AcceptanceStats())
    return pairs.others.setdefault(draft, AcceptanceStats())
