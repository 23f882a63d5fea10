"""Which form of an operation runs, where a test or a benchmark forces one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ForcedForm:
    """The form of one operation that is forced, if any; each operation has its own.

    A plain attribute, for all threads: `torch.compile` sees it, and compiles again where it changes.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self._name: str | None = None

    def get(self) -> str | None:
        """Its name in the operation's `FORMS`; None: the operation chooses."""
        return self._name

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Force one form of `FORMS` inside the `with` block (tests, benchmarks)."""
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before
