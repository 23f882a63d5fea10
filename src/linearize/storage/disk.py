"""What a disk is asked for: room, told in one line where there is none, and locks that end with their process."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from linearize.errors import InputError
from linearize.numbers import size_text

_TOO_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOLD = (*map(os.strerror, _TOO_FULL), "PytorchStreamWriter failed writing file")  # by libraries, in their own errors


class DiskFullError(OSError):
    """A disk, a quota or a limit on a file's size is full; the message says what was being written, and where."""


@contextmanager
def writing(what: str, folder: Path | str, num_bytes: int | None = None) -> Iterator[None]:
    """Whatever a library raises inside because the disk is full becomes one `DiskFullError`.

    `what` begins the message ("the student's weights"); `num_bytes`, where known, are asked for before anything is
    written.
    """
    folder = Path(folder)
    if num_bytes is not None and num_bytes > _free(folder):
        raise DiskFullError(_told(what, folder, num_bytes, errno.ENOSPC))
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        code = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
        raise DiskFullError(_told(what, folder, num_bytes, code)) from error


def is_disk_full(error: BaseException) -> bool:
    """Also by text: libraries that write files tell it in exceptions of their own."""
    full = isinstance(error, OSError) and error.errno in _TOO_FULL
    return full or isinstance(error, DiskFullError) or any(words in str(error) for words in _TOLD)


def sync(path: Path) -> None:
    """Make a file, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_created(final: Path, error: OSError) -> Exception:
    """What to raise where an output folder cannot be made."""
    if is_disk_full(error):
        return error
    return InputError(f"{final}: cannot create the output folder ({error.strerror}); give another one")


def lock(path: Path, final: Path, *, shared: bool = False, waits: Callable[[str], None] | None = None) -> int:
    """The descriptor of a locked file, which is made; closing it, or the end of the process, lets go of it.

    Where another process that lives has it, `waits` is told which one, and then waited.

    Raises:
        InputError: there is such a process and no `waits`; named with what is written, `final`.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
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
        with suppress(OSError):  # between opening and locking, the last holder may have removed the file
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                with suppress(OSError):
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
        os.close(descriptor)


def _told(what: str, folder: Path, num_bytes: int | None, code: int) -> str:
    needed = "" if num_bytes is None else f", {size_text(num_bytes)} needed"
    return (
        f"{what} cannot be written to {folder}: {os.strerror(code)} ({size_text(_free(folder))} free{needed}): "
        "make room, then give the same command again"
    )


def _free(path: Path) -> int:
    """Bytes left where a path is, or will be."""
    return shutil.disk_usage(next(parent for parent in (path, *path.absolute().parents) if parent.exists())).free
