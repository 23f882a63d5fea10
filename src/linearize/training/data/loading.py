"""Text for training and evaluation: from data SPECs to documents, and from documents to two sets that share none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.numbers import Count, Number, parse_number
from linearize.phases import phase
from linearize.storage.files import expand_home
from linearize.training.data.documents import Document, end_token, tokenize
from linearize.training.data.files import END_OF_TEXT, EXTENSIONS
from linearize.training.data.packing import Batch, PackedRows, batches, document_rows, pack
from linearize.training.data.sources import read_examples

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
    "split",
]

LOG = logging.getLogger("linearize")
PSEUDO = "pseudo:"


def _parse_heldout(value: object) -> float | int:
    number = parse_number(value)
    if number <= 0 or (number > 1 and not isinstance(number, int)):
        raise InputError(f"heldout {value!r}: give a fraction between 0 and 1, or a whole number of documents")
    return number


class DataConfig(BaseModel):
    """How text becomes training rows and a held-out set; the `data` part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    length: Annotated[Count, Field(ge=2)] = 1024
    """Tokens per packed sequence."""
    heldout: Annotated[float | int, BeforeValidator(_parse_heldout)] = 0.05
    """Documents never trained on: a fraction of all if below 1, else their number."""
    max_heldout_tokens: Annotated[Count, Field(ge=1)] = 65536
    """No further document is held out once the next one would pass this many tokens."""
    measured_tokens: Annotated[Count, Field(ge=2)] | None = None
    """Held-out tokens that a conversion measures before, during and after its stages, at most; none: so many that this
    takes little of the time (see `conversion.text.measured_tokens`)."""
    seed: int = Field(default=0, ge=0)
    """Draws the held-out documents; nothing else that training uses."""
    keep_whole: bool = False
    """Training rows cut no document that fits into one; costs padding (see `pack`). Held-out rows always do so."""
    answer_only: bool = False
    """Next-token loss on the answers alone, where rows have prompt and answer; else on all text."""
    self_tokens: Annotated[Count, Field(ge=1)] = 1_000_000
    """Tokens to sample from the teacher for the data SPEC `self`."""
    self_temperature: Annotated[Number, Field(gt=0)] = 1.0
    """Sampling temperature of that text."""
    self_seed: int = Field(default=0, ge=0)
    """Seed of that text."""
    self_prompt: str | None = None
    """How each text begins; none: BOS alone."""
    self_batch: Annotated[Count, Field(ge=1)] = 64
    """Texts sampled at a time; part of what the seed reproduces."""
    self_max_new_tokens: Annotated[Count, Field(ge=1)] | None = None
    """The longest text; none: `length`. Never beyond the teacher's context."""
    pseudo_temperature: Annotated[Number, Field(ge=0)] = 1.0
    """Sampling temperature of the teacher's answers to `pseudo:PATH`; 0: greedy."""
    pseudo_max_new_tokens: Annotated[Count, Field(ge=1)] = 512
    """The longest answer. Never beyond the teacher's context."""
    pseudo_seed: int = Field(default=0, ge=0)
    """Seed of the answers."""
    pseudo_batch: Annotated[Count, Field(ge=1)] = 16
    """Prompts answered at a time; with sampling part of what the seed reproduces."""


class Split(NamedTuple):
    """Documents to train on and documents held out."""

    train: list[Document]
    heldout: list[Document]
    num_duplicates: int
    """Documents left out because a held-out one is equal to them."""


