"""Documents packed into rows of one length, and batches of those rows by step.

Packing decides where in a row each segment of a document goes; the tokens are read when a row is.
Shapes: N rows, T tokens a row (the packed length), B rows a batch, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from linearize.errors import InputError
from linearize.training.data.document_list import DocumentList
from linearize.training.data.documents import Document

IGNORED = -100  # transformers' label for "no loss here"

Batch = dict[str, Tensor]
_Ints = NDArray[np.int64]
_Segments = tuple[_Ints, _Ints, _Ints, int]  # start in the token stream, size, start in the rows, number of rows


class BatchSource(Protocol):
    """Rows of one length, of which any can be read."""

    def __len__(self) -> int: ...

    @property
    def length(self) -> int:
        """Tokens per row, padding included."""
        ...

    def take(self, indices: Sequence[int]) -> Batch:
        """The batch of the rows with these numbers, `[B, T]` each."""
        ...


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Packed rows in memory, all `[N, T]` int64.

    `position_ids` restart at 0 where a document (or the next segment of a cut one) begins; padding is a document of its
    own at the end of a row. `labels` are `input_ids` not shifted, -100 on the first token of each document, on padding
    and where the document's own loss mask excludes it.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """Tokens per row, padding included."""
        return self.input_ids.shape[1]

    @property
    def num_targets(self) -> int:
        """Tokens whose next-token loss counts."""
        return int((self.labels != IGNORED).sum())

    def take(self, indices: Sequence[int]) -> Batch:
        """The batch of the rows with these numbers, `[B, T]` each."""
        index = torch.as_tensor(indices, dtype=torch.long)
        return {
            "input_ids": self.input_ids[index],
            "position_ids": self.position_ids[index],
            "labels": self.labels[index],
        }

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every row exactly once, for evaluation; the last batch may be smaller."""
        for first in range(0, len(self), batch_size):
            yield self.take(range(first, min(first + batch_size, len(self))))


