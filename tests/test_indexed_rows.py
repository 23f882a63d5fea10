"""Rows that are made when they are read are those that were once copied into tensors, whatever store the text is in."""

from __future__ import annotations

import itertools
import pickle
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from linearize.training.data import packing
from linearize.training.data.document_list import DocumentList
from linearize.training.data.documents import Document
from linearize.training.data.packing import IGNORED, batches, index_rows
from linearize.training.data.token_store import StoreFacts, TokenStore, store_writer

PAD = 7


def corpus(seed: int, count: int, longest: int, vocabulary: int = 300) -> list[Document]:
    """Documents of unequal odd lengths, some empty, some of whose tokens do not count."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        size = int(rng.integers(0, longest))
        documents.append(Document(rng.integers(0, vocabulary, size).tolist(), rng.integers(0, 2, size).tolist()))
    return documents


def copied(documents: Sequence[Document], length: int, keep_whole: bool, one_per_row: bool) -> tuple[Tensor, ...]:
    """The former way: every token copied to its place (input_ids, position_ids, labels, all `[N, T]`)."""
    lengths = np.array([len(document) for document in documents if len(document)], dtype=np.int64)
    cut = packing._one_per_row if one_per_row else packing._best_fit if keep_whole else packing._stream
    starts, sizes, targets, num_rows = cut(lengths, length)
    total = int(sizes.sum())
    tokens = np.fromiter(chain.from_iterable(d.tokens for d in documents), dtype=np.int64, count=total)
    counts = np.fromiter(chain.from_iterable(d.loss_mask for d in documents), dtype=bool, count=total)
    within = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source, target = np.repeat(starts, sizes) + within, np.repeat(targets, sizes) + within
    input_ids = np.full(num_rows * length, PAD, dtype=np.int64)
    labels = np.full(num_rows * length, IGNORED, dtype=np.int64)
    filled = np.bincount(target // length, minlength=num_rows)
    positions = (np.arange(length)[None] - filled[:, None]).reshape(-1)
    input_ids[target] = tokens[source]
    positions[target] = within
    labels[target] = np.where(counts[source] & (within > 0), tokens[source], IGNORED)
    return tuple(torch.from_numpy(flat.reshape(num_rows, length)) for flat in (input_ids, positions, labels))


def stored(documents: Sequence[Document], folder: Path, largest: int = 300) -> TokenStore:
    folder.mkdir(parents=True)
    with store_writer(folder, largest) as writer:
        for first in range(0, len(documents), 5):
            writer.add(documents[first : first + 5])
        writer.finish(StoreFacts())
    return TokenStore.open(folder)


@pytest.mark.parametrize(("keep_whole", "one_per_row"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("length", [2, 9, 13, 64])
def test_rows_are_those_that_were_copied(tmp_path: Path, length: int, keep_whole: bool, one_per_row: bool) -> None:
    documents = corpus(1, 57, 40)
    expected = copied(documents, length, keep_whole, one_per_row)
    halves = [documents[:22], documents[22:]]
    several = DocumentList.joined(
        [DocumentList.of(halves[0]), DocumentList.of(stored(halves[1], tmp_path / "half", 2**17))]
    )
    for source in (documents, DocumentList.of(stored(documents, tmp_path / "all")), several):
        rows = index_rows(source, length, pad_token_id=PAD, keep_whole=keep_whole, one_per_row=one_per_row)
        batch = rows.take(range(len(rows)))
        for name, tensor in zip(("input_ids", "position_ids", "labels"), expected, strict=True):
            assert torch.equal(batch[name], tensor), name
        order = [len(rows) - 1, 0, len(rows) // 2]
        assert torch.equal(rows.take(order)["labels"], expected[2][order])


def test_batches_of_ranks_and_resumed_ones_are_those_of_copied_rows(tmp_path: Path) -> None:
    documents = corpus(2, 40, 31)
    input_ids, positions, labels = copied(documents, 16, False, False)
    whole = packing.PackedRows(input_ids, positions, labels)
    rows = index_rows(DocumentList.of(stored(documents, tmp_path / "a")), 16, pad_token_id=PAD)

    def first(source: packing.BatchSource, **where: int) -> Iterator[Tensor]:
        return (batch["labels"] for batch in itertools.islice(batches(source, 6, 5, **where), 9))

    for where in ({}, {"start_step": 7}, {"start_step": 3, "rank": 1, "world_size": 3}):
        assert all(map(torch.equal, first(rows, **where), first(whole, **where)))
    part = rows.every(2, 5)
    assert torch.equal(part.in_memory().input_ids, input_ids[2::5]) and len(part) == len(input_ids[2::5])


def test_a_store_keeps_documents_as_they_are(tmp_path: Path) -> None:
    documents = corpus(3, 23, 50, vocabulary=2**18)
    store = stored(documents, tmp_path / "a", 2**18)
    assert list(store) == documents == list(TokenStore.of(documents)) and store.tokens.dtype == np.uint32
    assert store[-1] == documents[-1] and store[3:5] == documents[3:5]
    counted = [Document(document.tokens, [1] * len(document)) for document in documents]
    plain = stored(counted, tmp_path / "b", 2**18)
    assert plain.counts is None and list(plain) == counted and plain.digest != store.digest
    assert (plain.hashes == store.hashes).all() and (TokenStore.of(documents).hashes == store.hashes).all()
    small = stored([Document([5, 65535], [1, 1])], tmp_path / "c", 2**16 - 1)
    assert small.tokens.dtype == np.uint16 and small[0].tokens == [5, 65535]
    assert len(stored([], tmp_path / "d")) == 0
    with pytest.raises(AssertionError, match="vocabulary"):
        stored([Document([2**16], [1])], tmp_path / "e", 2**16 - 1)


def test_chosen_documents_and_their_digest(tmp_path: Path) -> None:
    documents = corpus(4, 19, 30)
    everything = DocumentList.of(stored(documents, tmp_path / "a"))
    chosen = everything.take(np.array([7, 2, 2, 18]))
    assert list(chosen) == [documents[i] for i in (7, 2, 2, 18)] and chosen[1:3][1] == documents[2]
    assert chosen.num_tokens == sum(len(documents[i]) for i in (7, 2, 2, 18))
    again = DocumentList.of(stored(documents, tmp_path / "b"))
    assert again.digest == everything.digest != chosen.digest
    assert again.take(np.array([2, 7, 2, 18])).digest != chosen.digest


def test_another_process_maps_the_files_itself(tmp_path: Path) -> None:
    documents = corpus(5, 300, 60)
    sent = pickle.dumps(index_rows(DocumentList.of(stored(documents, tmp_path / "a")), 24))
    stream = sum(map(len, documents))
    assert len(sent) < 60 * 300 + 24 * stream / 10  # an index of documents and segments, no tokens twice
    received = pickle.loads(sent)
    assert isinstance(received.documents.stores[0].tokens.base, np.memmap)
    assert torch.equal(received.take([3])["input_ids"], index_rows(documents, 24).take([3])["input_ids"])


def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    """Lists of numbers take 60 bytes a token; an index takes under one where documents are not tiny."""
    text = np.random.default_rng(0).integers(0, 300, 4001).tolist()
    documents = [Document(text[: 3001 + 11 * i], [1] * (3001 + 11 * i)) for i in range(80)]
    store = stored(documents * 4, tmp_path / "a")
    tokens, length = len(store.tokens), 512
    assert tokens > 1_000_000
    del documents
    tracemalloc.start()
    rows = index_rows(DocumentList.of(store), length)
    stream = batches(rows, 8, 0)
    for _ in range(20):
        next(stream)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.5 * tokens + 8 * length * 3 * 8 * 4, peak / tokens
