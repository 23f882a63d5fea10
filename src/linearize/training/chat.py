"""Chat templates that a stage may be told to use in place of the tokenizer's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from linearize.errors import InputError, unknown
from linearize.files import read_text

TEMPLATES = {
    "plain": (
        "{%- for m in messages %}{{ '' if loop.first else '\n' }}"
        "{{ 'Assistant' if m['role'] == 'assistant' else 'User' if m['role'] == 'user' else 'System' }}: "
        "{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '\nAssistant:' }}{%- endif %}"
    ),
}
"""Templates by name: `plain` is `User: ...` and `Assistant: ...` on lines of their own, EOS after each answer."""


def with_template(tokenizer: Any, given: str | None) -> Any:
    """The tokenizer, or with a template given (a name, a file, or the text) a copy that has it.

    Raises:
        InputError: neither a known name, nor a file, nor a Jinja text (which has a brace somewhere).
    """
    if given is None:
        return tokenizer
    made = copy.deepcopy(tokenizer)
    made.chat_template = template_text(given)
    return made


def template_text(given: str) -> str:
    """The Jinja text that a setting means."""
    if given in TEMPLATES:
        return TEMPLATES[given]
    return given if "{" in given else _from_file(given)


def _from_file(given: str) -> str:
    if not Path(given).expanduser().is_file():
        raise InputError(f"{unknown('chat_template', given, TEMPLATES)} (or give a Jinja file, or the template's text)")
    return read_text(given)
