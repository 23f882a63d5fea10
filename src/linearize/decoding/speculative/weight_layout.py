"""Products of weights with a few tokens while a text is speculated on: turned round at once, packed once it pays."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, Self

from torch import nn

from linearize.errors import InputError
from linearize.modeling.prepacked_linear import packed_projections, turned_projections

Pack = bool | Literal["auto"]
WORTH = 128  # new tokens from which packing, and making the plain weights again, costs less than it saves


class Products:
    """Forms of the projections of some models, as long as the block lasts.

    `pack`: False leaves them as they are, True packs at once, `auto` packs where `consider` is told that it pays.
    """

    def __init__(self, models: Sequence[nn.Module], pack: Pack) -> None:
        self._models, self._pack, self._stack = models, pack, ExitStack()
        self._packed = False

    def __enter__(self) -> Self:
        if self._pack is True:
            self._change()
        elif self._pack == "auto":
            self._stack.enter_context(turned_projections(*self._models))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def consider(self, *, pays: bool, room: int) -> None:
        """Pack where guessing is known to pay and there is room for many tokens more; once."""
        if self._pack == "auto" and not self._packed and pays and room >= WORTH:
            self._change()

    def _change(self) -> None:
        self._stack.close()
        self._stack.enter_context(packed_projections(*self._models))
        self._packed = True


def check_pack(pack: Pack) -> None:
    """Raises InputError for anything but true, false and `auto`."""
    if not isinstance(pack, bool) and pack != "auto":
        raise InputError(f"pack is {pack!r}: give true, false or auto")
