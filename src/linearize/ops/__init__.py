"""Pure operations: tensors and a state in, outputs and a state out. Nothing here knows of models.

States are frozen values whose tensors all have the batch first (`TensorState`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TensorState:
    """Base of frozen dataclasses that hold tensors (and None, and plain numbers)."""

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same state with `change` applied to every tensor; all have the batch first."""
        changed = {f.name: change(x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **changed)

    def widened(self, more: int) -> Self:
        """The same state with room for calls that commit `more` further tokens at once; most states need none."""
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes held by the state's tensors."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def tensors(state: Any) -> list[Tensor]:
    """All tensors of a state, in one order."""
    collected: list[Tensor] = []

    def collect(x: Tensor) -> Tensor:
        collected.append(x)
        return x

    state.map_batch(collect)
    return collected
