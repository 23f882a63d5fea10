"""Where draft tokens come from: a smaller model with a cache of its own, or the text itself (prompt lookup).

Letters: B batch, T tokens, K draft tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.decoding.speculative.graphed_model import cached_model_for
from linearize.decoding.speculative.logits_processing import LogitsProcessing, vocabulary_size
from linearize.errors import InputError

Texts = Sequence[Sequence[int]]


class Drafter(Protocol):
    """Drafts the next tokens of a batch of texts, round by round."""

    @property
    def passes(self) -> int:
        """Forward passes so far."""

    @property
    def by_row(self) -> bool:
        """Whether rows may keep different numbers of draft tokens."""

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """The models that it runs."""

    @property
    def source(self) -> PreTrainedModel | Hashable:
        """What its acceptance statistics are kept under: a model, or a name."""

    def start(self, input_ids_BT: Tensor, mask_BT: Tensor | None, processing: LogitsProcessing) -> None:
        """Begin with prompts, `[B, T]` behind padding on the left; `processing`: how the target's tokens are chosen."""

    def prepare(self, texts: Texts) -> None:
        """Read the unread part of the texts (all tokens so far), so that a round costs only its draft tokens."""

    def propose(self, texts: Texts, count: int) -> tuple[Tensor, Tensor | None] | None:
        """Return `count` draft tokens after each text, `[B, K]`, and the distributions `[B, K, V]` they come from.

        No distributions: the draft is certain. None: there is nothing to propose.
        """

    def accept(self, counts: Sequence[int]) -> None:
        """Keep the first `counts[b]` tokens of row b's last proposal; one token of the target's follows them."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone; to be called before `accept`."""


class ModelDrafter:
    """Drafts with a smaller model, one token at a time; its cache rolls back as the target's does."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises InputError for a model whose cache cannot roll back."""
        self.draft = cached_model_for(model, "draft")
        self._behind = self._proposed = 0  # of the last proposal: unread tokens before it, and its draft tokens

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return self.draft.passes

    @property
    def by_row(self) -> bool:
        """Whether rows may keep different numbers of draft tokens."""
        return self.draft.by_row

    @property
    def models(self) -> list[PreTrainedModel]:
        """The model."""
        return [self.draft.model]

    @property
    def source(self) -> PreTrainedModel:
        """The model."""
        return self.draft.model

    def start(self, input_ids_BT: Tensor, mask_BT: Tensor | None, processing: LogitsProcessing) -> None:
        """Read nothing yet: a draft may never be asked."""
        self.processing = processing

    def prepare(self, texts: Texts) -> None:
        """Read all but the last tokens of the texts: at first, and after rounds without a draft."""
        if not self.draft.lengths:
            self.draft.read_prompt(*_padded([text[:-1] for text in texts], self.draft.model.device))
        behind = self._unread(texts)
        if behind > 2:
            unread = [text[-behind:-1] for text in texts]
            self.draft.read(torch.tensor(unread, device=self.draft.model.device), settled=True)
            self.draft.keep([behind - 1] * len(texts))

    def _unread(self, texts: Texts) -> int:
        """Return the number of tokens at the end of each text that the cache does not hold: the same in all rows."""
        return len(texts[0]) - self.draft.lengths[0]

    def propose(self, texts: Texts, count: int) -> tuple[Tensor, Tensor | None]:
        """Return draft tokens `[B, K]` and, where tokens are drawn, their distributions `[B, K, V]`."""
        self.prepare(texts)
        self._behind, self._proposed = self._unread(texts), count
        tokens_BT = torch.tensor([text[-self._behind :] for text in texts], device=self.draft.model.device)
        drafted: list[Tensor] = []
        drawn_from: list[Tensor] = []
        for _ in range(count):
            scores_BV = self._scores(self.draft.read(tokens_BT)[:, -1:], texts, drafted)
            tokens_BT, q_BV = self.processing.choose(scores_BV)
            drafted.append(tokens_BT)
            drawn_from += [] if q_BV is None else [q_BV]
        return torch.cat(drafted, dim=1), torch.stack(drawn_from, dim=1) if drawn_from else None

    def _scores(self, logits_B1V: Tensor, texts: Texts, drafted: Sequence[Tensor]) -> Tensor:
        """Return scores after the texts and the draft so far, `[B, V]`; V is the target's (padding may differ)."""
        logits_B1V = pad(logits_B1V, (0, self.processing.vocabulary - logits_B1V.shape[-1]), value=-torch.inf)
        if drafted and not self.processing.text_free:
            tokens: list[list[int]] = torch.cat(list(drafted), dim=1).tolist()
            texts = [[*text, *more] for text, more in zip(texts, tokens, strict=True)]
        return self.processing.scores(logits_B1V, texts, [[]] * len(texts))[:, 0]

    def accept(self, counts: Sequence[int]) -> None:
        """Keep what was read of the texts as they are now.

        The last draft token was not read, so a row that keeps all is two tokens behind, any other row one. All rows
        stay equally far behind: then the next step is one rectangle.
        """
        behind = max(1 if count < self._proposed else 2 for count in counts)
        self.draft.keep([count + 1 + self._behind - behind for count in counts])

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        if self.draft.lengths:
            self.draft.select(rows)


