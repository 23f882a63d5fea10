"""A stage's checkpoint in either of its two forms: one safetensors file, or, where parameters are sharded over
processes, a folder that every rank writes its part of (torch.distributed.checkpoint).

A folder is written under a temporary name and renamed, so it is whole or not there; the one before it stays, for the
case that the newest is damaged. Either form continues on any number of processes.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.errors import InputError, one_line
from linearize.modeling.io.integrity import file_crc32
from linearize.storage.atomic import atomic_write_text
from linearize.storage.disk import sync, writing
from linearize.training.checkpoint import (
    FILE,
    FORMAT,
    PARAMETER,
    PREVIOUS,
    Checkpoint,
    check_identity,
    load_checkpoint,
    save_checkpoint,
)
from linearize.training.distributed import Group, current
from linearize.version import __version__

PREFIX = "checkpoint-"
STATE = "state.json"
LOG = logging.getLogger("linearize")


def save_stage(folder: Path, checkpoint: Checkpoint, *, sharded: bool = False, last: bool = False) -> None:
    """Replace the checkpoint in `folder`; a kill at any point leaves the old one or the new one.

    Where tensors are `sharded` all ranks call it, else rank 0 alone. The old one is kept, except for the `last`.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    if not sharded:
        save_checkpoint(folder, checkpoint, last=last)
        _remove(folder, keep=0)
        return
    group = current()
    number: int = group.share(lambda: max([*_numbers(folder), 0]) + 1)
    final = folder / f"{PREFIX}{number}"
    partial = folder / f"{final.name}.partial"
    if group.leads:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    group.wait()
    _write(partial, checkpoint.tensors)
    if group.leads:
        _write_state(partial, checkpoint)
        partial.rename(final)
        sync(folder)
        _remove(folder, keep=1 if last else 2)
        for name in (FILE, PREVIOUS):
            (folder / name).unlink(missing_ok=True)
    group.wait()


def load_stage(
    folder: Path, group: Group, *, identity: Mapping[str, object], parameters: Mapping[str, Tensor]
) -> Checkpoint | None:
    """The newest intact checkpoint in `folder`, None if there is none; tensors are sharded as the parameters are.

    All ranks of the group call it. A damaged one is removed, with a warning.

    Raises:
        InputError: it has another format, belongs to another run than `identity`, or does not fit the parameters.
    """
    newest: tuple[Path, dict[str, Any]] | None = group.share(lambda: _newest(folder))
    if newest is None:
        shapes = {f"{PARAMETER}{name}": tuple(value.shape) for name, value in parameters.items()}
        return load_checkpoint(folder, identity=identity, shapes=shapes)
    path, state = newest
    check_identity(path, state["identity"], json.loads(json.dumps(dict(identity))))
    return Checkpoint(tensors=_read(path, group, parameters), scalars=state["scalars"], identity=state["identity"])


def _write_state(folder: Path, checkpoint: Checkpoint) -> None:
    """Write everything but the tensors, and the checksums of what the ranks wrote."""
    state = {
        "format": FORMAT,
        "linearize": __version__,
        "files": {path.name: file_crc32(path) for path in sorted(folder.iterdir())},
        "scalars": checkpoint.scalars,
        "identity": checkpoint.identity,
    }
    atomic_write_text(folder / STATE, json.dumps(state, allow_nan=False))
    sync(folder)


def _newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact folder and its state; damaged ones are removed."""
    for number in sorted(_numbers(folder), reverse=True):
        path = folder / f"{PREFIX}{number}"
        try:
            state = json.loads((path / STATE).read_text("utf-8"))
            whole = all(file_crc32(path / name) == crc for name, crc in state["files"].items())
        except (OSError, ValueError, KeyError):
            whole = False
        if whole and state["format"] == FORMAT:
            return path, state
        if whole:
            raise InputError(
                f"{path} was written by linearize {state['linearize']} in format {state['format']}; this is "
                f"{__version__} with format {FORMAT}: finish the run with that version, or delete the folder"
            )
        LOG.warning("%s is damaged and was removed: the stage continues from the checkpoint before it", path)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _numbers(folder: Path) -> list[int]:
    """The numbers of the complete folders."""
    numbers = (path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*"))
    return [int(name) for name in numbers if name.isdigit()]


def _remove(folder: Path, keep: int) -> None:
    """Remove all folders but the newest few, and incomplete ones."""
    kept = {f"{PREFIX}{number}" for number in sorted(_numbers(folder), reverse=True)[:keep]}
    for path in folder.glob(f"{PREFIX}*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    from torch.distributed.checkpoint import FileSystemWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with writing("the checkpoint", folder.parent), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(dict(tensors), storage_writer=FileSystemWriter(folder, sync_files=True))
    except CheckpointException as error:
        raise OSError(f"cannot write the checkpoint {folder}: {one_line(error)}") from error


def _read(folder: Path, group: Group, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(folder)
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    stored = {name: tuple(entry.size) for name, entry in entries.items()}
    expected = {f"{PARAMETER}{name}": tuple(value.shape) for name, value in parameters.items()}
    here = {name: shape for name, shape in stored.items() if name.startswith(PARAMETER)}
    if wrong := [name for name in sorted({*here, *expected}) if here.get(name) != expected.get(name)]:
        raise InputError(
            f"{folder} does not fit the stage: {wrong[0]} has shape {here.get(wrong[0])} there, not "
            f"{expected.get(wrong[0])}: delete it to start the stage anew"
        )
    tensors = {name: _memory_like(parameters[name.partition("/")[2]], shape) for name, shape in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(tensors, storage_reader=reader, no_dist=group.ranks == 1)
    return tensors


def _memory_like(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor for a parameter or its moments, sharded as the parameter is; AdamW's step count is whole."""
    return torch.empty_like(parameter.detach()) if shape == tuple(parameter.shape) else torch.zeros(shape)
