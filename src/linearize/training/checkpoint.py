"""A stage's checkpoint: one safetensors file, its scalars as JSON in the header, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize.errors import InputError

FILE = "checkpoint.safetensors"
PARAMETER = "parameter/"  # the names of trained parameters start with it


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a stage stands. `identity` says which run it belongs to; `scalars` is the rest; all of it is JSON."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]
    identity: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replaces the checkpoint in `folder` in one atomic step; a kill at any point leaves the old one or the new one.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE}.partial"
    metadata = {
        "scalars": json.dumps(checkpoint.scalars, allow_nan=False),
        "identity": json.dumps(checkpoint.identity, allow_nan=False),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    try:
        save_file(tensors, partial, metadata=metadata)
        _sync(partial)
        os.replace(partial, folder / FILE)
    except SafetensorError as error:
        raise OSError(f"cannot write the checkpoint {partial}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    _sync(folder)


def load_checkpoint(
    folder: Path, *, identity: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Checkpoint | None:
    """The checkpoint in `folder` with tensors on the CPU, or None if there is none.

    Raises:
        InputError: the file is no checkpoint, it belongs to another run than `identity`, or its parameters (names that
            start with `PARAMETER`) have not exactly these names and shapes.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            metadata = file.metadata() or {}
        saved = json.loads(metadata["identity"])
        scalars = json.loads(metadata["scalars"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is not a readable checkpoint ({error!r}): delete it to start the stage anew"
        ) from error
    _check_identity(path, saved, json.loads(json.dumps(dict(identity))))
    held = {name: tuple(value.shape) for name, value in tensors.items() if name.startswith(PARAMETER)}
    wrong = [name for name in sorted({*held, *shapes}) if held.get(name) != shapes.get(name)]
    if wrong:
        raise InputError(
            f"{path} does not fit the stage: {wrong[0]} has shape {held.get(wrong[0])} there, "
            f"not {shapes.get(wrong[0])}: delete it to start the stage anew"
        )
    return Checkpoint(tensors=tensors, scalars=scalars, identity=saved)


def _check_identity(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that another run wrote, naming the first settings that differ."""
    old, new = _flat(saved), _flat(asked)
    differing = [key for key in sorted({*old, *new}) if old.get(key, "unset") != new.get(key, "unset")]
    if differing:
        shown = "; ".join(f"{key} was {old.get(key, 'unset')}, is {new.get(key, 'unset')}" for key in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"{path} belongs to another run ({shown}{more}): run with the same settings to continue it, or delete it"
        )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def _sync(path: Path) -> None:
    """Makes a file or a folder's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
