"""The formats of a data row, and the text that each of them stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.training.documents import Example

Row = Mapping[str, Any]

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


def example_of(row: object, tokenizer: PreTrainedTokenizerBase, answer_only: bool) -> Example:
    """The text of a row. `text` goes first, but after the formats that know their answers where only those count."""
    if not isinstance(row, Mapping):
        raise InputError(f"is a {type(row).__name__}, a row must be an object with one of: {_formats()}")
    order = sorted(_FORMATS, key=lambda fields: (fields == ("text",)) == answer_only)
    for fields in order:
        if all(field in row for field in fields):
            return _FORMATS[fields](row, tokenizer, answer_only)
    found = ", ".join(map(str, row)) or "none"
    raise InputError(f"wrong fields, found: {found}; needed is one of: {_formats()}")


def first_line(error: BaseException) -> str:
    """What an exception of a library says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _formats() -> str:
    return "; ".join("/".join(fields) for fields in _FORMATS)


def string(row: Row, field: str) -> str:
    """The text in a field. Raises InputError for anything else."""
    value = row[field]
    if not isinstance(value, str):
        raise InputError(f"field {field!r} must be text, it is {type(value).__name__}")
    return value


def _answered(prompt: str, answer: str) -> Example:
    return Example(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))


def _from_text(row: Row, _tokenizer: PreTrainedTokenizerBase, _answer_only: bool) -> Example:
    return Example(string(row, "text"))


def _from_alpaca(row: Row, _tokenizer: PreTrainedTokenizerBase, _answer_only: bool) -> Example:
    return _answered(alpaca_prompt(row), string(row, "output"))


def alpaca_prompt(row: Row) -> str:
    """Alpaca's prompt for a row with `instruction` and perhaps `input`."""
    given = string(row, "input") if row.get("input") is not None else ""
    return (_ALPACA_INPUT if given else _ALPACA).format(instruction=string(row, "instruction"), input=given)


def _from_completion(row: Row, _tokenizer: PreTrainedTokenizerBase, _answer_only: bool) -> Example:
    return _answered(string(row, "prompt"), string(row, "completion"))


def _from_messages(row: Row, tokenizer: PreTrainedTokenizerBase, answer_only: bool) -> Example:
    messages = message_list(row, "messages")
    check_template(tokenizer)
    text = render(tokenizer, messages)
    return Example(text, _assistant_ranges(text, messages, tokenizer) if answer_only else ())


def message_list(row: Row, field: str) -> list[Any]:
    """The chat messages in a field. Raises InputError for anything else."""
    messages = row[field]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise InputError(f"field {field!r} must be a list of objects with role and content")
    return messages


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for a tokenizer that cannot render a chat."""
    if not tokenizer.chat_template:
        raise InputError(
            "has messages, but the tokenizer has no chat template; set one (stages sft and dpo have chat_template), "
            "or give text or prompt rows"
        )


def _assistant_ranges(
    text: str, messages: list[Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, int], ...]:
    """Character ranges of the assistant's turns, from the template applied to ever longer beginnings of the talk."""
    ranges = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:turn], add_generation_prompt=True)
            after = render(tokenizer, messages[: turn + 1])
            # a template that rewrites earlier turns (dropped reasoning) gives no range for them: they do not count
            if text.startswith(after) and after.startswith(before):
                ranges.append((len(before), len(after)))
    return tuple(ranges)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Any], *, add_generation_prompt: bool = False) -> str:
    """The chat as text. Raises InputError for messages that the template refuses."""
    from jinja2 import TemplateError

    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"the chat template refuses these messages ({first_line(error)})") from error


_FORMATS: dict[tuple[str, ...], Callable[[Row, PreTrainedTokenizerBase, bool], Example]] = {
    ("text",): _from_text,
    ("instruction", "output"): _from_alpaca,
    ("messages",): _from_messages,
    ("prompt", "completion"): _from_completion,
}
