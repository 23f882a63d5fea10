"""A document: the tokens of one text with its begin and end, and where its next-token loss counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.phases import phase

_TEXTS, _CHARACTERS = 2048, 2**21  # at most, per tokenizer call: enough for its threads, small enough for memory
_TRIED = 2000  # characters of a text


@dataclass(frozen=True, slots=True)
class Document:
    """One text as tokens; `loss_mask[i]` is 1 where predicting `tokens[i]` from its past counts."""

    tokens: list[int]
    loss_mask: list[int]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Example:
    """One text before tokenisation; `answers`: the character ranges of answers (None: no such structure)."""

    text: str
    answers: tuple[tuple[int, int], ...] | None = None


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document.

    Raises:
        InputError: the tokenizer has no EOS token.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        name = getattr(tokenizer, "name_or_path", "") or "this teacher"
        raise InputError(f"the tokenizer of {name} has no EOS token to end documents with; set its eos_token")
    return tokenizer.eos_token_id


def tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, answer_only: bool = False
) -> list[Document]:
    """Documents of the examples, in order: BOS where the tokenizer has one, the text, EOS.

    With `answer_only` the loss counts on the tokens of answers (and the EOS after one); texts without that structure
    count whole. A BOS or EOS that the text already holds (chat templates) is not added again.

    Raises:
        InputError: no EOS token, or `answer_only` with a tokenizer without character offsets.
    """
    documents = []
    with phase("tokenizing", sum(len(example.text) for example in examples), "characters") as advance:
        for part in tokenized(examples, tokenizer, answer_only=answer_only, advance=advance):
            documents += part
    return documents


def tokenized(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer_only: bool = False,
    advance: Callable[[int], None] = lambda characters: None,
) -> Iterator[list[Document]]:
    """As `tokenize`, a portion of the examples at a time; a fast tokenizer uses all cores for each."""
    end_token(tokenizer)
    check_answer_only(tokenizer, answer_only)
    fast = False
    for number, part in enumerate(_portions(examples)):
        fast = not answer_only and (fast if number else _is_plain(tokenizer, part))
        documents = []
        for example, tokens, offsets in (
            _encode_fast(part, tokenizer) if fast else _encode(part, tokenizer, answer_only)
        ):
            mask = _answer_mask(example, offsets) if answer_only else [1] * len(tokens)
            documents.append(_framed(tokens, mask, example, tokenizer, answer_only))
        yield documents
        advance(sum(len(example.text) for example in part))


def check_answer_only(tokenizer: PreTrainedTokenizerBase, answer_only: bool) -> None:
    """Refuse `answer_only` with a tokenizer that does not tell where its tokens are in the text. Raises InputError."""
    if answer_only and not tokenizer.is_fast:
        raise InputError("answer_only needs a fast tokenizer (tokenizer.json); save one, or set data.answer_only=false")


def _portions(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples for one tokenizer call after the other."""
    part: list[Example] = []
    characters = 0
    for example in examples:
        part.append(example)
        characters += len(example.text)
        if len(part) == _TEXTS or characters >= _CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, offsets: bool
) -> Iterator[tuple[Example, list[int], list[tuple[int, int]]]]:
    encoded = tokenizer(
        [example.text for example in examples],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets,
        verbose=False,  # no warning that a document is longer than the context: packing cuts it
    )
    spans = encoded["offset_mapping"] if offsets else [[]] * len(examples)
    yield from zip(examples, encoded["input_ids"], spans, strict=True)


def _encode_fast(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, list[int], list[tuple[int, int]]]]:
    """The same by the tokenizers library itself, at twice the speed: it keeps no offsets, and makes no copies."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encoded = backend.encode_batch_fast([example.text for example in examples], add_special_tokens=False)
    for example, encoding in zip(examples, encoded, strict=True):
        yield example, encoding.ids, []


def _is_plain(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> bool:
    """Whether the tokenizer does nothing around its backend, which is tried on the beginning of some texts."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return False
    some = [Example(example.text[:_TRIED]) for example in examples[:16]]
    plain, fast = _encode(some, tokenizer, False), _encode_fast(some, tokenizer)
    return [tokens for _, tokens, _ in plain] == [tokens for _, tokens, _ in fast]


def _answer_mask(example: Example, offsets: list[tuple[int, int]]) -> list[int]:
    """1 for each token that covers a character of an answer (a token across its start counts too)."""
    if example.answers is None:
        return [1] * len(offsets)
    return [int(any(start < last and end > first for first, last in example.answers)) for start, end in offsets]


def _framed(
    tokens: list[int], mask: list[int], example: Example, tokenizer: PreTrainedTokenizerBase, answer_only: bool
) -> Document:
    bos, eos = tokenizer.bos_token_id, end_token(tokenizer)
    if isinstance(bos, int) and tokens[:1] != [bos]:
        tokens, mask = [bos, *tokens], [0 if answer_only and example.answers is not None else 1, *mask]
    if not example.text.rstrip().endswith(str(tokenizer.eos_token)):
        ends_answer = example.answers is None or any(last == len(example.text) for _, last in example.answers)
        tokens, mask = [*tokens, eos], [*mask, 1 if ends_answer or not answer_only else 0]
    return Document(tokens, mask)
