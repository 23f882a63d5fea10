"""Loss against the context given: the same tokens predicted with only the last few tokens in sight, and with all.

A model that remembers gains with every doubling; one whose state does nothing stays flat where its teacher falls. It
works for every model: a document is cut into pieces of N tokens that overlap by half, and the second half of each
counts, so that a token sees N / 2 to N - 1 tokens (and the document's BOS, which opens every piece).

Letters: R rows, T tokens a row, N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from linearize.metrics.token_scores import Batch, View, score_batches
from linearize.training.data.documents import Document
from linearize.training.data.packing import IGNORED

ENOUGH_TOKENS = (1500, 200)  # that count, for the largest context to be used: so many, or else so few


@dataclass(frozen=True, eq=False)
class ContextText:
    """Documents whose tokens from position `first` on are predicted with different contexts.

    `sizes`: the contexts, in tokens, none beyond `first`; `length`: tokens a row. `documents`: at most `length` tokens.
    `one_per_row`: whether each piece has a row to itself.
    """

    documents: tuple[Document, ...]
    sizes: tuple[int, ...]
    first: int
    length: int
    bos: int | None
    one_per_row: bool = False

    @classmethod
    def choose(
        cls,
        documents: Sequence[Document],
        sizes: Sequence[int],
        *,
        length: int,
        tokens: int,
        bos: int | None,
        one_per_row: bool = False,
    ) -> ContextText | None:
        """The first documents that are long enough, about `tokens` of them, and the sizes that they can tell apart.

        None: too few tokens have even the smallest context behind them.
        """
        cut = [Document(d.tokens[:length], d.loss_mask[:length]) for d in documents]
        largest_first = sorted((size for size in sizes if size + 1 < length), reverse=True)
        for enough, first in product(ENOUGH_TOKENS, largest_first):
            chosen: list[Document] = []
            for document in cut:
                if len(document) > first and sum(map(len, chosen)) < tokens:
                    chosen.append(document)
            if sum(sum(document.loss_mask[first:]) for document in chosen) >= enough:
                return cls(
                    tuple(chosen), tuple(sorted(s for s in sizes if s <= first)), first, length, bos, one_per_row
                )
        return None

    @property
    def token_documents(self) -> Tensor:
        """The document [N] of each token that counts, in the order of the losses."""
        counts = [sum(document.loss_mask[self.first :]) for document in self.documents]
        return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))

    def losses(self, view: View, size: int | None, *, rows: int) -> Tensor:
        """The loss [N] of each token that counts, with contexts of `size` tokens (None: whole documents)."""
        scores = score_batches(self.batches(size, rows), {"model": view})
        loss_N = scores.loss["model"]
        assert len(loss_N) == len(self.token_documents)
        return loss_N

    def batches(self, size: int | None, rows: int) -> Iterator[Batch]:
        """The pieces in order, as packed rows `[R, T]`; labels only where a token counts."""
        made: list[tuple[list[int], list[int], list[int]]] = []
        row: tuple[list[int], list[int], list[int]] = ([], [], [])
        for ids, labels in self._pieces(size):
            if row[0] and (self.one_per_row or len(row[0]) + len(ids) > self.length + 1):
                made, row = [*made, row], ([], [], [])
            for filled, new in zip(row, (ids, labels, list(range(len(ids)))), strict=True):
                filled.extend(new)
        made.append(row)
        for start in range(0, len(made), rows):
            yield _padded(made[start : start + rows])

    def _pieces(self, size: int | None) -> Iterator[tuple[list[int], list[int]]]:
        """Tokens and labels of each piece that holds a token that counts."""
        for document in self.documents:
            if size is None:
                yield self._piece(document, 0, len(document), self.first)
                continue
            half = size // 2
            for middle in range(self.first - self.first % half, len(document), half):
                ids, labels = self._piece(document, middle - half, middle + half, max(middle, self.first))
                if any(label != IGNORED for label in labels):
                    yield ids, labels

    def _piece(self, document: Document, start: int, stop: int, counts_from: int) -> tuple[list[int], list[int]]:
        """Tokens start to stop, behind the document's BOS; labels from `counts_from` on."""
        stop = min(stop, len(document))
        ids = document.tokens[start:stop]
        labels = [
            document.tokens[i] if i >= counts_from and document.loss_mask[i] else IGNORED for i in range(start, stop)
        ]
        if start and self.bos is not None and document.tokens[0] == self.bos:
            return [self.bos, *ids], [IGNORED, *labels]
        return ids, labels


def _padded(rows: Sequence[tuple[list[int], list[int], list[int]]]) -> Batch:
    """A batch of rows of unequal lengths; padding is a document of its own."""
    longest = max(len(ids) for ids, _, _ in rows)
    filled = []
    for ids, labels, positions in rows:
        room = longest - len(ids)
        filled.append((ids + [0] * room, labels + [IGNORED] * room, positions + list(range(room))))
    ids_RT, labels_RT, positions_RT = (torch.tensor([row[i] for row in filled]) for i in range(3))
    return {"input_ids": ids_RT, "labels": labels_RT, "position_ids": positions_RT}
