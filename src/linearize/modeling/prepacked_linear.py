"""Projections for a few tokens at a time on a CPU: weights are packed once, so that no call has to rearrange them.

A product of a weight with one token reads the weight once. With a few tokens torch first copies the weight into blocks,
which takes longer than the product itself: verification would pay for it in every projection. oneDNN can keep the
blocks. They serve any number of tokens, one included, so the plain weights are freed meanwhile and made again from the
blocks, bit for bit, at the end: nothing is held twice. Weights that something else uses as well (an embedding that is
the head too) stay plain, and multiply in the form that is fastest for a few tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.errors import InputError
from linearize.modeling.library_internals import can_pack_weights, packed_product, packed_weight

LAID_OUT_FOR = 64  # tokens that oneDNN is told a call has; layouts made for fewer were no faster with fewer
TRANSPOSED = ((8.0, 9), (0.0, 5))  # outputs per input from which W x^T is faster than x W^T, and up to how many tokens
SMALLEST = 1 << 16  # numbers of a weight below which the call costs more than the copy


@contextmanager
def packed_projections(*models: nn.Module, twice: bool = False) -> Iterator[int]:
    """Pack the weights of projections into blocks inside the `with` block; yield the number of packed projections.

    `twice`: also those that something else uses as well (an embedding that is the head too), which are then held twice.
    Only fp32 weights on a CPU are packed. Memory: one weight more while packing, and nothing more afterwards, unless
    something outside these models holds the weights too: give models that share weights (a draft and its target)
    together. Inside the block `weight` of such a projection is on the meta device: it has a shape and no numbers, and a
    call with gradients raises InputError. Afterwards everything is restored, gradients included.
    """
    linears = [linear for model in models for linear in _packable(model)]
    others = _used_elsewhere(models, linears)
    packs = [_Pack(linear, id(linear.weight)) for linear in dict.fromkeys(linears)]
    stores: dict[tuple[int, torch.Size], _Store] = {}
    try:
        for pack in packs:
            weight = pack.linear.weight
            if weight.data_ptr() in others and not twice:
                pack.transpose()
            else:
                pack.enter(stores)
            del weight
        yield sum(pack.store is not None for pack in packs)
    finally:
        for pack in packs:
            pack.leave()


@contextmanager
def transposed_projections(*models: nn.Module) -> Iterator[int]:
    """Multiply a few tokens as W x^T inside the `with` block, which costs no memory and no time to enter.

    Only with fp32 weights on a CPU, and only without gradients. Yields the number of such projections.
    """
    packs = [_Pack(linear, id(linear.weight)) for model in models for linear in _packable(model)]
    try:
        for pack in packs:
            pack.transpose()
        yield len(packs)
    finally:
        for pack in packs:
            pack.leave()


def can_pack(model: nn.Module) -> bool:
    """Whether any projection of a model would be packed."""
    return bool(_packable(model))


class _Store:
    """One weight in blocks; the parameters that were it, as long as anything else holds them."""

    def __init__(self, weight: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.blocks: Tensor = packed_weight(weight.detach(), LAID_OUT_FOR)
        self._shape = weight.shape
        self._weights: dict[int, tuple[weakref.ref[Tensor], bool]] = {}
        self._again: dict[int, nn.Parameter] = {}

    def take(self, name: int, weight: Tensor) -> nn.Parameter:
        """What stands in the place of the weight, which is remembered by `name`: its shape, no numbers."""
        self._weights[name] = weakref.ref(weight), weight.requires_grad
        return nn.Parameter(torch.empty(self._shape, device="meta"), requires_grad=False)

    def give_back(self, name: int) -> nn.Parameter:
        """The parameter itself, or one that is equal to it."""
        reference, trained = self._weights[name]
        if isinstance(weight := reference(), nn.Parameter):
            return weight
        if name not in self._again:
            self._again[name] = nn.Parameter(self._plain(), requires_grad=trained)
        return self._again[name]

    def _plain(self) -> Tensor:
        """The numbers: one storage for all parameters that had one."""
        alive = [weight for reference, _ in self._weights.values() if (weight := reference()) is not None]
        for parameter in (*alive, *self._again.values()):
            return parameter.detach()
        with torch.inference_mode(False), torch.no_grad():
            return self.blocks.to_dense()


@dataclass
class _Pack:
    """One projection, while it is packed. `name`: identity of its weight before anything was packed."""

    linear: nn.Linear
    name: int
    store: _Store | None = None

    def enter(self, stores: dict[tuple[int, torch.Size], _Store]) -> None:
        """Use blocks, those that are there already for the same numbers in memory, and let go of the weight."""
        weight = self.linear.weight
        key = weight.data_ptr(), weight.shape
        self.store = stores[key] if key in stores else stores.setdefault(key, _Store(weight))
        self.linear.forward = partial(_packed, self.linear, self.store.blocks)  # type: ignore[method-assign]
        self.linear._parameters["weight"] = self.store.take(self.name, weight)

    def transpose(self) -> None:
        """Keep the weight as it is, in the product that is quickest for a few tokens."""
        linear = self.linear
        most = next(tokens for ratio, tokens in TRANSPOSED if linear.out_features >= ratio * linear.in_features)
        linear.forward = partial(_transposed_product, linear, most)  # type: ignore[method-assign]

    def leave(self) -> None:
        """As it was before."""
        if self.store is not None:
            self.linear._parameters["weight"] = self.store.give_back(self.name)
        vars(self.linear).pop("forward", None)


def _packable(model: nn.Module) -> list[nn.Linear]:
    if not can_pack_weights():
        return []
    return [module for module in model.modules() if type(module) is nn.Linear and _fits(module)]


def _fits(linear: nn.Linear) -> bool:
    weight = linear._parameters.get("weight")
    if weight is None or "forward" in vars(linear):
        return False
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.numel() >= SMALLEST


def _used_elsewhere(models: Sequence[nn.Module], linears: Sequence[nn.Linear]) -> set[int]:
    """Where in memory the parameters start that modules other than these have."""
    own = set(linears)
    modules = [module for model in models for module in model.modules() if module not in own]
    return {p.data_ptr() for module in modules for p in module._parameters.values() if p is not None}


def _packed(linear: nn.Linear, blocks: Tensor, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise InputError(
            "the weights are packed for decoding: call the model within torch.no_grad() or after the block"
        )
    bias = None if linear.bias is None else linear.bias.detach()
    y: Tensor = packed_product(x.to(torch.float32), blocks, bias)
    return y


def _transposed_product(linear: nn.Linear, most: int, x: Tensor) -> Tensor:
    """W x^T: nothing is rearranged for up to four tokens, and less than in x W^T for a few more."""
    rows = x.flatten(0, -2)
    if torch.is_grad_enabled() or not 1 < rows.shape[0] <= most:
        return F.linear(x, linear.weight, linear.bias)
    y = (linear.weight @ rows.mT).mT.unflatten(0, x.shape[:-1])
    return y if linear.bias is None else y + linear.bias
