"""Loss against the context given: the same tokens predicted with only the last few tokens in sight, and with all.

A model that remembers gains with every doubling; one whose state does nothing stays flat where its teacher falls. It
works for every model: a document is cut into parts of N tokens that overlap by half, and the second half of each
counts, so that a token sees N / 2 to N - 1 tokens (and the document's BOS, which opens every part).

Letters: N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from linearize.metrics.token_scores import View, score_batches
from linearize.training.data.documents import Document
from linearize.training.dataset_stage import padded

ENOUGH_TOKENS = (1500, 200)  # that count, for the largest context to be used: so many, or else so few


@dataclass(frozen=True, eq=False)
class ContextText:
    """Documents whose tokens from position `first` on are predicted with different contexts.

    `sizes`: the contexts, in tokens, none beyond `first`.
    """

    documents: tuple[Document, ...]
    sizes: tuple[int, ...]
    first: int
    bos: int | None

    @classmethod
    def choose(
        cls, documents: Sequence[Document], sizes: Sequence[int], *, length: int, tokens: int, bos: int | None
    ) -> ContextText | None:
        """Choose the first documents that are long enough, about `tokens` of them, cut to `length`, and the sizes that
        they can tell apart. None: too few tokens have even the smallest context behind them."""
        cut = [Document(d.tokens[:length], d.loss_mask[:length]) for d in documents]
        largest_first = sorted((size for size in sizes if size + 1 < length), reverse=True)
        for enough, first in product(ENOUGH_TOKENS, largest_first):
            chosen: list[Document] = []
            for document in cut:
                if len(document) > first and sum(map(len, chosen)) < tokens:
                    chosen.append(document)
            if sum(sum(document.loss_mask[first:]) for document in chosen) >= enough:
                return cls(tuple(chosen), tuple(sorted(size for size in sizes if size <= first)), first, bos)
        return None

    @property
    def token_documents(self) -> Tensor:
        """The document [N] of each token that counts, in the order of the losses."""
        counts = [sum(document.loss_mask[self.first :]) for document in self.documents]
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def losses(self, view: View, size: int | None, *, tokens: int) -> Tensor:
        """Loss [N] of each token that counts, with contexts of `size` tokens (None: whole documents).

        A part has a row to itself; about `tokens` tokens go through the model at once.
        """
        parts = list(self.parts(size))
        rows = max(1, tokens // max(map(len, parts)))
        batches = (padded(parts[start : start + rows], pad=0) for start in range(0, len(parts), rows))
        loss_N = score_batches(batches, {"model": view}).loss["model"]
        assert len(loss_N) == len(self.token_documents)
        return loss_N

    def parts(self, size: int | None) -> Iterator[Document]:
        """Each part that holds a token that counts; its loss mask says which do."""
        for document in self.documents:
            if size is None:
                yield self._part(document, 0, len(document), self.first)
                continue
            half = size // 2
            for middle in range(self.first - self.first % half, len(document), half):
                part = self._part(document, middle - half, middle + half, max(middle, self.first))
                if any(part.loss_mask):
                    yield part

    def _part(self, document: Document, start: int, stop: int, counts_from: int) -> Document:
        """Tokens start to stop, behind the document's BOS; those from `counts_from` on count."""
        tokens, mask = document.tokens[start:stop], document.loss_mask[start:stop]
        mask = [counts if start + i >= counts_from else 0 for i, counts in enumerate(mask)]
        if start and self.bos is not None and document.tokens[0] == self.bos:
            return Document([self.bos, *tokens], [0, *mask])
        return Document(tokens, mask)
