"""The cost of training, measured by running its own code on tensors without contents: bytes alive and their peak,
multiplications, bytes moved. No weights are read and nothing large is computed.

Floating-point tensors are fake (torch's FakeTensorMode), on a simulated CPU; whole numbers (tokens, positions, masks)
are real, so that shapes which depend on the text are right.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, UntypedStorage, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from linearize.ops.blocking import counting_repeats

REAL_NUMBERS = 2**23  # whole-number tensors up to so many numbers are computed for real
_ATEN = torch.ops.aten
_SAME = (_ATEN.allclose.default, _ATEN.equal.default)
_DEPEND_ON_CONTENTS = (_ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.index.Tensor, *_SAME)

_swap_tensors = torch.utils.swap_tensors


class Operation(NamedTuple):
    """One operation of torch: multiply-adds times two, bytes read and written, bytes of one number of its result."""

    flops: int
    moved: int
    itemsize: int


Arguments = tuple[Any, ...]  # of an operation of torch
Keywords = dict[str, Any]


class Meter(TorchDispatchMode):
    """Counts memory and work of operations. `alive`: bytes of tensors made inside that still exist; `peak`: the most
    since `restart`; `operations`: those that compute something, since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, 0
        self.operations: list[Operation] = []
        self._repeats = 1.0
        self._storages: dict[int, weakref.ref[UntypedStorage]] = {}

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._hold(tensor)

    def restart(self) -> int:
        """Reset peak and operations; return the bytes alive now."""
        self.peak = self.alive
        self.operations = []
        return self.alive

    def scale(self, factor: float) -> None:
        """Count each of the operations that follow `factor` times as often as before."""
        self._repeats *= factor

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Arguments = (), kwargs: Keywords | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = _run(func, args, kwargs)
        made = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        new = sum([self._hold(tensor) for tensor in made])
        if new or func._schema.is_mutable:
            self._note(func, args, kwargs, result, made)
        return result

    def _note(self, func: OpOverload, args: Arguments, kwargs: Keywords, result: object, made: list[Tensor]) -> None:
        tensors = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
        count = flop_registry.get(func._overloadpacket)
        flops = int(count(*args, **kwargs, out_val=result)) if count else 0
        moved = sum(
            min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()) for tensor in tensors + made
        )
        operation = Operation(flops, moved, made[0].itemsize if made else 4)
        self.operations += [operation] * round(self._repeats)

    def _hold(self, tensor: Tensor) -> bool:
        """Record a tensor's memory; return whether it is new."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return False

        def gone(_: object) -> None:
            self._storages.pop(key, None)
            self.alive -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        return True


@contextmanager
def simulation(mode: FakeTensorMode | None = None) -> Iterator[Meter]:
    """Build and run models without contents inside the `with` block; the meter counts their memory and work.

    `mode`: what tensors that shall be used again were made in (`no_contents`).
    """
    meter = Meter()
    with warnings.catch_warnings(), patch.object(torch.utils, "swap_tensors", _swap), mode or no_contents(), meter:
        warnings.simplefilter("ignore")
        with counting_repeats(meter.scale):
            yield meter


def no_contents() -> FakeTensorMode:
    """The mode that creates tensors without contents; tensors of different modes cannot be combined."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; shared memory counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def weight_bytes(*models: nn.Module) -> int:
    """Bytes of the parameters and buffers of models, shared ones once."""
    return tensor_bytes(tensor for model in models for tensor in (*model.parameters(), *model.buffers()))


def _swap(old: Tensor, new: Tensor) -> None:
    """Replacement of a parameter as in `Module.to`; torch's own rejects some tensors without contents."""
    if isinstance(old, FakeTensor):
        old.data = new.data
    else:
        _swap_tensors(old, new)


def _run(func: OpOverload, args: Arguments, kwargs: Keywords) -> object:
    """Run an operation on contents if there are any, else on shapes alone."""
    tensors = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
    if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
        return _on_contents(func, args, kwargs)
    if func is _ATEN._local_scalar_dense.default:
        dtype = tensors[0].dtype
        return 1.0 if dtype.is_floating_point else 0 if dtype == torch.bool else 1
    if func in _SAME:
        return tensors[0].shape == tensors[1].shape
    if func is _ATEN.nonzero.default:  # as if nothing were zero
        return _all_indices(tensors[0])
    if func is _ATEN.index.Tensor:
        args = (args[0], [index for tensor in args[1] for index in _as_numbers(tensor)])
    return func(*args, **kwargs)


def _on_contents(func: OpOverload, args: Arguments, kwargs: Keywords) -> object:
    """An operation on real tensors, or none: real if its result is whole numbers, not too many, or depends on them."""
    if func in _DEPEND_ON_CONTENTS or func._schema.is_mutable:
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    if _is_small(func, args, kwargs):  # computing it takes less than finding its shape
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not result.is_floating_point():
            return result
    result = func(*args, **kwargs)
    made = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
    if made and all(not tensor.is_floating_point() and tensor.numel() <= REAL_NUMBERS for tensor in made):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    return result


def _as_numbers(index: Tensor | None) -> list[Tensor | None]:
    """An index as whole numbers: a mask becomes the places where it is true (all of them where it has no contents)."""
    if index is None or index.dtype != torch.bool:
        return [index]
    if isinstance(index, FakeTensor):
        return list(_all_indices(index).unbind(1))
    with unset_fake_temporarily():
        return list(index.nonzero().unbind(1))


def _all_indices(tensor: Tensor) -> Tensor:
    with unset_fake_temporarily():
        return torch.cartesian_prod(*(torch.arange(size) for size in tensor.shape)).view(-1, tensor.dim())


def _is_small(func: OpOverload, args: Arguments, kwargs: Keywords) -> bool:
    """Whether an operation on whole numbers makes no large tensor: a view, or a pointwise one of a small shape."""
    tensors = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
    if not tensors or any(tensor.is_floating_point() for tensor in tensors):
        return False
    if getattr(func, "is_view", False):
        return True
    if torch.Tag.pointwise not in func.tags:
        return False
    return math.prod(torch.broadcast_shapes(*(tensor.shape for tensor in tensors))) <= REAL_NUMBERS