def load_documents(
    specs: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sample: Callable[[], list[Document]] | None = None,
    answer: Callable[[str], list[Document]] | None = None,
    answer_only: bool = False,
    say: Callable[[str], None] = LOG.info,
) -> list[Document]:
    """The documents of all data SPECs, in order.

    Args:
        specs: files (see `data_files`), Hub dataset names, `self`, or `pseudo:` before a file or a name.
        sample: writes the documents of `self` (see `sampling.self_sampler`).
        answer: answers the prompts of what follows `pseudo:` (see `pseudo_labels.pseudo_labeller`).
        answer_only: the loss mask holds only answers, where rows have prompt and answer.
        say: gets a line for each file or dataset: the number and lengths of its documents.
    Raises:
        InputError: a tokenizer without EOS, or a SPEC that cannot be used.
    """
    end_token(tokenizer)
    specs = [specs] if isinstance(specs, str) else specs
    if not specs:
        raise InputError(f"no data given: name a file ({', '.join(EXTENSIONS)}), a Hub dataset, or self")
    documents: list[Document] = []
    for spec in map(local_spec, specs):
        if (spec == "self" and sample is None) or (spec.startswith(PSEUDO) and answer is None):
            raise InputError(f"data {spec!r}: this command has no teacher to sample text from; give a file instead")
        if not spec.removeprefix(PSEUDO).strip():
            raise InputError(f"data {spec!r}: names nothing; give a file or Hub dataset, after {PSEUDO} one of prompts")
        if spec == "self" and sample is not None:
            documents += sample()
        elif spec.startswith(PSEUDO) and answer is not None:
            documents += answer(spec.removeprefix(PSEUDO))
        else:
            with phase(f"reading {spec}"):
                examples = read_examples(spec, tokenizer, answer_only=answer_only)
            read = tokenize(examples, tokenizer, answer_only=answer_only)
            say(f"data {spec!r}: {_sizes(read)}{_separated(spec, tokenizer)}")
            documents += read
    return documents


def local_spec(spec: str) -> str:
    """A data SPEC with the home folder in the place of a leading `~` of its path."""
    path = spec.removeprefix(PSEUDO)
    return spec[: len(spec) - len(path)] + expand_home(path)


def _sizes(documents: Sequence[Document]) -> str:
    sizes = sorted(map(len, documents))
    if len(sizes) == 1:
        return f"1 document of {sizes[0]:,} tokens"
    return f"{len(sizes):,} documents of {sizes[0]:,} to {sizes[-1]:,} tokens, median {round(median(sizes)):,}"


def _separated(spec: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What separates the documents of a text file."""
    if ".txt" not in [suffix.lower() for suffix in Path(spec).suffixes[-2:]]:
        return ""
    ends = " or ".join(dict.fromkeys((END_OF_TEXT, str(tokenizer.eos_token))))
    return f" (split at lines of {ends}, else at blank lines)"


def split(documents: Sequence[Document], config: DataConfig) -> Split:
    """Draw whole documents to hold out; copies of them are dropped from the rest.

    Depends on the documents, `seed`, `heldout` and `max_heldout_tokens` alone; both parts keep the documents' order.

    Raises:
        InputError: fewer than two documents, nothing left to train on, or less left than one sequence.
    """
    if len(documents) < 2:
        raise InputError(
            f"the data holds {len(documents)} document(s), at least 2 are needed to hold one out; "
            f"in a .txt file blank lines, or lines of {END_OF_TEXT}, separate documents"
        )
    drawn = _draw(documents, config)
    keys = {tuple(documents[index].tokens) for index in drawn}
    train = [document for document in documents if tuple(document.tokens) not in keys]
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


def _draw(documents: Sequence[Document], config: DataConfig) -> list[int]:
    """Indices of the documents to hold out: different ones, at least one, within the bound on tokens."""
    quota = round(config.heldout * len(documents)) if config.heldout < 1 else int(config.heldout)
    drawn: list[int] = []
    seen: set[tuple[int, ...]] = set()
    num_tokens = 0
    for index in np.random.default_rng(config.seed).permutation(len(documents)).tolist():
        key = tuple(documents[index].tokens)
        num_tokens += 0 if key in seen else len(key)
        if drawn and (len(drawn) >= quota or num_tokens > config.max_heldout_tokens):
            break
        if key not in seen:
            seen.add(key)
            drawn.append(index)
    return drawn


def _check_train(train: Sequence[Document], num_heldout: int, num_documents: int, config: DataConfig) -> None:
    if not train:
        raise InputError(
            f"data.heldout={config.heldout} holds out {num_heldout} of {num_documents} documents and leaves none "
            "(besides copies) to train on; lower it or give more data"
        )
    num_tokens = sum(map(len, train))
    if num_tokens < config.length:
        raise InputError(
            f"the training text has {num_tokens} tokens, less than one sequence of data.length={config.length}; "
            "give more data or lower data.length"
        )
