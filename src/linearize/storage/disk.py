"""Full disks, quotas and file size limits, reported as one line; and `fsync`."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linearize.errors import InputError
from linearize.numbers import size_text

_TOO_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = (*map(os.strerror, _TOO_FULL), "PytorchStreamWriter failed writing file")  # in errors of libraries


class DiskFullError(OSError):
    """A disk, a quota or a limit on a file's size is full; the message says what was being written, and where."""


@contextmanager
def writing(what: str, folder: Path | str, num_bytes: int | None = None) -> Iterator[None]:
    """Turn any error inside that a full disk caused into a `DiskFullError`.

    `what` begins the message ("the student's weights"). Where `num_bytes` is known, check that they are free first.
    """
    folder = Path(folder)
    if num_bytes is not None and num_bytes > _free(folder):
        raise DiskFullError(_message(what, folder, num_bytes, errno.ENOSPC))
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        code = error.errno if isinstance(error, OSError) and error.errno else errno.ENOSPC
        raise DiskFullError(_message(what, folder, num_bytes, code)) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full, by its number or, for errors of libraries, by its text."""
    full = isinstance(error, OSError) and error.errno in _TOO_FULL
    return full or isinstance(error, DiskFullError) or any(text in str(error) for text in _FULL_TEXTS)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, so that a power cut does not lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def not_created(final: Path, error: OSError) -> Exception:
    """The exception to raise where an output folder cannot be created."""
    if is_disk_full(error):
        return error
    return InputError(f"{final}: cannot create the output folder ({error.strerror}); give another one")


def _message(what: str, folder: Path, num_bytes: int | None, code: int) -> str:
    needed = "" if num_bytes is None else f", {size_text(num_bytes)} needed"
    return (
        f"{what} cannot be written to {folder}: {os.strerror(code)} ({size_text(_free(folder))} free{needed}): "
        "free some space, then run the same command again"
    )


def _free(path: Path) -> int:
    """Bytes free on the disk of a path, which may not exist yet."""
    return shutil.disk_usage(next(parent for parent in (path, *path.absolute().parents) if parent.exists())).free
