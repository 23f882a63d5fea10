"""Return unused memory to the system at once (Linux with glibc; elsewhere this does nothing)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

LARGE_BYTES = 2**20
_MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD
_PAGE_OUT = 21  # madvise's MADV_PAGEOUT: never changes what is read later
_PAGE = 4096


def return_large_blocks() -> None:
    """From now on freed blocks of `LARGE_BYTES` and more leave the process.

    glibc otherwise learns to keep blocks of up to 32 MB: weights that are whole for a moment only, among parts that
    stay, then cost the memory of all of them.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, LARGE_BYTES)


class MappedFiles:
    """The safetensors files that are mapped into memory now."""

    def __init__(self) -> None:
        self.spans = list(_spans())

    def let_go(self, tensor: Tensor) -> None:
        """Release the pages of a tensor that is mapped from such a file; its values stay the file's."""
        start, size = tensor.data_ptr(), tensor.nbytes
        inside = any(low <= start and start + size <= high for low, high in self.spans)
        first, last = -(-start // _PAGE) * _PAGE, (start + size) // _PAGE * _PAGE
        if inside and last > first:
            with suppress(OSError, AttributeError):
                advise: Any = ctypes.CDLL("libc.so.6").madvise
                advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _PAGE_OUT)


def _spans() -> Iterator[tuple[int, int]]:
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            if line.endswith(".safetensors"):
                low, _, high = line.split()[0].partition("-")
                yield int(low, 16), int(high, 16)


def resident_bytes() -> int:
    """Bytes of memory that this process has now; 0 if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)
