"""How target and draft hold their weights: equal ones once; on a CPU in the layout that is fastest for a few tokens.

Both models multiply a few tokens at a time. Such products are transposed from the start, which costs nothing, and
weights are packed into blocks once that is worth its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, Self

import torch
from torch import nn

from linearize.errors import InputError
from linearize.modeling.prepacked_linear import packed_projections, transposed_projections

Pack = bool | Literal["auto"]
MIN_TOKENS = 128  # new tokens from which packing, and making the plain weights again, costs less than it saves


class WeightLayout:
    """Changes the layout of the projections of some models for as long as the `with` block lasts.

    `pack`: False leaves them as they are, True packs at once, `auto` packs when `consider` says that it pays.
    """

    def __init__(self, models: Sequence[nn.Module], pack: Pack) -> None:
        self._models, self._pack, self._stack = models, pack, ExitStack()
        self._packed = False

    def __enter__(self) -> Self:
        if self._pack is True:
            self._pack_weights()
        elif self._pack == "auto":
            self._stack.enter_context(transposed_projections(*self._models))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def consider(self, *, pays: bool, tokens_left: int) -> None:
        """Pack, once, where speculation is known to pay and many tokens may follow."""
        if self._pack == "auto" and not self._packed and pays and tokens_left >= MIN_TOKENS:
            self._pack_weights()

    def _pack_weights(self) -> None:
        self._stack.close()
        self._stack.enter_context(packed_projections(*self._models))
        self._packed = True


def check_pack(pack: Pack) -> None:
    """Raise InputError for anything but true, false and `auto`."""
    if not isinstance(pack, bool) and pack != "auto":
        raise InputError(f"pack is {pack!r}: give true, false or auto")


def share_equal_weights(model: nn.Module, other: nn.Module) -> int:
    """Store parameters of `model` that are equal, bit for bit, to those of the same name in `other` only once.

    Names are compared without a student's prefix `lm.`. Both models are meant for inference: training one of them would
    change the other. Returns the bytes that were freed.
    """
    known = {_name(name): parameter for name, parameter in other.named_parameters(remove_duplicate=False)}
    freed = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            twin = known.get(_name(name))
            if twin is None or not _could_share(parameter, twin) or not torch.equal(_bits(parameter), _bits(twin)):
                continue
            parameter.data = twin.data
            freed += parameter.numel() * parameter.element_size()
    return freed


def _name(name: str) -> str:
    return name.removeprefix("lm.")


def _could_share(one: nn.Parameter, two: nn.Parameter) -> bool:
    alike = one.shape == two.shape and one.dtype == two.dtype and one.device == two.device
    return alike and one.device.type != "meta" and one.data_ptr() != two.data_ptr()


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor: equal values need not be equal bits (zeros, NaN)."""
    return x.detach().contiguous().view(torch.uint8) if x.dim() else x.detach().reshape(1).view(torch.uint8)
