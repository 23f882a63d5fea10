"""The text of an answer as its tokens come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 5  # tokens of the prompt


class TextStream:
    """Tokens in, text out. `ended`: a stop text came; what was put out ends before it.

    `before`: the prompt, of which the last tokens are decoded too: some tokenizers drop a space at the beginning.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stops = tokenizer, list(stops)
        self._tokens = list(before[-CONTEXT:])
        self._begin, self._done = 0, len(self._tokens)  # where decoding begins, and tokens whose text is out
        self._held = ""  # text that may be the beginning of a stop text
        self.ended = False

    def put(self, token: int) -> str:
        """The text that the token completes."""
        self._tokens.append(token)
        before = self._decode(self._begin, self._done)
        text = self._decode(self._begin, len(self._tokens))
        if text.endswith(INCOMPLETE) or len(text) <= len(before):
            return ""
        self._begin, self._done = self._done, len(self._tokens)
        return self._without_stop(text[len(before) :])

    def end(self) -> str:
        """What was held back: incomplete characters, and the beginning of a stop text that did not come."""
        if self.ended:
            return ""
        before = self._decode(self._begin, self._done)
        rest = self._decode(self._begin, len(self._tokens))[len(before) :]
        self._done = len(self._tokens)
        text = self._without_stop(rest)
        text, self._held = text + self._held, ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True))

    def _without_stop(self, new: str) -> str:
        text, self._held = self._held + new, ""
        cuts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if cuts:
            self.ended = True
            return text[: min(cuts)]
        for length in range(min(len(text), max(map(len, self._stops), default=1) - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                text, self._held = text[:-length], text[-length:]
                break
        return text
