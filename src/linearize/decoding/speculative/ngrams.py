"""Where the last few tokens of a text stood before."""

from __future__ import annotations

from collections.abc import Sequence


class NgramIndex:
    """The last place of every run of 1 to `longest` tokens in one text that grows."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._place: dict[tuple[int, ...], int] = {}  # run -> index of the token after it
        self._known = 0  # runs that end before this index are in

    def following(self, text: Sequence[int], count: int) -> list[int]:
        """`count` tokens that followed the longest run that the text ends with, going round where they reach the end.

        Empty: the last token is new.
        """
        self._add(text)
        for size in range(min(self._longest, len(text) - 1), 0, -1):
            place = self._place.get(tuple(text[-size:]))
            if place is not None:
                period = len(text) - place
                return [text[place + i % period] for i in range(count)]
        return []

    def _add(self, text: Sequence[int]) -> None:
        """Runs that end before the last token."""
        for end in range(max(self._known, 1), len(text)):
            for size in range(1, min(self._longest, end) + 1):
                self._place[tuple(text[end - size : end])] = end
        self._known = max(self._known, len(text))
