"""Chats as text: templates that a stage may name, and the inputs of a template from a row."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError, one_line, unknown
from linearize.storage.files import expand_home, read_text
from linearize.training.data.row_fields import Message, Note, Row, from_json_text, ignore, is_null

TEMPLATES = {
    "plain": (
        "{%- for m in messages %}{{ '' if loop.first else '\n' }}"
        "{{ 'Assistant' if m['role'] == 'assistant' else 'User' if m['role'] == 'user' else 'System' }}: "
        "{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '\nAssistant:' }}{%- endif %}"
    ),
}
"""Templates by name: `plain` is `User: ...` and `Assistant: ...` on lines of their own, EOS after each answer."""

EXTRAS = ("tools", "documents")
"""Columns that are meant for a template, whether or not it reads them."""
SETTINGS = "chat_template_kwargs"
"""A column with further names and values for the template, as trl has it."""
_TEXT = {"messages", "conversations", "text", "content", "system", "prompt", "completion", "chosen", "rejected"}
_GIVEN = {"raise_exception", "strftime_now", *signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
_TAKEN = (_TEXT | _GIVEN) - set(EXTRAS)
"""Names that a template gets from elsewhere, whatever columns of a row are called."""
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # transformers' own tags
_MARK = "\ue000"  # replaces a content to locate it: no text begins or ends with it


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy with the template (a name, a file, or the text).

    Raises:
        InputError: neither a known name, nor a file, nor a Jinja text (which has a brace somewhere).
    """
    if template is None:
        return tokenizer
    made = copy.deepcopy(tokenizer)
    made.chat_template = template_text(template)
    return made


def template_text(template: str) -> str:
    """The Jinja text of a template's name, file or text."""
    if template in TEMPLATES:
        return TEMPLATES[template]
    return template if "{" in template else _from_file(template)


def _from_file(path: str) -> str:
    if not Path(expand_home(path)).is_file():
        raise InputError(f"{unknown('chat_template', path, TEMPLATES)} (or give a Jinja file, or the template's text)")
    return read_text(path)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Messages, the tokenizer whose template renders them, and what the template gets besides them."""

    tokenizer: PreTrainedTokenizerBase
    messages: Sequence[Message]
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Row, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, note: Note = ignore) -> Chat:
        """The chat of a row, with the columns that the template reads; those meant for it that it does not are noted.

        Raises InputError for a tokenizer without a template.
        """
        if not tokenizer.chat_template:
            raise InputError(
                "has messages, but the tokenizer has no chat template; set one (stages sft and dpo have "
                "chat_template), or give text or prompt rows"
            )
        return cls(tokenizer=tokenizer, messages=messages, variables=_variables(row, tokenizer, note))

    def text(self, *, opened: bool = False) -> str:
        """The chat as text; `opened` for the assistant's next answer. Raises InputError where the template refuses."""
        from jinja2 import TemplateError

        if not self.messages:
            return ""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(self.messages), tokenize=False, add_generation_prompt=opened, **self.variables
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"the chat template refuses {' and '.join(('these messages', *self.variables))} ({one_line(error)})"
            ) from error

    def first(self, turns: int) -> Chat:
        """The chat up to its first `turns` messages."""
        return replace(self, messages=self.messages[:turns])

    def marked(self, turn: int) -> Chat:
        """The chat with the content of one message replaced by a mark."""
        message = {**self.messages[turn], "content": _MARK}
        return replace(self, messages=[*self.messages[:turn], message, *self.messages[turn + 1 :]])


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """Messages alone as text. Raises InputError where the template refuses them."""
    return Chat(tokenizer=tokenizer, messages=messages).text(opened=add_generation_prompt)


def note_unread(row: Row, note: Note) -> None:
    """Note the columns for a template in a row that has none."""
    for name in EXTRAS:
        if row.get(name):
            note(f"have {name!r}, which texts that go through no chat template do not use: give messages")


def _variables(row: Row, tokenizer: PreTrainedTokenizerBase, note: Note) -> dict[str, Any]:
    """The columns of a row that the template reads, by name."""
    settings = from_json_text(row.get(SETTINGS))
    columns = {name: value for name, value in row.items() if not is_null(value)}
    meant = {name: from_json_text(columns[name]) for name in EXTRAS if columns.get(name)}
    meant |= settings if isinstance(settings, Mapping) else {}
    try:
        reads = variables_read(str(tokenizer.get_chat_template(tools=meant.get("tools"))))
    except ValueError as error:
        raise InputError(f"the tokenizer has no chat template for them ({one_line(error)})") from error
    for name in meant:
        if name not in reads:
            note(f"have {name!r}, which the chat template does not read: it is not part of their text")
    taken = _TAKEN | set(tokenizer.special_tokens_map)
    offered = {name: value for name, value in columns.items() if name not in EXTRAS} | meant
    return {
        name: _objects(value, name) if name in EXTRAS else value
        for name, value in offered.items()
        if name in reads and name not in taken
    }


def _objects(value: object, name: str) -> list[Any]:
    """The objects that a column for the template must hold, each perhaps as JSON text."""
    entries = [from_json_text(entry) for entry in value] if isinstance(value, list) else []
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise InputError(f"field {name!r} must be a list of objects, or JSON text of one")
    return entries


@lru_cache(maxsize=16)
def variables_read(template: str) -> frozenset[str]:
    """The names that a Jinja text reads and does not set."""
    from jinja2 import Environment, TemplateError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        names = meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template)))
    except TemplateError:
        return frozenset()  # rendering raises the error
    return frozenset(names - environment.globals.keys())
