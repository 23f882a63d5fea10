"""The texts of a batch while they grow: what each row keeps of a round, and which rows have ended."""

from __future__ import annotations

from collections.abc import Sequence


class Rows:
    """The rows that still go on (`texts`: all their tokens, no padding) and the new tokens of all rows (`new`)."""

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_tokens: frozenset[int]) -> None:
        self.texts: list[list[int]] = [list(prompt) for prompt in prompts]
        self.new: list[list[int]] = [[] for _ in prompts]
        self._rows = list(range(len(prompts)))  # which row of the batch each text is
        self._most, self._stop = max_new_tokens, stop_tokens
        self._ended = [False] * len(self.texts)

    @property
    def room(self) -> int:
        """The most tokens that any row may still get."""
        return self._most - min(len(self.new[row]) for row in self._rows)

    def extend(
        self, kept: Sequence[int], following: Sequence[int], guesses: Sequence[Sequence[int]], *, alike: bool
    ) -> tuple[list[list[int]], list[int]]:
        """Append kept guesses and the token after them; gives what each row got and how many guesses it kept.

        A row ends at a stop token or when it is full. `alike`: rows that go on keep as many guesses as the least of
        them; the next guess, which was kept too, is then the token after them, so that nothing of the target's
        distribution changes.
        """
        parts = zip(guesses, kept, following, strict=True)
        got = [self._cut(i, [*guess[:count], after]) for i, (guess, count, after) in enumerate(parts)]
        ends = [self._ends(i, new) for i, new in enumerate(got)]
        if alike and not all(ends):
            least = min(len(new) for new, end in zip(got, ends, strict=True) if not end)
            got = [new if end else new[:least] for new, end in zip(got, ends, strict=True)]
        for i, new in enumerate(got):
            self.texts[i] += new
            self.new[self._rows[i]] += new
        self._ended = ends
        stayed = [min(count, len(new) - (not end)) for count, new, end in zip(kept, got, ends, strict=True)]
        return got, stayed

    def _cut(self, row: int, tokens: list[int]) -> list[int]:
        """Nothing after a stop token, and no more than there is room for."""
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self._stop), len(tokens))
        return tokens[: min(stop, self._most - len(self.new[self._rows[row]]))]

    def _ends(self, row: int, tokens: list[int]) -> bool:
        """Whether a row ends with these new tokens."""
        return tokens[-1] in self._stop or len(self.new[self._rows[row]]) + len(tokens) >= self._most

    def drop_ended(self) -> list[int]:
        """Go on with the rows that have not ended; gives their places among those that went on before."""
        going = [i for i in range(len(self.texts)) if not self._ended[i]]
        self.texts = [self.texts[i] for i in going]
        self._rows = [self._rows[i] for i in going]
        return going
