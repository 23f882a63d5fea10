"""Preference rows: a prompt, the answer that was chosen and the one that was rejected; as text, and as tokens.

Accepted: `prompt` with two texts, or with two lists of messages; two lists of messages that begin alike; `messages` or
`conversations` (`{from, value}`, as ShareGPT has them) with one answer each as an object. Chats are rendered by the
tokenizer's template, plain texts are joined as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.training.data_sources import read_as
from linearize.training.documents import Document, Example, tokenize
from linearize.training.row_formats import Row, check_template, message_list, render, string

LOG = logging.getLogger("linearize")
Message = dict[str, Any]
FORMATS = "prompt/chosen/rejected; chosen/rejected as lists of messages; messages or conversations with chosen/rejected"
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip


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
    found = read_as(spec, lambda row: preference_of(row, tokenizer))
    if not found:
        raise InputError(f"data {spec!r}: is empty, it holds no preferences; give rows with {FORMATS}")
    return found


def preference_of(row: object, tokenizer: PreTrainedTokenizerBase) -> Preference:
    """The preference in a row (see the head of this file). Raises InputError for a row that holds none."""
    if not isinstance(row, Mapping):
        raise InputError(f"is a {type(row).__name__}, a preference row must be an object with {FORMATS}")
    for field in ("chosen", "rejected"):
        if not row.get(field):
            raise InputError(f"has no {field!r} answer; a preference row needs both, chosen and rejected")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(row.get("prompt"), str) and isinstance(chosen, str) and isinstance(rejected, str):
        return _checked(_plain(string(row, "prompt"), chosen, rejected), tokenizer)
    return _checked(_chat(*_messages(row), tokenizer), tokenizer)


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


def _chat(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], tokenizer: PreTrainedTokenizerBase
) -> Preference:
    """Rendered by the template. An answer begins where its text leaves that of the prompt, opened for an answer."""
    check_template(tokenizer)
    opened = render(tokenizer, prompt, add_generation_prompt=True)
    texts = [render(tokenizer, prompt + answer) for answer in (chosen, rejected)]
    starts = [_same_beginning(opened, text) for text in texts]
    return Preference(texts[0], starts[0], texts[1], starts[1])


def _same_beginning(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


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
    chosen, rejected = _answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")
    field = next((name for name in ("prompt", "conversations", "messages") if row.get(name)), None)
    if field is None:
        shared = _shared(chosen, rejected)
        if not shared:
            raise InputError(f"has no prompt: its fields are {', '.join(map(str, row))}; needed is one of: {FORMATS}")
        return chosen[:shared], chosen[shared:], rejected[shared:]
    prompt = [{"role": "user", "content": row[field]}] if isinstance(row[field], str) else _normal(row[field], field)
    if all(len(answer) > len(prompt) and answer[: len(prompt)] == prompt for answer in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # the answers repeat the prompt
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[0]["role"] != "assistant" or answer[-1]["role"] != "assistant":
            raise InputError(f"field {name!r} must begin and end with the assistant's answer to the prompt")
        if not any(str(message["content"]).strip() for message in answer):
            raise InputError(f"its {name!r} answer is empty; a preference row needs both, chosen and rejected")
    return prompt, chosen, rejected


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """How many messages both begin with, the last of each left aside as it is the answer."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), most)


def _answer(value: Any, field: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return _normal([value] if isinstance(value, Mapping) else value, field)


def _normal(value: Any, field: str) -> list[Message]:
    """Messages as `{role, content}`, whichever of the two ways they were written in."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise InputError(f"field {field!r} must be text, a message, or a list of messages")
    renamed = []
    for message in value:
        if "from" in message and "value" in message:
            role = _ROLES.get(str(message["from"]))
            if role is None:
                raise InputError(
                    f"field {field!r} has a message from {message['from']!r}; known are {', '.join(_ROLES)}"
                )
            message = {"role": role, "content": message["value"]}
        if "content" not in message:
            raise InputError(f"field {field!r} has a message without content; it needs role and content")
        renamed.append(dict(message))
    return message_list({field: renamed}, field)