def _padded(texts: Texts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and mask, `[B, T]`, with padding on the left."""
    width = max(map(len, texts))
    ids = [[0] * (width - len(text)) + list(text) for text in texts]
    mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class LookupDrafter:
    """Drafts that the text goes on as it did after the last place that ended in the same few tokens."""

    passes = 0
    by_row = True
    models: Sequence[PreTrainedModel] = ()

    def __init__(self, longest: int = 3) -> None:
        """`longest`: the most tokens that are compared."""
        self._longest = longest
        self._index: list[NgramIndex] = []

    @property
    def source(self) -> tuple[str, int]:
        """The name of this kind of draft, and the length of its n-grams."""
        return "lookup", self._longest

    def start(self, input_ids_BT: Tensor, mask_BT: Tensor | None, processing: LogitsProcessing) -> None:
        """Make an index per row."""
        self._device = input_ids_BT.device
        self._index = [NgramIndex(self._longest) for _ in range(input_ids_BT.shape[0])]

    def prepare(self, texts: Texts) -> None:
        """Read nothing."""

    def propose(self, texts: Texts, count: int) -> tuple[Tensor, None] | None:
        """Return draft tokens `[B, K]`, a row without repetition drafting its last token; None if no row repeats."""
        drafts = [index.following(text, count) for index, text in zip(self._index, texts, strict=True)]
        if not any(drafts):
            return None
        filled = [draft or [text[-1]] * count for draft, text in zip(drafts, texts, strict=True)]
        return torch.tensor(filled, device=self._device), None

    def accept(self, counts: Sequence[int]) -> None:
        """Keep nothing: the texts hold what was accepted."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._index = [self._index[row] for row in rows]


class NgramIndex:
    """The last place of every n-gram of 1 to `longest` tokens in one text that grows."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._place: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after it
        self._known = 0  # n-grams that end before this index are in

    def following(self, text: Sequence[int], count: int) -> list[int]:
        """Return `count` tokens that followed the longest n-gram that the text ends with, repeated if they are fewer.

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
        """Add the n-grams that end before the last token."""
        for end in range(max(self._known, 1), len(text)):
            for size in range(1, min(self._longest, end) + 1):
                self._place[tuple(text[end - size : end])] = end
        self._known = max(self._known, len(text))


def check_vocabularies(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Raise InputError where the models have vocabularies of different sizes."""
    sizes = [vocabulary_size(model) for model in (target, draft)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the draft has a vocabulary of {sizes[1]} tokens and the target one of {sizes[0]}: draft tokens must be "
            "the target's own; take a draft made from it (recipe draft), or prompt lookup"
        )


def check_tokenizers(
    tokenizer: PreTrainedTokenizerBase, draft_tokenizer: PreTrainedTokenizerBase, path: str, draft: str
) -> None:
    """Raise InputError where two models split text into different tokens."""
    if tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise InputError(
            f"draft {draft}: its vocabulary is not that of {path}, so its tokens mean something else; take a draft "
            "made from it (recipe draft), or prompt lookup"
        )
