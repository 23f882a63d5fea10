"""Documents packed into rows of one length, and batches of those rows by step.

Shapes: N rows, T tokens a row (the packed length), B rows a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count

import numpy as np
import torch
from torch import Tensor

from linearize.errors import InputError
from linearize.training.data.documents import Document

IGNORED = -100  # transformers' label for "no loss here"

Batch = dict[str, Tensor]
_Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
_Parts = tuple[_Ints, _Ints, _Ints, int]  # start in the token stream, size, start in the rows, number of rows


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Packed rows, all `[N, T]` int64.

    `position_ids` restart at 0 where a document (or the next piece of a cut one) begins; padding is a document of its
    own at the end of a row. `labels` are `input_ids` not shifted, -100 on the first token of each document, on padding
    and where the document's own loss mask says so.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """Tokens a row, padding included."""
        return self.input_ids.shape[1]

    @property
    def num_targets(self) -> int:
        """Tokens whose next-token loss counts."""
        return int((self.labels != IGNORED).sum())

    def take(self, indices: Sequence[int] | Tensor) -> Batch:
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
    as a piece of its own); only the last row is padded. With `keep_whole` only documents longer than a row are cut:
    the pieces are placed best fit (largest first, into the fullest row that takes it), and rows end in padding.
    With `one_per_row` each piece has a row to itself: for models that do not keep documents of a row apart.

    Args:
        length: tokens a row, at least 2.
        pad_token_id: any valid id (EOS is usual): padding is invisible to documents and carries no loss.
    Raises:
        InputError: no token to pack, or a length below 2.
    """
    if length < 2:
        raise InputError(f"length {length}: a row needs at least 2 tokens to predict one from another")
    lengths = np.array([len(document) for document in documents if len(document)], dtype=np.int64)
    if not len(lengths):
        raise InputError("there are no documents to pack; give data that holds text")
    cut = _one_per_row if one_per_row else _best_fit if keep_whole else _stream
    parts = cut(lengths, length)
    return _assemble(documents, parts, length, pad_token_id)


def document_rows(
    documents: Sequence[Document], max_length: int, *, pad_token_id: int = 0, one_per_row: bool = False
) -> PackedRows:
    """Rows for evaluation: whole documents (those up to `max_length` tokens uncut), each counted exactly once."""
    longest = max((len(document) for document in documents), default=max_length)
    length = min(max_length, max(longest, 2))
    return pack(documents, length, pad_token_id=pad_token_id, keep_whole=True, one_per_row=one_per_row)


def batches(
    rows: PackedRows, batch_size: int, seed: int, *, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Batches without end, from step `start_step` on; step k is the same batch whether or not the run was broken.

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
    """The rows of the batch of one step, by number; `batches` says how they are drawn."""
    share = batch_size // world_size
    first = step * batch_size + rank * share
    return [int(epoch_order(num_rows, seed, i // num_rows)[i % num_rows]) for i in range(first, first + share)]


@lru_cache(maxsize=4)
def epoch_order(num_rows: int, seed: int, epoch: int) -> _Ints:
    """All rows in the order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _stream(lengths: _Ints, length: int) -> _Parts:
    """One stream of documents, cut at every multiple of `length`."""
    total = int(lengths.sum())
    starts = np.unique(np.concatenate([np.cumsum(lengths) - lengths, np.arange(0, total, length)]))
    sizes = np.diff(np.append(starts, total))
    return starts, sizes, starts, -(-total // length)


def _one_per_row(lengths: _Ints, length: int) -> _Parts:
    """Pieces of at most one row, each at the start of its own."""
    starts, sizes = _cut_long(lengths, length)
    return starts, sizes, np.arange(len(starts)) * length, len(starts)


def _best_fit(lengths: _Ints, length: int) -> _Parts:
    """Pieces of at most one row, largest first, each into the row with the least room that suffices."""
    starts, sizes = _cut_long(lengths, length)
    targets = np.empty_like(starts)
    rooms: list[list[int]] = [[] for _ in range(length + 1)]  # rooms[n]: the rows with n free tokens
    open_rooms = 0  # bit n is set where rooms[n] holds a row: the next fit is the lowest bit from the size up
    num_rows = 0
    for part in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[part])
        fits = open_rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = rooms[room].pop()
            if not rooms[room]:
                open_rooms &= ~(1 << room)
        else:
            room, row = length, num_rows
            num_rows += 1
        targets[part] = row * length + length - room
        rooms[room - size].append(row)
        open_rooms |= 1 << (room - size)
    return starts, sizes, targets, num_rows


def _cut_long(lengths: _Ints, length: int) -> tuple[_Ints, _Ints]:
    """Start in the token stream and size of each piece when every document is cut at its own multiples of `length`."""
    num_parts = -(-lengths // length)
    ends = np.repeat(np.cumsum(lengths), num_parts)
    nth = np.arange(num_parts.sum()) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    starts = ends - np.repeat(lengths, num_parts) + nth * length
    return starts, np.minimum(length, ends - starts)


def _assemble(documents: Sequence[Document], parts: _Parts, length: int, pad_token_id: int) -> PackedRows:
    """Copy every piece to its place."""
    starts, sizes, targets, num_rows = parts
    total = int(sizes.sum())
    tokens = np.fromiter(chain.from_iterable(d.tokens for d in documents), dtype=np.int64, count=total)
    counts = np.fromiter(chain.from_iterable(d.loss_mask for d in documents), dtype=bool, count=total)
    within = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source, target = np.repeat(starts, sizes) + within, np.repeat(targets, sizes) + within

    input_ids = np.full(num_rows * length, pad_token_id, dtype=np.int64)
    labels = np.full(num_rows * length, IGNORED, dtype=np.int64)
    filled = np.bincount(target // length, minlength=num_rows)
    positions = (np.arange(length)[None] - filled[:, None]).reshape(-1)  # right for padding; documents follow
    input_ids[target] = tokens[source]
    positions[target] = within
    labels[target] = np.where(counts[source] & (within > 0), tokens[source], IGNORED)
    return PackedRows(*(torch.from_numpy(flat.reshape(num_rows, length)) for flat in (input_ids, positions, labels)))
