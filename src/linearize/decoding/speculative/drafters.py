"""What guesses tokens: a model with a cache of its own, or the text itself (prompt lookup).

Letters: B batch, T tokens, K guessed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from linearize.decoding.speculative.graphed_model import reader_for
from linearize.decoding.speculative.logits_processing import ScoreRules
from linearize.decoding.speculative.ngrams import NgramIndex

Texts = Sequence[Sequence[int]]


class Drafter(Protocol):
    """Guesses the next tokens of a batch of texts, round by round."""

    @property
    def passes(self) -> int:
        """Forward passes so far."""

    @property
    def by_row(self) -> bool:
        """Whether rows may keep different numbers of guesses."""

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """What it guesses with."""

    @property
    def source(self) -> PreTrainedModel | Hashable:
        """What experience with it is kept under: a model, or a name."""

    def start(self, input_ids_BT: Tensor, mask_BT: Tensor | None, rules: ScoreRules) -> None:
        """The prompts, `[B, T]` behind padding on the left; `rules`: how the target's tokens are chosen."""

    def prepare(self, texts: Texts) -> None:
        """Read what it has not read of the texts (all tokens so far), so that a round costs only its guesses."""

    def propose(self, texts: Texts, count: int) -> tuple[Tensor, Tensor | None] | None:
        """`count` guesses after each text, `[B, K]`, and the distributions `[B, K, V]` that they were drawn from.

        No distributions: the guesses are certain. None: nothing to guess.
        """

    def accept(self, counts: Sequence[int]) -> None:
        """Row b keeps the first `counts[b]` guesses of the last proposal; one token of the target's follows them."""

    def select(self, rows: Sequence[int]) -> None:
        """Only these rows of the batch go on; to be called before `accept`."""


class ModelDrafter:
    """Guesses with a smaller model, one token at a time; its cache rolls back as the target's does."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises InputError for a model whose cache cannot roll back."""
        self.reader = reader_for(model, "draft")
        self._behind = self._proposed = 0  # of the last proposal: unread tokens before it, and its guesses

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return self.reader.passes

    @property
    def by_row(self) -> bool:
        """Whether rows may keep different numbers of guesses."""
        return self.reader.by_row

    @property
    def models(self) -> list[PreTrainedModel]:
        """The model."""
        return [self.reader.model]

    @property
    def source(self) -> PreTrainedModel:
        """The model."""
        return self.reader.model

    def start(self, input_ids_BT: Tensor, mask_BT: Tensor | None, rules: ScoreRules) -> None:
        """Nothing is read before it is to guess, which may be never."""
        self.rules = rules

    def prepare(self, texts: Texts) -> None:
        """Read all but the last tokens of the texts: at first, and after rounds without guesses."""
        if not self.reader.lengths:
            self.reader.read_prompt(*_rectangle([text[:-1] for text in texts], self.reader.model.device))
        behind = self._unread(texts)
        if behind > 2:
            unread = [text[-behind:-1] for text in texts]
            self.reader.read(torch.tensor(unread, device=self.reader.model.device), settled=True)
            self.reader.keep([behind - 1] * len(texts))

    def _unread(self, texts: Texts) -> int:
        """Tokens at the end of each text that the cache does not hold: as many in all rows."""
        return len(texts[0]) - self.reader.lengths[0]

    def propose(self, texts: Texts, count: int) -> tuple[Tensor, Tensor | None]:
        """Guesses `[B, K]` and, where tokens are drawn, their distributions `[B, K, V]`."""
        self.prepare(texts)
        self._behind, self._proposed = self._unread(texts), count
        tokens_BT = torch.tensor([text[-self._behind :] for text in texts], device=self.reader.model.device)
        guesses: list[Tensor] = []
        drawn_from: list[Tensor] = []
        for _ in range(count):
            scores_BV = self._scores(self.reader.read(tokens_BT)[:, -1:], texts, guesses)
            tokens_BT, q_BV = self.rules.choose(scores_BV)
            guesses.append(tokens_BT)
            drawn_from += [] if q_BV is None else [q_BV]
        return torch.cat(guesses, dim=1), torch.stack(drawn_from, dim=1) if drawn_from else None

    def _scores(self, logits_B1V: Tensor, texts: Texts, guesses: Sequence[Tensor]) -> Tensor:
        """Scores after the texts and the guesses so far, `[B, V]`; V is the target's (padding may differ)."""
        logits_B1V = pad(logits_B1V, (0, self.rules.vocabulary - logits_B1V.shape[-1]), value=-torch.inf)
        if guesses and not self.rules.text_free:
            told: list[list[int]] = torch.cat(list(guesses), dim=1).tolist()
            texts = [[*text, *more] for text, more in zip(texts, told, strict=True)]
        return self.rules.scores(logits_B1V, texts, [[]] * len(texts))[:, 0]

    def accept(self, counts: Sequence[int]) -> None:
        """Keep what was read of the texts as they are now.

        The last guess was not read, so a row that keeps them all is two tokens behind, any other one. Rows of a batch
        stay equally far behind: then the next step is one rectangle.
        """
        behind = max(1 if count < self._proposed else 2 for count in counts)
        self.reader.keep([count + 1 + self._behind - behind for count in counts])

    def select(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""
        if self.reader.lengths:
            self.reader.select(rows)


def _rectangle(texts: Texts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask, `[B, T]`, with padding on the left."""
    width = max(map(len, texts))
    ids = [[0] * (width - len(text)) + list(text) for text in texts]
    mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class LookupDrafter:
    """Guesses that the text goes on as it did after the last place that ended in the same few tokens."""

    passes = 0
    by_row = True
    models: Sequence[PreTrainedModel] = ()

    def __init__(self, longest: int = 3) -> None:
        """`longest`: the most tokens that are compared."""
        self._longest = longest
        self._index: list[NgramIndex] = []

    @property
    def source(self) -> tuple[str, int]:
        """Lookup of runs so long."""
        return "lookup", self._longest

    def start(self, input_ids_BT: Tensor, mask_BT: Tensor | None, rules: ScoreRules) -> None:
        """An index per row."""
        self._device = input_ids_BT.device
        self._index = [NgramIndex(self._longest) for _ in range(input_ids_BT.shape[0])]

    def prepare(self, texts: Texts) -> None:
        """Nothing to read."""

    def propose(self, texts: Texts, count: int) -> tuple[Tensor, None] | None:
        """Guesses `[B, K]`; rows that repeat nothing guess their last token. None: no row repeats anything."""
        found = [index.following(text, count) for index, text in zip(self._index, texts, strict=True)]
        if not any(found):
            return None
        filled = [guess or [text[-1]] * count for guess, text in zip(found, texts, strict=True)]
        return torch.tensor(filled, device=self._device), None

    def accept(self, counts: Sequence[int]) -> None:
        """Nothing is kept of guesses."""

    def select(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""
        self._index = [self._index[row] for row in rows]
