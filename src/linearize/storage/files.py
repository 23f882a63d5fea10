"""Paths, text and JSON as people write them: home folders, byte order marks, errors as one line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.errors import InputError


def expand_home(path: str | os.PathLike[str]) -> str:
    """A path with a leading `~` replaced by the home folder; anything else, such as a Hub name, unchanged.

    Every function that takes a path from a person calls it once, first: a shell does not expand `--out=~/student`.
    """
    return os.path.expanduser(path)


def real_name(name: str) -> str:
    """One spelling for all names of a place: the absolute path without links where it exists, else the name."""
    path = expand_home(name)
    return os.path.realpath(path) if os.path.exists(path) else name


def check_apart(final: Path, *read: Path | str) -> None:
    """Refuse an output folder that contains an input, since `overwrite` would remove it. Raises InputError."""
    for name in read:
        path = Path(expand_home(name))
        if path.exists() and path.resolve().is_relative_to(final):
            raise InputError(f"{final}: is or contains {name}, which is an input; give another output folder")


def read_text(path: Path | str) -> str:
    """The UTF-8 text of a file (a leading byte order mark dropped, line ends as `\\n`).

    Raises:
        InputError: no such file, a folder, no permission, or not UTF-8.
    """
    path = Path(expand_home(path))
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder; name a file in it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path | str) -> Any:
    """The JSON document in a file.

    Raises:
        InputError: the file cannot be read or is not JSON; names line and column.
    """
    text = read_text(path)
    try:
        return well_formed(json.loads(text))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON, {error.msg} (line {error.lineno}, column {error.colno})") from error


def well_formed(value: Any) -> Any:
    """A value with every unpaired surrogate in its texts replaced, at any depth.

    JSON may hold one, half of an emoji; no tokenizer takes it, and no file can hold it.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    elif isinstance(value, Mapping):
        return {key: well_formed(part) for key, part in value.items()}
    elif isinstance(value, list):
        return [well_formed(part) for part in value]
    return value
