"""Packing keeps documents apart and loses nothing; batches are the same whether or not a run was interrupted."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from linearize.errors import InputError
from linearize.training.data.loading import Document, PackedRows, batches, document_rows, pack

PAD = 999_999


def _documents(lengths: list[int]) -> list[Document]:
    """Documents whose tokens are all different, so that each can be found again."""
    stream = iter(range(1, sum(lengths) + 1))
    documents = []
    for length in lengths:
        tokens = list(itertools.islice(stream, length))
        documents.append(Document(tokens, [int(token % 5 != 0) for token in tokens]))
    return documents


LENGTHS = [3, 7, 1, 12, 40, 5, 0, 11, 2, 29, 8, 8, 13]


def _segments(rows: PackedRows) -> list[tuple[list[int], list[int]]]:
    """The (tokens, labels) of each stretch of positions 0, 1, 2, ... found by the positions alone."""
    results: list[tuple[list[int], list[int]]] = []
    for ids, positions, labels in zip(
        rows.input_ids.tolist(), rows.position_ids.tolist(), rows.labels.tolist(), strict=True
    ):
        assert positions[0] == 0
        for token, position, label in zip(ids, positions, labels, strict=True):
            if position == 0:
                results.append(([], []))
            assert position == len(results[-1][0])
            results[-1][0].append(token)
            results[-1][1].append(label)
    return results


@pytest.mark.parametrize("keep_whole", [False, True])
@pytest.mark.parametrize("length", [2, 9, 13, 64, 200])
def test_every_token_once_in_order_within_its_document(length: int, keep_whole: bool) -> None:
    documents = _documents(LENGTHS)
    rows = pack(documents, length, pad_token_id=PAD, keep_whole=keep_whole)
    owner = {token: i for i, document in enumerate(documents) for token in document.tokens}
    segments = [segment for segment in _segments(rows) if segment[0][0] != PAD]
    for tokens, _ in segments:
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        assert len({owner[token] for token in tokens}) == 1
    assert sorted(token for tokens, _ in segments for token in tokens) == sorted(owner)


@pytest.mark.parametrize("keep_whole", [False, True])
def test_labels_hold_what_counts_and_never_a_first_token(keep_whole: bool) -> None:
    documents = _documents(LENGTHS)
    counts = {t: m for document in documents for t, m in zip(document.tokens, document.loss_mask, strict=True)}
    rows = pack(documents, 13, pad_token_id=PAD, keep_whole=keep_whole)
    num_targets = 0
    for tokens, labels in _segments(rows):
        if tokens[0] == PAD:
            assert set(tokens) == {PAD} and set(labels) == {-100}
            continue
        expected = [-100, *(token if counts[token] else -100 for token in tokens[1:])]
        assert labels == expected
        num_targets += sum(label != -100 for label in labels)
    assert rows.num_targets == num_targets > 0


def test_by_default_only_the_last_row_is_padded() -> None:
    rows = pack(_documents(LENGTHS), 16, pad_token_id=PAD)
    assert len(rows) == -(-sum(LENGTHS) // 16)
    assert (rows.input_ids == PAD).sum(1).tolist() == [0] * (len(rows) - 1) + [len(rows) * 16 - sum(LENGTHS)]
    assert rows.input_ids[rows.input_ids != PAD].tolist() == list(range(1, sum(LENGTHS) + 1))


def test_keep_whole_cuts_only_what_is_longer_than_a_row() -> None:
    documents = _documents(LENGTHS)
    rows = pack(documents, 13, pad_token_id=PAD, keep_whole=True)
    segments = [tokens for tokens, _ in _segments(rows) if tokens[0] != PAD]
    for document in documents:
        expected = [document.tokens[i : i + 13] for i in range(0, len(document), 13)]
        assert all(segment in segments for segment in expected)
    assert len(segments) == sum(-(-n // 13) for n in LENGTHS)
    assert len(rows) <= 12  # 139 tokens need 11 rows of 13; best fit wastes at most one here


def test_best_fit_fills_rows_that_first_come_would_not() -> None:
    assert len(pack(_documents([2, 3, 15, 4, 16]), 20, keep_whole=True)) == 2
    assert len(pack(_documents([4, 6, 7, 3, 5, 5]), 10, keep_whole=True)) == 3


def test_rows_for_evaluation_are_no_longer_than_the_longest_document() -> None:
    rows = document_rows(_documents([5, 17, 3]), 512)
    assert rows.input_ids.shape == (2, 17)
    assert document_rows(_documents([5, 17, 3]), 11).length == 11
    batches_seen = list(rows.in_order(3))
    assert [batch["input_ids"].shape[0] for batch in batches_seen] == [2]
    seen = torch.cat([batch["input_ids"] for batch in document_rows(_documents(LENGTHS), 13).in_order(3)])
    assert sorted(seen[seen > 0].tolist()) == list(range(1, sum(LENGTHS) + 1))


def test_rows_are_int64_and_contiguous() -> None:
    batch = pack(_documents(LENGTHS), 13).take([2, 0])
    assert list(batch) == ["input_ids", "position_ids", "labels"]
    assert all(tensor.dtype == torch.int64 and tensor.shape == (2, 13) for tensor in batch.values())


def test_what_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="no documents"):
        pack(_documents([0, 0]), 8)
    with pytest.raises(InputError, match="at least 2"):
        pack(_documents([3]), 1)


def test_packing_millions_of_tokens_takes_seconds() -> None:
    lengths = np.random.default_rng(0).integers(20, 700, 3000).tolist()
    block = list(range(700))
    documents = [Document(block[:n], [1] * n) for n in lengths]
    for keep_whole in (False, True):
        start = time.perf_counter()
        pack(documents, 512, keep_whole=keep_whole)
        assert time.perf_counter() - start < 5


def _numbered(num_rows: int) -> PackedRows:
    ids = torch.arange(num_rows)[:, None].expand(-1, 3).contiguous()
    return PackedRows(ids, ids, ids)


def _row_numbers(rows: PackedRows, num_steps: int, batch_size: int, **where: int) -> list[list[int]]:
    stream = batches(rows, batch_size, 5, **where)
    return [batch["input_ids"][:, 0].tolist() for batch in itertools.islice(stream, num_steps)]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(11, 4), (3, 7), (6, 6)])
def test_every_epoch_holds_each_row_once_in_a_new_order(num_rows: int, batch_size: int) -> None:
    rows = _numbered(num_rows)
    flat = list(itertools.chain.from_iterable(_row_numbers(rows, 5 * num_rows, batch_size)))
    epochs = [flat[i : i + num_rows] for i in range(0, 5 * num_rows, num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert epochs[0] != list(range(num_rows)) or epochs[1] != list(range(num_rows))


@pytest.mark.parametrize("step", [1, 2, 7, 1_000_003])
def test_a_broken_run_continues_with_the_same_batches(step: int) -> None:
    rows = _numbered(11)
    if step < 100:
        assert _row_numbers(rows, 9, 4, start_step=step) == _row_numbers(rows, 9 + step, 4)[step:]
    assert _row_numbers(rows, 3, 4, start_step=step)[2] == _row_numbers(rows, 1, 4, start_step=step + 2)[0]


def test_ranks_share_the_batch_of_a_single_process() -> None:
    rows = _numbered(13)
    whole = _row_numbers(rows, 8, 6, start_step=3)
    parts = [_row_numbers(rows, 8, 6, start_step=3, rank=rank, world_size=3) for rank in range(3)]
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole


def test_seeds_give_other_orders_and_bad_sizes_fail_at_once() -> None:
    rows = _numbered(17)
    first, second = (next(batches(rows, 8, seed))["input_ids"].tolist() for seed in (1, 2))
    assert first != second
    with pytest.raises(InputError, match="multiple of 4"):
        batches(rows, 6, 0, world_size=4)
    with pytest.raises(InputError, match="batch of 0"):
        batches(rows, 0, 0)
