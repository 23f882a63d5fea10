"""Text for training and evaluation: from data SPECs to documents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.phases import phase
from linearize.storage.files import expand_home
from linearize.training.data.config import DataConfig
from linearize.training.data.document_list import DocumentList
from linearize.training.data.documents import Document, check_answer_only, end_token, tokenized
from linearize.training.data.files import EXTENSIONS, is_txt
from linearize.training.data.packing import Batch, PackedRows, batches, document_rows, pack
from linearize.training.data.row_fields import RowNotes
from linearize.training.data.sources import is_cut_at_blank_lines, iterate_examples
from linearize.training.data.specs import PSEUDO, DataSource, data_source
from linearize.training.data.split import Split, shortened, split
from linearize.training.data.text_lines import END_OF_TEXT
from linearize.training.data.token_cache import cached_store
from linearize.training.data.token_store import StoreFacts, TokenStore

__all__ = [
    "PSEUDO",
    "Batch",
    "DataConfig",
    "Document",
    "PackedRows",
    "Split",
    "batches",
    "document_rows",
    "load_documents",
    "local_spec",
    "pack",
    "shortened",
    "split",
]

LOG = logging.getLogger("linearize")
SHORT = 8
"""Documents with a median below this part of a row are much shorter than a row."""


def load_documents(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sample: Callable[[], list[Document]] | None = None,
    answer: Callable[[str], list[Document]] | None = None,
    answer_only: bool = False,
    whole_files: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = LOG.info,
) -> DocumentList:
    """The documents of all data SPECs, in order; each is read when it is asked for.

    Args:
        specs: files or Hub datasets (see `specs`), `self`, or `pseudo:` before a file or a name.
        sample: writes the documents of `self` (see `sampling.self_sampler`).
        answer: answers the prompts of what follows `pseudo:` (see `pseudo_labels.pseudo_labeller`).
        answer_only: the loss mask holds only answers, where rows have prompt and answer.
        whole_files: blank lines separate no documents of a `.txt` file.
        cache: the folder that keeps tokenized text (see `token_cache`); None: it is in memory, as arrays.
        say: gets a line for each file or dataset: the number and lengths of its documents, and whether it was kept.
    Raises:
        InputError: a tokenizer without EOS, or a SPEC that cannot be used.
    """
    end_token(tokenizer)
    specs = [specs] if isinstance(specs, str) else specs
    if not specs:
        raise InputError(f"no data given: name a file ({', '.join(EXTENSIONS)}), a Hub dataset, or self")
    lists: list[DocumentList] = []
    for spec in map(local_spec, specs):
        if (spec == "self" and sample is None) or (spec.startswith(PSEUDO) and answer is None):
            raise InputError(f"data {spec!r}: this command has no teacher to sample text from; give a file instead")
        if not spec.removeprefix(PSEUDO).strip():
            raise InputError(f"data {spec!r}: names nothing; give a file or Hub dataset, after {PSEUDO} one of prompts")
        if spec == "self" and sample is not None:
            lists.append(DocumentList.of(sample(), spec))
        elif spec.startswith(PSEUDO) and answer is not None:
            lists.append(DocumentList.of(answer(spec.removeprefix(PSEUDO)), spec))
        else:
            source = data_source(spec, whole=whole_files)
            check_answer_only(tokenizer, answer_only)
            if cache is None:
                store, kept = _store_in_memory(source, tokenizer, answer_only), ""
            else:
                store, was_kept = cached_store(source, tokenizer, answer_only=answer_only, cache=cache)
                kept = f", tokenized before ({store.folder})" if was_kept else ""
            for note in store.facts.notes:
                LOG.warning("data %r: %s", spec, note)
            lists.append(DocumentList.of(store, spec))
            say(f"data {spec!r}: {_sizes(lists[-1])}{_separated(source, tokenizer)}{kept}")
    return DocumentList.joined(lists)


def local_spec(spec: str) -> str:
    """A data SPEC with the home folder in the place of a leading `~` of its path."""
    path = spec.removeprefix(PSEUDO)
    return spec[: len(spec) - len(path)] + expand_home(path)


def short_documents(documents: DocumentList, length: int) -> list[str]:
    """A line for each source whose text blank lines cut into documents much shorter than rows of `length` tokens."""
    lines = []
    for number, (store, name) in enumerate(zip(documents.stores, documents.names, strict=True)):
        sizes = documents.size_D[documents.store_D == number]
        if store.facts.cut_at_blank_lines and len(sizes) > 1 and np.median(sizes) * SHORT < length:
            lines.append(
                f"data {name!r}: blank lines cut it into {len(sizes):,} documents of {round(np.median(sizes)):,} "
                f"tokens (median), and no token sees another document, though a row (data.length) has {length:,}: if "
                f"they are paragraphs of one text, write '{name}:whole' or set data.whole_files=true"
            )
    return lines


def _store_in_memory(source: DataSource, tokenizer: PreTrainedTokenizerBase, answer_only: bool) -> TokenStore:
    """The tokens of a data source, of which nothing is kept."""
    notes = RowNotes()
    with phase(f"tokenizing {source.spec}"):
        examples = iterate_examples(source, tokenizer, notes, answer_only=answer_only)
        store = TokenStore.of(chain.from_iterable(tokenized(examples, tokenizer, answer_only=answer_only)))
    facts = StoreFacts(cut_at_blank_lines=is_cut_at_blank_lines(source, tokenizer), notes=notes.lines())
    return replace(store, facts=facts)


def _sizes(documents: DocumentList) -> str:
    sizes = documents.size_D
    if len(sizes) == 1:
        return f"1 document of {sizes[0]:,} tokens"
    return f"{len(sizes):,} documents of {sizes.min():,} to {sizes.max():,} tokens, median {round(np.median(sizes)):,}"


def _separated(source: DataSource, tokenizer: PreTrainedTokenizerBase) -> str:
    """What separates the documents of a text file."""
    if not any(map(is_txt, source.files)):
        return ""
    ends = " or ".join(dict.fromkeys((END_OF_TEXT, str(tokenizer.eos_token))))
    return f" (split at lines of {ends}{'' if source.whole else ', else at blank lines'})"
