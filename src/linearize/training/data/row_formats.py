"""The formats of a data row, and the text of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.training.data.answer_ranges import assistant_ranges
from linearize.training.data.chat import Chat, note_unread
from linearize.training.data.documents import Example
from linearize.training.data.row_fields import (
    Message,
    Note,
    NullError,
    Row,
    as_messages,
    holds,
    ignore,
    is_null,
    message_list,
    string,
    with_system,
)

# Stanford Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca); the answer begins on a new line, as LoLCATs has it.
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
Format = Callable[[Row, PreTrainedTokenizerBase, bool, Note], Example]


def example_of(row: object, tokenizer: PreTrainedTokenizerBase, answer_only: bool, note: Note = ignore) -> Example:
    """The text of a row. `text` goes first, but after the formats that know their answers where only those count.

    Raises:
        InputError: a row in none of the formats, or with fields of the wrong kind; NullError: its text is null.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"is a {type(row).__name__}, a row must be an object with one of: {_formats()}")
    order = sorted(_FORMATS, key=lambda fields: (fields == ("text",)) == answer_only)
    matching = [fields for fields in order if all(field in row for field in fields)]
    for fields in matching:
        if holds(row, *fields):
            return _FORMATS[fields](row, tokenizer, answer_only, note)
    if matching:
        raise NullError(next(field for field in matching[0] if is_null(row[field])))
    named = ", ".join(map(str, row)) or "none"
    raise InputError(f"has the fields {named}; give one of: {_formats()}")


def _formats() -> str:
    return "; ".join("/".join(fields) for fields in _FORMATS)


def _answered(prompt: str, answer: str) -> Example:
    return Example(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))


def _from_text(row: Row, _tokenizer: PreTrainedTokenizerBase, _answer_only: bool, _note: Note) -> Example:
    return Example(string(row, "text"))


def _from_content(row: Row, _tokenizer: PreTrainedTokenizerBase, _answer_only: bool, _note: Note) -> Example:
    return Example(string(row, "content"))


def _from_alpaca(row: Row, _tokenizer: PreTrainedTokenizerBase, _answer_only: bool, note: Note) -> Example:
    note_unread(row, note)
    return _answered(alpaca_prompt(row), string(row, "output"))


def alpaca_prompt(row: Row) -> str:
    """Alpaca's prompt for a row with `instruction` and perhaps `input`."""
    text = string(row, "input") if row.get("input") is not None else ""
    return (_ALPACA_INPUT if text else _ALPACA).format(instruction=string(row, "instruction"), input=text)


def _from_completion(row: Row, tokenizer: PreTrainedTokenizerBase, answer_only: bool, note: Note) -> Example:
    """Two texts as they are; with a list of messages (or one) as either of them, a chat."""
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        note_unread(row, note)
        return _answered(row["prompt"], row["completion"])
    prompt = with_system(row, as_messages(row["prompt"], "prompt", "user"))
    messages = [*prompt, *as_messages(row["completion"], "completion", "assistant")]
    return _from_chat(row, messages, len(prompt), tokenizer, answer_only, note)


def _from_messages(row: Row, tokenizer: PreTrainedTokenizerBase, answer_only: bool, note: Note) -> Example:
    return _from_chat(row, message_list(row, "messages"), 0, tokenizer, answer_only, note)


def _from_conversations(row: Row, tokenizer: PreTrainedTokenizerBase, answer_only: bool, note: Note) -> Example:
    return _from_chat(row, message_list(row, "conversations"), 0, tokenizer, answer_only, note)


def _from_chat(
    row: Row, messages: list[Message], first: int, tokenizer: PreTrainedTokenizerBase, answer_only: bool, note: Note
) -> Example:
    """The chat of a row, whose answers are those from message `first` on."""
    chat = Chat.of(row, messages, tokenizer, note)
    text = chat.text()
    return Example(text, assistant_ranges(chat, text, first=first, note=note) if answer_only else ())


_FORMATS: dict[tuple[str, ...], Format] = {
    ("text",): _from_text,
    ("instruction", "output"): _from_alpaca,
    ("messages",): _from_messages,
    ("conversations",): _from_conversations,
    ("prompt", "completion"): _from_completion,
    ("content",): _from_content,
}
