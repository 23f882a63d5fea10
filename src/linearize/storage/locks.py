"""Locks that end with their process, also by SIGKILL, and the lock on an output folder.

They are the system's own (`flock`), taken directly. `filelock` (4.2) takes the same lock but does not fit here: it has
no shared mode on one file, its error does not name the holder, it leaves the lock file behind, and on a file system
without locks it uses a marker file instead, which a killed process leaves behind to block every later run.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from linearize.errors import InputError
from linearize.storage.disk import not_created
from linearize.storage.files import expand_home


@contextmanager
def output_lock(final: Path | str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock on an output folder: one run at a time writes it, or several `shared` ones that coordinate.

    The lock is on `.NAME.lock` next to the folder. An exclusive holder first clears up what dead runs left
    (`clear_leftovers`).

    Raises:
        InputError: a live run holds it, or the folder's parent cannot be written.
    """
    final = Path(expand_home(final)).resolve()
    created = _make_parents(final)
    path = final.parent / f".{final.name}.lock"
    descriptor = lock(path, final, shared=shared)
    try:
        if not shared:
            clear_leftovers(final)
        yield
    finally:
        if not shared:
            path.unlink(missing_ok=True)
        os.close(descriptor)
        for parent in created:  # a refused command leaves nothing behind
            with suppress(OSError):
                parent.rmdir()


def lock(path: Path, final: Path, *, shared: bool = False, waits: Callable[[str], None] | None = None) -> int:
    """Create and lock a file, and return its descriptor; closing it, or the end of the process, releases the lock.

    Where a live process holds it, call `waits` with the holder's name and wait. `final`: what is written, for messages.

    Raises:
        InputError: a live process holds it and `waits` is None.
    """
    try:
        import fcntl
    except ImportError:  # a system without flock
        return os.open(os.devnull, os.O_RDONLY)
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise not_created(final, error) from error
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace") or "another process"
            if waits is None:
                os.close(descriptor)
                raise InputError(
                    f"{final}: is being written by {holder}: wait for it or stop it, or give another output folder"
                ) from None
            waits(holder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            return descriptor  # a file system without locks
        with suppress(OSError):  # the last holder may have removed the file after it was opened
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                with suppress(OSError):
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
        os.close(descriptor)


def clear_leftovers(final: Path) -> None:
    """Remove what killed runs left next to `final`, and put back an old folder that was not yet replaced."""
    for aside in final.parent.glob(f".{_escaped(final.name)}.old-*"):
        if not final.exists() and (aside / final.name).is_dir():
            (aside / final.name).rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    for folder in final.parent.glob(f".{_escaped(final.name)}.partial-*"):
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
    if final.is_dir():
        for file in final.glob(".*.partial-*"):
            file.unlink(missing_ok=True)


def _make_parents(final: Path) -> list[Path]:
    """Create the parent folders; returns those that did not exist, the deepest first."""
    missing = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_created(final, error) from error
    return missing


def _escaped(name: str) -> str:
    """A name as a pattern for `glob` that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
