"""Preference rows: a prompt, the answer that was chosen and the one that was rejected; as text, and as tokens.

Accepted: `prompt` with two texts, or with two lists of messages; two lists of messages that begin alike; `messages` or
`conversations` (`{from, value}`, as ShareGPT has them) with one answer each as an object. Chats are rendered by the
tokenizer's template, plain texts are joined as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.training.data.answer_ranges import same_beginning
from linearize.training.data.chat import Chat, note_unread
from linearize.training.data.documents import Document, Example, tokenize
from linearize.training.data.row_fields import (
    Message,
    Note,
    NullError,
    Row,
    as_messages,
    ignore,
    is_null,
    string,
    with_system,
)
from linearize.training.data.sources import read_as

LOG = logging.getLogger("linearize")
FORMATS = "prompt/chosen/rejected; chosen/rejected as lists of messages; messages or conversations with chosen/rejected"


@dataclass(frozen=True, slots=True)
class Preference:
    """Two texts that begin with the same prompt; their answers begin at these characters."""

    chosen: str
    chosen_start: int
    rejected: str
    rejected_start: int


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """The two texts as tokens; `loss_mask` is 1 on the tokens of the answers."""

    chosen: Document
    rejected: Document

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


def read_preferences(spec: str, tokenizer: PreTrainedTokenizerBase) -> list[Preference]:
    """All preferences of a data SPEC.

    Raises:
        InputError: data that cannot be read, or a row without both answers, with an empty one, in none of the formats,
            or with a chat that the tokenizer has no template for; names the row.
    """
    preferences = read_as(spec, lambda row, note: preference_of(row, tokenizer, note))
    if not preferences:
        raise InputError(f"data {spec!r}: is empty, it holds no preferences; give rows with {FORMATS}")
    return preferences


def preference_of(row: object, tokenizer: PreTrainedTokenizerBase, note: Note = ignore) -> Preference:
    """The preference in a row (see the head of this file). Raises InputError for a row that holds none."""
    if not isinstance(row, Mapping):
        raise InputError(f"is a {type(row).__name__}, a preference row must be an object with {FORMATS}")
    for field in ("chosen", "rejected"):
        if field in row and is_null(row[field]):
            raise NullError(field)
        if not row.get(field):
            raise InputError(f"has no {field!r} answer; a preference row needs both, chosen and rejected")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(row.get("prompt"), str) and isinstance(chosen, str) and isinstance(rejected, str):
        note_unread(row, note)
        return _checked(_plain(string(row, "prompt"), chosen, rejected), tokenizer)
    prompt, *answers = _messages(row)
    return _checked(_chat(Chat.of(row, with_system(row, prompt), tokenizer, note), *answers), tokenizer)


def tokenize_preferences(
    preferences: Sequence[Preference], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[PreferencePair]:
    """Pairs of at most `length` tokens a text: what is longer loses its end (and then has no EOS).

    A pair goes if nothing of one of its answers is left, or if both are the same; a warning counts them.

    Raises:
        InputError: no pair is left.
    """
    chosen, rejected = (
        tokenize([Example(t, ((s, len(t)),)) for t, s in texts], tokenizer, answer_only=True)
        for texts in (
            [(p.chosen, p.chosen_start) for p in preferences],
            [(p.rejected, p.rejected_start) for p in preferences],
        )
    )
    pairs = [PreferencePair(cut(a, length), cut(b, length)) for a, b in zip(chosen, rejected, strict=True)]
    answered = [pair for pair in pairs if any(pair.chosen.loss_mask) and any(pair.rejected.loss_mask)]
    different = [pair for pair in answered if pair.chosen.tokens != pair.rejected.tokens]
    if len(different) < len(pairs):
        LOG.warning(
            "%d of %d preferences are left out: %d have prompts of %d or more tokens, %d have equal answers (as far as "
            "they fit)",
            len(pairs) - len(different), len(pairs), len(pairs) - len(answered), length, len(answered) - len(different),
        )  # fmt: skip
    if not different:
        raise InputError(
            f"no preference is left: all {len(pairs)} have prompts of {length} or more tokens, or equal answers; "
            "raise length or give other data"
        )
    return different


def cut(document: Document, length: int) -> Document:
    """The first `length` tokens of a document."""
    return Document(document.tokens[:length], document.loss_mask[:length]) if len(document) > length else document


def _plain(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(prompt + chosen, len(prompt), prompt + rejected, len(prompt))


def _chat(prompt: Chat, chosen: list[Message], rejected: list[Message]) -> Preference:
    """Rendered by the template. An answer begins where its text leaves that of the prompt, opened for an answer."""
    opened = prompt.text(opened=True)
    texts = [replace(prompt, messages=[*prompt.messages, *answer]).text() for answer in (chosen, rejected)]
    starts = [same_beginning(opened, text) for text in texts]
    return Preference(texts[0], starts[0], texts[1], starts[1])


def _checked(preference: Preference, tokenizer: PreTrainedTokenizerBase) -> Preference:
    for field, text, start in (
        ("chosen", preference.chosen, preference.chosen_start),
        ("rejected", preference.rejected, preference.rejected_start),
    ):
        if not text[start:].replace(str(tokenizer.eos_token), "").strip():
            raise InputError(f"its {field!r} answer is empty; a preference row needs both, chosen and rejected")
    return preference


def _messages(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen answer and rejected answer as messages."""
    chosen, rejected = (as_messages(row[field], field, "assistant") for field in ("chosen", "rejected"))
    field = next((name for name in ("prompt", "conversations", "messages") if row.get(name)), None)
    if field is None:
        shared = _shared(chosen, rejected)
        if not shared:
            raise InputError(f"has no prompt: its fields are {', '.join(map(str, row))}; give one of: {FORMATS}")
        return chosen[:shared], chosen[shared:], rejected[shared:]
    prompt = as_messages(row[field], field, "user")
    if all(len(answer) > len(prompt) and answer[: len(prompt)] == prompt for answer in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # the answers repeat the prompt
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            raise InputError(f"field {name!r} must begin and end with the assistant's answer to the prompt")
        if not any(str(message.get("content", message)).strip() for message in answer):
            raise InputError(f"its {name!r} answer is empty; a preference row needs both, chosen and rejected")
    return prompt, chosen, rejected


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both begin with, the last of each left aside as it is the answer."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), most)
