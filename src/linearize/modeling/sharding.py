"""Base weights sharded over processes: each holds a part of every matrix, whole ones exist while they are used.

What is sharded is what fills a model: attention modules, MLPs and experts (FSDP2, `fully_shard`, each of them a unit of
its own). Embeddings, head, norms and all new parameters are whole on every process. Student and teacher share one
sharded copy as long as nothing trains it: the student's unit owns the weights, the teacher's uses them while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from linearize.memory import MappedFiles
from linearize.modeling.parallel import ParameterSlot, base_parameters, units_of, whole


@dataclass(eq=False)
class SharedShards:
    """Sharded weights of `owner` that a module of another tree uses too: whole while it runs, without gradients."""

    owner: Any
    borrower: nn.Module
    slots: list[tuple[ParameterSlot, ParameterSlot]]  # the borrower's, the owner's
    handles: list[RemovableHandle] = field(default_factory=list)

    def begin(self) -> None:
        """From now on the borrower's forward gathers the owner's weights, and lets them go at its end."""

        def gather(*_: object) -> None:
            self.owner.unshard()
            self._follow()

        def release(*_: object) -> None:
            self.owner.reshard()
            self._follow()

        self._follow()
        self.handles = [
            self.borrower.register_forward_pre_hook(gather, prepend=True),
            self.borrower.register_forward_hook(release, always_call=True),
        ]

    def end(self) -> None:
        """Copies of the borrower's own, whole."""
        for handle in self.handles:
            handle.remove()
        with whole(self.owner):
            for mine, theirs in self.slots:
                mine.put(nn.Parameter(theirs.get().detach().clone(), requires_grad=False))

    def _follow(self) -> None:
        for mine, theirs in self.slots:
            mine.put(theirs.get())


class Shards:
    """The sharded weights of several module trees."""

    def __init__(self, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.device = device
        self.mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.shared: list[SharedShards] = []

    def place(self, trees: Sequence[nn.Module]) -> None:
        """Bring the weights of rank 0 to all ranks, of each unit only a part; one unit is whole at a time.

        On rank 0 the trees hold values, on the others the same parameters may be on the meta device. Trees may share
        parameters; the first of them owns what it shares.
        """
        trees = list({id(tree): tree for tree in trees}.values())
        slots, files = _slots(trees), MappedFiles()
        for tree in trees:
            for unit in units_of(tree):
                mine = [p for _, p in base_parameters(unit) if id(p) in slots]
                if mine:
                    self._take(unit, trees, [slots.pop(id(p)) for p in mine], files)
        for places in list(slots.values()):
            _fill(places, self.device, files)
        for tree in trees:
            for module in tree.modules():
                for key, buffer in module._buffers.items():
                    module._buffers[key] = None if buffer is None else buffer.to(self.device)

    def separate(self, changing: Iterable[nn.Parameter]) -> None:
        """Before these parameters change: sharded copies of their own for all that borrow from a unit with one."""
        ids = {id(parameter) for parameter in changing}
        for shared in list(self.shared):
            if any(id(theirs.get()) in ids for _, theirs in shared.slots):
                self.shared.remove(shared)
                shared.end()
                self._shard(shared.borrower, [mine.get() for mine, _ in shared.slots])

    def _take(
        self, unit: nn.Module, trees: Sequence[nn.Module], places: Sequence[list[ParameterSlot]], files: MappedFiles
    ) -> None:
        """Fill and shard a unit, and lend to the units of other trees that hold the same parameters."""
        for shared in places:
            _fill(shared, self.device, files)
        inside = set(unit.modules())
        self._shard(unit, [shared[0].get() for shared in places])
        borrowers: dict[nn.Module, list[tuple[ParameterSlot, ParameterSlot]]] = {}
        for shared in places:
            owner = next(slot for slot in shared if slot.module in inside)
            for slot in shared:
                if slot.module not in inside:
                    borrowers.setdefault(_unit_with(slot.module, trees), []).append((slot, owner))
        for borrower, pairs in borrowers.items():
            self.shared.append(SharedShards(unit, borrower, pairs))
            self.shared[-1].begin()

    def _shard(self, unit: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        taken = {id(p) for p in parameters}
        sharded: Any = fully_shard(
            unit,
            mesh=self.mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
            ignored_params={p for p in unit.parameters() if id(p) not in taken},
        )
        sharded.set_gradient_divide_factor(1.0)  # losses are sums, divided once by what all ranks counted
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other


_SHARDS: WeakKeyDictionary[nn.Module, Shards] = WeakKeyDictionary()


def shards_of(model: nn.Module) -> Shards | None:
    """Return the sharded weights of a student (or another teacher); None: they are whole."""
    return _SHARDS.get(model)


def set_shards(model: nn.Module, shards: Shards) -> None:
    """Say that a model's weights are sharded. A copy of the model does not own them."""
    _SHARDS[model] = shards


def _slots(trees: Sequence[nn.Module]) -> dict[int, list[ParameterSlot]]:
    """By parameter, every place that holds it."""
    slots: dict[int, list[ParameterSlot]] = {}
    for tree in trees:
        for module in tree.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    slots.setdefault(id(parameter), []).append(ParameterSlot(module, key))
    return slots


def _unit_with(module: nn.Module, trees: Sequence[nn.Module]) -> nn.Module:
    return next(unit for tree in trees for unit in units_of(tree) if module in set(unit.modules()))


def _fill(places: Sequence[ParameterSlot], device: torch.device, files: MappedFiles) -> None:
    """Rank 0's values on this device, in every place that holds the parameter; what was read from is let go."""
    old = places[0].get()
    value = torch.empty(old.shape, dtype=old.dtype, device=device)
    if dist.get_rank() == 0:
        value.copy_(old.detach())
        files.let_go(old)
    if value.numel():
        dist.broadcast(value.view(-1).view(torch.uint8), src=0)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for place in places:
        place.put(new)
