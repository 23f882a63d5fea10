"""Chat messages in the ways that data sets write them, brought to one: `{role, content}` with the content as text.

ShareGPT writes `{from, value}` with roles of its own, OpenAI may write the content as a list of parts, tables hold the
whole list as JSON text, and some data sets have the system's text in a column beside the messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linearize.errors import InputError
from linearize.training.data.row_fields import NullError, Row, from_json_text, holds, is_null, string

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