@dataclass(frozen=True, eq=False, kw_only=True)
class IndexedRows:
    """Packed rows that are made when they are read; what they hold is as in `PackedRows`.

    The segments `[S]` are in the order of the rows: the document each is of, where it begins there, and its tokens. Row
    n has the segments from `first_N[n]` to `first_N[n + 1]`. `numbers`: which of all rows these are.
    """

    documents: DocumentList
    length: int
    pad_token_id: int
    document_S: NDArray[np.int64]
    offset_S: _Ints
    size_S: _Ints
    first_N: _Ints
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, indices: Sequence[int]) -> Batch:
        """The batch of the rows with these numbers, `[B, T]` each."""
        shape = (len(indices), self.length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        position_ids, labels = np.empty(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        for row, index in enumerate(indices):
            self._fill(self.numbers[index], input_ids[row], position_ids[row], labels[row])
        arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def every(self, part: int, parts: int) -> IndexedRows:
        """Every `parts`-th row, from row `part` on."""
        return replace(self, numbers=self.numbers[part::parts])

    def in_memory(self) -> PackedRows:
        """All rows, read."""
        batch = self.take(range(len(self)))
        return PackedRows(batch["input_ids"], batch["position_ids"], batch["labels"])

    def _fill(self, number: int, input_ids: _Ints, position_ids: _Ints, labels: _Ints) -> None:
        """Write one row."""
        documents, end = self.documents, 0
        for segment in range(self.first_N[number], self.first_N[number + 1]):
            document, size = self.document_S[segment], self.size_S[segment]
            store = documents.stores[documents.store_D[document]]
            source = documents.start_D[document] + self.offset_S[segment]
            tokens, start = store.tokens[source : source + size], end
            end = start + size
            input_ids[start:end] = tokens
            position_ids[start:end] = np.arange(size)
            labels[start + 1 : end] = tokens[1:]
            if store.counts is not None:
                labels[start:end][store.counts[source : source + size] == 0] = IGNORED
        position_ids[end:] = np.arange(self.length - end)


def index_rows(
    documents: Sequence[Document],
    length: int,
    *,
    pad_token_id: int = 0,
    keep_whole: bool = False,
    one_per_row: bool = False,
) -> IndexedRows:
    """As `pack`, with the rows left to be read."""
    if length < 2:
        raise InputError(f"length {length}: a row needs at least 2 tokens to predict one from another")
    documents = DocumentList.of(documents)
    documents = documents.take(documents.size_D > 0)
    if not len(documents):
        raise InputError("there are no documents to pack; give data that holds text")
    cut = _one_per_row if one_per_row else _best_fit if keep_whole else _stream
    starts, sizes, targets, num_rows = cut(documents.size_D, length)
    order = np.argsort(targets, kind="stable")
    starts, targets = starts[order], targets[order]
    ends = np.cumsum(documents.size_D)
    document = np.searchsorted(ends, starts, side="right")
    return IndexedRows(
        documents=documents, length=length, pad_token_id=pad_token_id, document_S=document,
        offset_S=starts - (ends - documents.size_D)[document], size_S=sizes[order], numbers=range(num_rows),
        first_N=np.searchsorted(targets, np.arange(num_rows + 1) * length),
    )  # fmt: skip


def pack(
    documents: Sequence[Document],
    length: int,
    *,
    pad_token_id: int = 0,
    keep_whole: bool = False,
    one_per_row: bool = False,
) -> PackedRows:
    """Pack documents into rows of `length` tokens; no token is lost, none is in two rows.

    By default the documents follow each other without a gap and are cut where a row ends (the rest opens the next row
    as a segment of its own); only the last row is padded. With `keep_whole` only documents longer than a row are cut:
    the segments are placed best fit (largest first, into the fullest row that takes it), and rows end in padding.
    With `one_per_row` each segment has a row to itself: for models that do not keep documents of a row apart.

    Args:
        length: tokens a row, at least 2.
        pad_token_id: any valid id (EOS is usual): padding is invisible to documents and carries no loss.
    Raises:
        InputError: no token to pack, or a length below 2.
    """
    return index_rows(
        documents, length, pad_token_id=pad_token_id, keep_whole=keep_whole, one_per_row=one_per_row
    ).in_memory()


def document_rows(
    documents: Sequence[Document], max_length: int, *, pad_token_id: int = 0, one_per_row: bool = False
) -> PackedRows:
    """Rows for evaluation: whole documents (those up to `max_length` tokens uncut), each counted exactly once."""
    longest = max((len(document) for document in documents), default=max_length)
    length = min(max_length, max(longest, 2))
    return pack(documents, length, pad_token_id=pad_token_id, keep_whole=True, one_per_row=one_per_row)


def batches(
    rows: BatchSource, batch_size: int, seed: int, *, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Batches without end, from step `start_step` on; step k is the same batch whether or not the run was interrupted.

    The rows are shuffled anew each epoch, by (seed, epoch); epochs follow each other without a gap, so no row is
    dropped and a batch may hold the end of one and the begin of the next. `batch_size` is over all ranks: each of
    them gets `batch_size / world_size` rows, and together they are the batch of a single process.

    Raises:
        InputError: a batch size that is not positive or not divisible by the number of ranks.
    """
    if batch_size < 1 or batch_size % world_size:
        raise InputError(f"batch of {batch_size} sequences on {world_size} processes: use a multiple of {world_size}")
    assert 0 <= rank < world_size
    return (rows.take(step_rows(len(rows), batch_size, seed, step, rank, world_size)) for step in count(start_step))


def step_rows(num_rows: int, batch_size: int, seed: int, step: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """The rows of the batch of one step, by number, drawn as `batches` describes."""
    share = batch_size // world_size
    first = step * batch_size + rank * share
    return [int(epoch_order(num_rows, seed, i // num_rows)[i % num_rows]) for i in range(first, first + share)]


@lru_cache(maxsize=4)
def epoch_order(num_rows: int, seed: int, epoch: int) -> _Ints:
    """All rows in the order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _stream(lengths: _Ints, length: int) -> _Segments:
    """One stream of documents, cut at every multiple of `length`."""
    total = int(lengths.sum())
    starts = np.unique(np.concatenate([np.cumsum(lengths) - lengths, np.arange(0, total, length)]))
    sizes = np.diff(np.append(starts, total))
    return starts, sizes, starts, -(-total // length)


def _one_per_row(lengths: _Ints, length: int) -> _Segments:
    """Segments of at most one row, each at the start of its own."""
    starts, sizes = _cut_long(lengths, length)
    return starts, sizes, np.arange(len(starts)) * length, len(starts)


def _best_fit(lengths: _Ints, length: int) -> _Segments:
    """Segments of at most one row, largest first, each into the row with the least free space that suffices."""
    starts, sizes = _cut_long(lengths, length)
    targets = np.empty_like(starts)
    rows_by_free: list[list[int]] = [[] for _ in range(length + 1)]  # by number of free tokens
    free_bits = 0  # bit n: some row has n free tokens; the next fit is the lowest bit from the size up
    num_rows = 0
    for segment in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[segment])
        fits = free_bits >> size
        if fits:
            free = size + (fits & -fits).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_bits &= ~(1 << free)
        else:
            free, row = length, num_rows
            num_rows += 1
        targets[segment] = row * length + length - free
        rows_by_free[free - size].append(row)
        free_bits |= 1 << (free - size)
    return starts, sizes, targets, num_rows


def _cut_long(lengths: _Ints, length: int) -> tuple[_Ints, _Ints]:
    """Start in the token stream and size of each segment, every document cut at its own multiples of `length`."""
    num_segments = -(-lengths // length)
    ends = np.repeat(np.cumsum(lengths), num_segments)
    nth = np.arange(num_segments.sum()) - np.repeat(np.cumsum(num_segments) - num_segments, num_segments)
    starts = ends - np.repeat(lengths, num_segments) + nth * length
    return starts, np.minimum(length, ends - starts)
