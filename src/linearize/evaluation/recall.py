"""Recall beyond the window: greedy answers to questions whose fact stands far back in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.decoding.loading import pad_token
from linearize.errors import InputError

SPARE_TOKENS = 2  # generated beyond the answer's own, so that a longer wrong answer shows


class RecallItem(Protocol):
    """A prompt that holds the answer somewhere and asks for it at its end."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class RecallAnswer:
    """One item as answered; `distance`: tokens from the end of the fact to the end of the prompt."""

    distance: int
    expected: str
    given: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class RecallBin:
    """Items whose distance is in [start, end)."""

    start: int
    end: int
    items: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class RecallReport:
    """Exact-match accuracy over all items and by distance, and every answer."""

    items: int
    accuracy: float
    by_distance: tuple[RecallBin, ...]
    answers: tuple[RecallAnswer, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        lists = {"by_distance": [asdict(b) for b in self.by_distance], "answers": [asdict(a) for a in self.answers]}
        return asdict(self) | lists


def recall_beyond_window(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[RecallItem],
    *,
    batch_size: int = 16,
    distance_edges: Sequence[int] | None = None,
) -> RecallReport:
    """Answer every item greedily, in left-padded batches, and count exact matches.

    An answer is right when the generated text starts with it and it ends there as a word. `distance_edges` are the
    bins' edges in tokens (default: powers of two). Raises InputError for no items, or a prompt without its answer.
    """
    if not items:
        raise InputError("recall: no items given; give at least one prompt with its answer")
    distances = [fact_distance(tokenizer, item) for item in items]
    given: list[str] = []
    for start in range(0, len(items), batch_size):
        given += _answer(model, tokenizer, items[start : start + batch_size])
    answers = tuple(
        RecallAnswer(distance=d, expected=item.answer.strip(), given=text, correct=matches(text, item.answer))
        for d, item, text in zip(distances, items, given, strict=True)
    )
    edges = list(distance_edges) if distance_edges is not None else _powers_of_two(min(distances), max(distances))
    return RecallReport(
        items=len(answers), accuracy=_accuracy(answers), by_distance=_by_distance(answers, edges), answers=answers
    )


def fact_distance(tokenizer: PreTrainedTokenizerBase, item: RecallItem) -> int:
    """Tokens between the answer's last mention in the prompt and the prompt's end."""
    at = item.prompt.rfind(item.answer.strip())
    if at < 0:
        raise InputError(
            f"recall: the answer {item.answer!r} is nowhere in its prompt: every prompt must hold its fact"
        )
    return len(_tokens(tokenizer, item.prompt)) - len(_tokens(tokenizer, item.prompt[: at + len(item.answer.strip())]))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids without a space at the end: most tokenizers join a space to the word that follows, here the answer."""
    return list(tokenizer(text.rstrip(), add_special_tokens=add_special_tokens)["input_ids"])


def matches(text: str, answer: str) -> bool:
    """Whether the text starts with the answer, and the answer ends there as a word."""
    text, answer = text.strip(), answer.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


@torch.inference_mode()
def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[RecallItem]) -> list[str]:
    prompts = [_tokens(tokenizer, item.prompt) for item in items]
    longest = max(len(_tokens(tokenizer, f" {item.answer.strip()}", add_special_tokens=False)) for item in items)
    input_ids, mask = left_padded(prompts, pad=pad_token(tokenizer))
    generate: Any = model.generate
    out = generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        max_new_tokens=longest + SPARE_TOKENS,
        pad_token_id=pad_token(tokenizer),
    )
    return list(tokenizer.batch_decode(out[:, input_ids.shape[1] :], skip_special_tokens=True))


def left_padded(rows: Sequence[Sequence[int]], *, pad: int) -> tuple[Tensor, Tensor]:
    """Token rows of unequal length as (input_ids, attention_mask), both [B, T] int64, padding on the left."""
    longest = max(len(row) for row in rows)
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _accuracy(answers: Sequence[RecallAnswer]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)


def _powers_of_two(nearest: int, farthest: int) -> list[int]:
    first, last = max(nearest, 1).bit_length() - 1, farthest.bit_length()
    return [2**i for i in range(first, last + 1)] if nearest else [0, *(2**i for i in range(last + 1))]


def _by_distance(answers: Sequence[RecallAnswer], edges: Sequence[int]) -> tuple[RecallBin, ...]:
    bins = []
    for start, end in pairwise(edges):
        inside = [answer for answer in answers if start <= answer.distance < end]
        if inside:
            bins.append(RecallBin(start=start, end=end, items=len(inside), accuracy=_accuracy(inside)))
    return tuple(bins)
