"""Documents divided into those to train on and those held out, which share none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from linearize.errors import InputError
from linearize.training.data.config import DataConfig
from linearize.training.data.document_list import DocumentList
from linearize.training.data.documents import Document
from linearize.training.data.text_lines import END_OF_TEXT


class Split(NamedTuple):
    """Documents to train on and documents held out."""

    train: DocumentList
    heldout: list[Document]
    num_duplicates: int
    """Documents left out because a held-out one is equal to them."""


def split(documents: Sequence[Document], config: DataConfig) -> Split:
    """Draw whole documents to hold out; copies of them are dropped from the rest.

    Depends on the documents, `seed`, `heldout` and `max_heldout_tokens` alone; both parts keep the documents' order.

    Raises:
        InputError: fewer than two documents, nothing left to train on, or less left than one sequence.
    """
    if len(documents) < 2:
        raise InputError(
            f"the data holds {len(documents)} document(s), at least 2 are needed to hold one out; "
            f"give a second file, or separate documents in a .txt file by a blank line or a line of {END_OF_TEXT}"
        )
    documents = DocumentList.of(documents)
    drawn = _draw(documents, config)
    train = documents.take(~np.isin(documents.hash_D, documents.hash_D[drawn]))
    _check_train(train, len(drawn), len(documents), config)
    return Split(train, [documents[index] for index in sorted(drawn)], len(documents) - len(train) - len(drawn))


def shortened(documents: Sequence[Document], max_tokens: int, length: int) -> list[Document]:
    """The first documents, at most `max_tokens` tokens in all (but a document of 2 at least), each of at most a row of
    `length` tokens, or of several where there are too few documents."""
    share = max_tokens // len(documents)
    size = max(2, min(length, max_tokens) if share < length else share // length * length)
    kept: list[Document] = []
    for document in documents:
        if kept and sum(map(len, kept)) + min(len(document), size) > max_tokens:
            break
        kept.append(document if len(document) <= size else Document(document.tokens[:size], document.loss_mask[:size]))
    return kept


def _draw(documents: DocumentList, config: DataConfig) -> list[int]:
    """Indices of the documents to hold out: different ones, at least one, within the bound on tokens."""
    quota = round(config.heldout * len(documents)) if config.heldout < 1 else int(config.heldout)
    drawn: list[int] = []
    seen: set[int] = set()
    num_tokens = 0
    for index in np.random.default_rng(config.seed).permutation(len(documents)):
        key = int(documents.hash_D[index])
        num_tokens += 0 if key in seen else int(documents.size_D[index])
        if drawn and (len(drawn) >= quota or num_tokens > config.max_heldout_tokens):
            break
        if key not in seen:
            seen.add(key)
            drawn.append(int(index))
    return drawn


def _check_train(train: DocumentList, num_heldout: int, num_documents: int, config: DataConfig) -> None:
    if not len(train):
        raise InputError(
            f"data.heldout={config.heldout} holds out {num_heldout} of {num_documents} documents and leaves none "
            "(besides copies) to train on; lower it or give more data"
        )
    num_tokens = train.num_tokens
    if num_tokens < config.length:
        raise InputError(
            f"the training text has {num_tokens} tokens, less than one sequence of data.length={config.length}; "
            "give more data or lower data.length"
        )
