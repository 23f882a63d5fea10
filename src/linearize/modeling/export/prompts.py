"""Prompts that a person gives for a comparison: files of texts, as tokens of a student."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.storage.files import expand_home, read_text

FIELDS = "`turns` (a list, of which the first one is read), `prompt` or `text`"


def prompts_in(path: Path | str) -> list[str]:
    """The prompts of one file: of each row of a `.jsonl` file, or else the texts between blank lines.

    Raises:
        InputError: a file that cannot be read, or a row without a prompt.
    """
    path, text = Path(expand_home(path)), read_text(path)
    if path.suffix != ".jsonl":
        return [part.strip() for part in text.split("\n\n") if part.strip()]
    return [_prompt(line, f"{path}, line {i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _prompt(line: str, place: str) -> str:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: is not JSON ({error.msg})") from error
    fields = row if isinstance(row, dict) else {}
    turns = fields.get("turns")
    first = turns[0] if isinstance(turns, list) and turns else fields.get("prompt", fields.get("text"))
    if not isinstance(first, str) or not first.strip():
        raise InputError(f"{place}: has no prompt; give {FIELDS}")
    return first


def read_prompts(paths: Sequence[Path | str], most: int | None = None) -> list[str]:
    """At most `most` prompts, in turn from each file; of a folder, its `.jsonl` files.

    Raises:
        InputError: no prompt in there.
    """
    files: list[Path] = []
    for path in (Path(expand_home(path)) for path in paths):
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    lists = [prompts_in(file) for file in files]
    prompts = [rows[i] for i in range(max(map(len, lists), default=0)) for rows in lists if i < len(rows)][:most]
    if not prompts:
        raise InputError(f"{', '.join(map(str, paths))}: no prompt in there; give .jsonl rows with {FIELDS}, or texts")
    return prompts
