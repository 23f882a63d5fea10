"""A stage's checkpoint: one safetensors file, its scalars and a checksum as JSON in the header, written whole or not at
all. The previous one is kept, in case the newest is damaged."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from linearize.errors import InputError, one_line
from linearize.modeling.io.integrity import crc32
from linearize.storage.disk import is_disk_full, sync, writing
from linearize.version import __version__

FORMAT = 1  # of the file; goes up when an older version would misread it
FILE = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
PARAMETER = "parameter/"  # the names of trained parameters start with it
LOG = logging.getLogger("linearize")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The progress of a stage. `identity`: the run that it belongs to; `scalars`: the rest. Both are JSON."""

    tensors: dict[str, Tensor]
    scalars: dict[str, Any]
    identity: dict[str, object]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, last: bool = False) -> None:
    """Replace the checkpoint in `folder` in one atomic step; a kill at any point leaves the old one or the new one.

    The old one becomes the previous one, unless this is the `last` (of a stage that ended) or the disk is too small.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE}.partial"
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    metadata = {
        "format": str(FORMAT),
        "linearize": __version__,
        "scalars": json.dumps(checkpoint.scalars, allow_nan=False),
        "identity": json.dumps(checkpoint.identity, allow_nan=False),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    try:
        try:
            _write(tensors, partial, metadata)
        except OSError as error:
            if not is_disk_full(error) or not (folder / PREVIOUS).is_file():
                raise
            (folder / PREVIOUS).unlink()  # space for the new one matters more
            _write(tensors, partial, metadata)
        if (folder / FILE).is_file() and not last:
            os.replace(folder / FILE, folder / PREVIOUS)
        os.replace(partial, folder / FILE)
    finally:
        partial.unlink(missing_ok=True)
    if last:
        (folder / PREVIOUS).unlink(missing_ok=True)
    sync(folder)


def load_checkpoint(
    folder: Path, *, identity: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> Checkpoint | None:
    """The newest intact checkpoint in `folder`, with tensors on the CPU, or None if there is none.

    A damaged one (truncated, or its checksum does not fit) is removed, with one warning.

    Raises:
        InputError: it has another format, it belongs to another run than `identity`, or its parameters (names that
            start with `PARAMETER`) have not exactly these names and shapes.
    """
    damaged: list[str] = []
    checkpoint, path = None, folder / FILE
    for path in (folder / FILE, folder / PREVIOUS):
        if path.is_file():
            try:
                checkpoint = _read(path)
            except InputError:
                raise
            except (SafetensorError, KeyError, ValueError) as error:
                damaged.append(f"{path} is damaged ({one_line(error)})")
                path.unlink(missing_ok=True)
            else:
                break
    if damaged:
        left = "the stage starts anew" if checkpoint is None else "the stage continues from the checkpoint before it"
        LOG.warning("%s and was removed: %s", "; ".join(damaged), left)
    if checkpoint is None:
        return None
    check_identity(path, checkpoint.identity, json.loads(json.dumps(dict(identity))))
    stored = {name: tuple(value.shape) for name, value in checkpoint.tensors.items() if name.startswith(PARAMETER)}
    wrong = [name for name in sorted({*stored, *shapes}) if stored.get(name) != shapes.get(name)]
    if wrong:
        raise InputError(
            f"{path} does not fit the stage: {wrong[0]} has shape {stored.get(wrong[0])} there, "
            f"not {shapes.get(wrong[0])}: delete it to start the stage anew"
        )
    return checkpoint


def check_formats(work: Path) -> None:
    """Refuse a run's folder that another version wrote a checkpoint into, before any work.

    Raises:
        InputError: such a file, named with its version.
    """
    for path in sorted(work.rglob("checkpoint*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError):
            continue  # damaged: reported and handled when its stage begins
        _check_format(path, metadata)


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    file_format, version = metadata.get("format", "0"), metadata.get("linearize", "an older version")
    if file_format != str(FORMAT):
        raise InputError(
            f"{path} was written by linearize {version} in format {file_format}; this is {__version__} with format "
            f"{FORMAT}: finish the run with that version, or delete the folder"
        )


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write the file and sync it. Raises OSError; for a full disk the message says what was to be written where."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        with writing("the checkpoint", path.parent, size):
            save_file(tensors, path, metadata=metadata)
            sync(path)
    except SafetensorError as error:
        raise OSError(f"cannot write the checkpoint {path}: {error}") from error


def _read(path: Path) -> Checkpoint:
    """Read an intact file. Raises ValueError, KeyError or SafetensorError for a damaged one."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        _check_format(path, metadata)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    if _checksum(tensors, metadata) != metadata["checksum"]:
        raise ValueError("its checksum does not fit")
    return Checkpoint(
        tensors=tensors, scalars=json.loads(metadata["scalars"]), identity=json.loads(metadata["identity"])
    )


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Checksum over everything in the file except itself."""
    return crc32(tensors, "/".join((metadata["scalars"], metadata["identity"])).encode())


def check_identity(path: Path, saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Raise `InputError` for a checkpoint of another run; the message names the first settings that differ."""
    old, new = _flat(saved), _flat(current)
    differing = [key for key in sorted({*old, *new}) if old.get(key, "unset") != new.get(key, "unset")]
    if differing:
        shown = "; ".join(f"{key} was {old.get(key, 'unset')}, is {new.get(key, 'unset')}" for key in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(
            f"{path} belongs to another run ({shown}{more}): run with the same settings to continue it, or delete it"
        )


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested mappings into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat
