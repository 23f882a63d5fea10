"""Fields of a data row, chat messages among them, and what is to be reported of the rows of one data SPEC.

Messages are brought to one form: `{role, content}` with the content as text. ShareGPT writes `{from, value}` with roles
of its own, OpenAI may write the content as a list of parts, tables hold the whole list as JSON text, and some data sets
have the system's text in a column of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from linearize.errors import InputError

LOG = logging.getLogger("linearize")

Row = Mapping[str, Any]
Note = Callable[[str], None]
"""Takes what is to be reported of the row at hand, as the rest of a sentence: `have no answer`."""


class NullError(InputError):
    """A row whose text is null: it is left out and counted, where any other fault of a row is an error."""

    def __init__(self, field: str) -> None:
        super().__init__(f"field {field!r} must be text, it is NoneType (null)")


class RowNotes:
    """Counts what is noted of each row, and reports each kind of note in one line."""

    def __init__(self) -> None:
        self.row = 0
        """The number of the row at hand, from 1."""
        self.num_rows = 0
        self._rows: dict[str, tuple[int, int, int]] = {}  # how many, the first by number, the last by order

    def begin(self, row: int) -> None:
        """The next row is at hand."""
        self.row, self.num_rows = row, self.num_rows + 1

    def __call__(self, note: str) -> None:
        """Note something of the row at hand; a second note of the same kind changes nothing."""
        count, first, last = self._rows.get(note, (0, self.row, -1))
        if last != self.num_rows:
            self._rows[note] = count + 1, first, self.num_rows

    def lines(self) -> tuple[str, ...]:
        """A line for each kind of note."""
        return tuple(
            f"{count} of {self.num_rows} rows (the first: row {first}) {note}"
            for note, (count, first, _) in self._rows.items()
        )

    def report(self, spec: str) -> None:
        """One warning for each kind of note."""
        for line in self.lines():
            LOG.warning("data %r: %s", spec, line)


def ignore(_note: str) -> None:
    """The `Note` of a row by itself, of which nothing is reported."""


def is_null(value: object) -> bool:
    """Whether a value stands for none; pandas writes NaN for a text that is missing."""
    return value is None or (isinstance(value, float) and value != value)


def holds(row: Row, *fields: str) -> bool:
    """Whether a row has a value in each of these fields."""
    return not any(is_null(row.get(field)) for field in fields)


def string(row: Row, field: str) -> str:
    """The text in a field. Raises InputError for anything else."""
    value = row[field]
    if is_null(value):
        raise NullError(field)
    if not isinstance(value, str):
        raise InputError(f"field {field!r} must be text, it is {type(value).__name__}")
    return value


def from_json_text(value: object) -> Any:
    """What a JSON text stands for, as tables hold lists and objects; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


Message = dict[str, Any]
CHAT_FIELDS = ("messages", "conversations")
SYSTEM = "system"
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant", "assistant": "assistant", "model": "assistant",
    "function_call": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip


def message_list(row: Row, field: str) -> list[Message]:
    """The messages in a field; a text in the column `system` is the first of them, unless they have one.

    Raises:
        InputError: no list of messages, an unknown role of ShareGPT's form, a message without content, or a part of a
            content that is not text; NullError: a content is null.
    """
    if is_null(row[field]):
        raise NullError(field)
    return with_system(row, normal_messages(row[field], field))


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages after the text in the row's column `system`, if there is one and they have none."""
    if not holds(row, SYSTEM) or (messages and messages[0]["role"] == SYSTEM):
        return messages
    text = string(row, SYSTEM)
    return [{"role": SYSTEM, "content": text}, *messages] if text.strip() else messages


def normal_messages(value: object, field: str) -> list[Message]:
    """The messages that a value stands for: a list of them, one alone, or either as JSON text. Raises as above."""
    value = from_json_text(value)
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"field {field!r} must be a list of objects with role and content")
    return [_normal(message, field) for message in messages]


def as_messages(value: object, field: str, role: str) -> list[Message]:
    """As `normal_messages`, where a text is one message of this role."""
    value = from_json_text(value)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(
            f"field {field!r} must be text, it is {type(value).__name__}; a list of objects with role and content "
            "is allowed too"
        )
    return normal_messages(messages, field)


def _normal(message: Row, field: str) -> Message:
    message = {key: value for key, value in message.items() if value is not None or key in ("content", "value")}
    if "role" in message:
        role = _ROLES.get(str(message["role"]), message["role"])
    elif "from" in message:
        if (role := _ROLES.get(str(message["from"]))) is None:
            raise InputError(f"field {field!r} has a message from {message['from']!r}; known are {', '.join(_ROLES)}")
    else:
        raise InputError(f"field {field!r} must be a list of objects with role and content")
    rest = {key: value for key, value in message.items() if key not in ("role", "from", "content", "value")}
    content = message["content"] if "content" in message else message.get("value")
    if content is not None:
        return {"role": role, "content": _text(content, field), **rest}
    if any(value for key, value in rest.items() if key != "name"):
        return {"role": role, **rest}  # calls of tools; templates write null as `None`, and nothing for what is missing
    if "content" in message or "value" in message:
        raise NullError(f"{field}.content")
    raise InputError(f"field {field!r} has a message without content; it needs role and content")


def _text(content: Any, field: str) -> Any:
    """The text of a content in parts; any other content as it is."""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) and "type" in part for part in content):
        return content
    for part in content:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"field {field!r} has a message with a part of type {part['type']!r}; only parts with a text can be "
                "used: leave such rows out"
            )
    return "".join(part["text"] for part in content)
