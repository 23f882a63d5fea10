"""What was learned about a target and a draft: seconds, acceptance, and how much may still be lost on trying.

Kept between calls, per pair, as long as both models live.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

RECENT = 8  # timings of each width that count
FORGET = 0.95  # what an older round counts in the acceptance, per round
NEW_TEXT = 0.5  # what all that was accepted before counts when another text begins
ALLOWANCE = 2.5  # the most that guessing may lose before it proves itself, in steps of the target
CREDIT = 6.0  # what won before may be lost again, and as much is lost at most where guessing seems to pay and does not
SHARE = 0.0075  # and what it may lose after that, of each step
FRESH = 1.0  # the least that every new text allows


@dataclass
class Experience:
    """Of one target with one draft.

    `target`: seconds of a pass over so many tokens; `draft`: of guessing so many; the last few of each. `kept[i]`,
    `tried[i]`: rounds in which guess i stayed, and in which all before it did. `allowance`: steps of the target that
    guessing may still lose: filled by rounds that win, a little by every plain step, drained by rounds that lose.
    `rounds`: with guesses, so far. `rows`: of the batch that was timed.
    """

    target: dict[int, deque[float]] = field(default_factory=dict)
    draft: dict[int, deque[float]] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)
    tried: list[float] = field(default_factory=list)
    allowance: float = ALLOWANCE
    rounds: int = 0
    rows: int = 0

    def begin(self, rows: int) -> None:
        """Another text, or batch of them: what was accepted counts less, seconds only for as many rows."""
        self.kept, self.tried = ([NEW_TEXT * count for count in some] for some in (self.kept, self.tried))
        self.allowance = min(max(self.allowance, FRESH), ALLOWANCE)
        if rows != self.rows:
            self.target, self.draft, self.rows = {}, {}, rows

    def seconds(self) -> tuple[dict[int, float], dict[int, float]]:
        """Of the target by tokens, of the draft by guesses: the lower median, since disturbances only add."""
        target, draft = (
            {width: median_low(seen) for width, seen in some.items()} for some in (self.target, self.draft)
        )
        return target, draft

    def time(self, table: dict[int, deque[float]], width: int, seconds: float) -> None:
        """One more measurement."""
        table.setdefault(width, deque(maxlen=RECENT)).append(seconds)

    def count(self, drafted: int, kept: Sequence[int]) -> None:
        """A round's guesses: how many of them each row kept."""
        missing = drafted - len(self.kept)
        self.kept = [FORGET * count for count in self.kept] + [0.0] * missing
        self.tried = [FORGET * count for count in self.tried] + [0.0] * missing
        for i in range(drafted):
            self.tried[i] += sum(one >= i for one in kept)
            self.kept[i] += sum(one > i for one in kept)
        self.rounds += 1

    def acceptance(self, *, hopeful: bool = False) -> list[float]:
        """How often guess i stays where those before it did; what was seen, and one more round that went as guesses
        before it do (the first: half of the time), or, `hopeful`, that went well."""
        found, before = [], 0.5
        for kept, tried in zip(self.kept or [0.0], self.tried or [0.0], strict=True):
            before = (kept + (1.0 if hopeful else before)) / (tried + 1)
            found.append(before)
        return found


_known: WeakKeyDictionary[PreTrainedModel, _Drafts] = WeakKeyDictionary()


@dataclass
class _Drafts:
    models: MutableMapping[PreTrainedModel, Experience] = field(default_factory=WeakKeyDictionary)
    others: dict[Hashable, Experience] = field(default_factory=dict)


def remembered(target: PreTrainedModel, draft: PreTrainedModel | Hashable) -> Experience:
    """What was learned about this target with this draft (a model, or the name of another way to guess) so far."""
    drafts = _known.setdefault(target, _Drafts())
    if isinstance(draft, PreTrainedModel):
        return drafts.models.setdefault(draft, Experience())
    return drafts.others.setdefault(draft, Experience())
