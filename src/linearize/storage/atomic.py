"""Files and folders that are written as a whole or not at all: under a temporary name, synced, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from linearize.errors import InputError
from linearize.storage.disk import not_created, sync, writing
from linearize.storage.files import expand_home, read_text
from linearize.storage.locks import output_lock


@contextmanager
def atomic_folder(final: Path | str, overwrite: bool = False, *, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `final`; it is renamed to `final` when the block succeeds, and removed otherwise.

    An exception (a full disk, Ctrl-C) leaves nothing at `final`, or, with `overwrite`, the old folder untouched: that
    one is removed after the new one is complete. `locked`: the caller holds `output_lock(final)`.

    Raises:
        InputError: `final` exists and `overwrite` is off, is not a folder, cannot be created, or is being written by
            another run; DiskFullError.
    """
    final = Path(expand_home(final)).resolve()
    check_free(final, overwrite)
    with nullcontext() if locked else output_lock(final), writing(f"the folder {final.name}", final.parent):
        temporary = _make_sibling(final)
        try:
            yield temporary
            check_free(final, overwrite)
            _sync_all(temporary)
            _swap_in(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def resumable_folder(final: Path | str, version: str) -> Iterator[Path]:
    """Like `atomic_folder` with `overwrite`, but the same `version` resumes what a kill or an error left."""
    final = Path(expand_home(final)).resolve()
    work = final.parent / f".{final.name}.run"
    mark = work / ".version"
    with output_lock(final), writing(f"the folder {final.name}", final.parent):
        check_free(final, overwrite=True)
        if not mark.is_file() or read_text(mark) != version:
            discard(work)
            work.mkdir()
            atomic_write_text(mark, version)
        yield work
        check_free(final, overwrite=True)
        _sync_all(work)
        _swap_in(work, final)
        (final / mark.name).unlink()


def atomic_write_text(path: Path | str, text: str) -> None:
    """`atomic_write_bytes` of UTF-8 text."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file under a temporary name, then rename: a reader sees the old file or the new one, never half."""
    path = Path(expand_home(path)).resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def discard(folder: Path) -> None:
    """Remove a folder atomically with respect to kills: rename it first, then delete."""
    if folder.is_dir():
        doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name.removesuffix('.run')}.partial-"))
        folder.rename(doomed / folder.name)
        shutil.rmtree(doomed, ignore_errors=True)


def check_free(final: Path, overwrite: bool) -> None:
    """Refuse an output folder that exists, or that may not be replaced. Raises InputError."""
    if not final.exists():
        return
    if not final.is_dir():
        raise InputError(f"{final}: exists and is not a folder; give another output folder")
    if not overwrite:
        raise InputError(f"{final}: output folder exists; give another one, or replace it with --overwrite")
    if Path.cwd().is_relative_to(final) or Path.home().is_relative_to(final):
        raise InputError(
            f"{final}: contains the working or home folder and is not replaced; give another output folder"
        )


def _sync_all(folder: Path) -> None:
    """Write everything to the disk, each file with the permissions that the user's new files have: safetensors gives
    its own to their owner alone, and a model is often served by another user."""
    usual = 0o666 & ~_umask()
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            path.chmod(path.stat().st_mode & 0o7777 | usual)
            sync(path)
        sync(Path(root))


def _make_sibling(final: Path) -> Path:
    """Create an empty folder next to `final`, on the same file system so that renaming is atomic."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.partial-"))
    except OSError as error:
        raise not_created(final, error) from error
    temporary.chmod(0o777 & ~_umask())
    return temporary


def _swap_in(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`; an old `final` is renamed first, and gets its name back if that fails."""
    if not final.exists():
        temporary.rename(final)
        sync(final.parent)
        return
    aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.old-"))
    try:
        final.rename(aside / final.name)
        temporary.rename(final)
    except BaseException:
        if not final.exists():
            (aside / final.name).rename(final)
        with suppress(OSError):
            aside.rmdir()
        raise
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
