"""Which form of an operation runs, where a test or a benchmark forces one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class ForcedForm:
    """The form of one operation that is forced, if any; each operation has its own."""

    def __init__(self, operation: str) -> None:
        self._name: ContextVar[str | None] = ContextVar(f"{operation}_form", default=None)

    def get(self) -> str | None:
        """Its name in the operation's `FORMS`; None: the operation chooses."""
        return self._name.get()

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Force one form of `FORMS` inside the `with` block (tests, benchmarks)."""
        token = self._name.set(name)
        try:
            yield
        finally:
            self._name.reset(token)
