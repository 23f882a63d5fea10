"""Memory that is free goes back to the system while weights are rounded one after another."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_SMALL, _LARGEST = 2**20, 2**25  # bytes; glibc raises its threshold by itself up to the second


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, memory of a mebibyte and more returns to the system when it is freed.

    Otherwise glibc puts the codes of a weight into the hole that the whole weight left, grows for the next one, and the
    process holds all of the model in the end. Afterwards its thresholds are those that it reaches by itself.
    """
    libc = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
