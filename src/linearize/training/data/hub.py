"""Data sets of the Hub: their rows, streamed, and the commit that a name stands for. Nothing else uses the network."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from linearize.errors import InputError, one_line
from linearize.training.data.files import without_fill
from linearize.training.data.specs import HubName

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECONDS = 20.0  # to ask the Hub for a commit


def hub_rows(hub: HubName, spec: str) -> Iterator[tuple[int, object]]:
    """The rows of a split, downloaded as they are read; with a column, its texts alone.

    Raises:
        InputError: the data set, its split or the column cannot be read from here.
    """
    import datasets

    revision = {} if hub.revision is None else {"revision": hub.revision}
    try:
        with _quiet("huggingface_hub"):
            rows = datasets.load_dataset(hub.name, hub.config, split=hub.split, streaming=True, **revision)
            for number, row in enumerate(rows, 1):
                yield number, without_fill(row) if hub.column is None else {"text": _cell(row, hub.column)}
    except InputError as error:
        raise InputError(f"data {spec!r}: {error}") from error
    except Exception as error:  # of three libraries and the network
        raise InputError(
            f"data {spec!r}: no such file, and no Hub dataset that can be read from here ({one_line(error)}); "
            "check the name and the network, or give a file"
        ) from error


def commit_of(hub: HubName) -> str | None:
    """The commit that the revision stands for now; None where the Hub cannot be reached."""
    if hub.revision is not None and _COMMIT.fullmatch(hub.revision):
        return hub.revision
    from huggingface_hub import HfApi

    try:
        with _quiet("huggingface_hub"):
            return HfApi().dataset_info(hub.name, revision=hub.revision, timeout=_SECONDS).sha
    except Exception:  # of two libraries and the network; reading the rows reports it
        return None


def _cell(row: dict[str, object], column: str) -> object:
    if column not in row:
        raise InputError(f"has no column {column!r}; its columns are {', '.join(map(str, row))}")
    return row[column]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
