"""Base weights shared out over processes: each holds a part of every matrix, whole ones exist while they are used.

What is sharded is what fills a model: attention modules, MLPs and experts (FSDP2, `fully_shard`, each of them a unit of
its own). Embeddings, head, norms and all new parameters are whole on every process. Student and teacher share one
sharded copy as long as nothing trains it: the student's unit owns the weights, the teacher's borrows them while it
runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.memory import MappedFiles
from linearize.modeling.library_internals import without_sharding


class ParameterSlot(NamedTuple):
    """A place that holds a parameter."""

    module: nn.Module
    key: str

    def get(self) -> nn.Parameter:
        """The parameter that is there now."""
        found = self.module._parameters[self.key]
        assert found is not None
        return found

    def put(self, value: nn.Parameter) -> None:
        """Another parameter in its place."""
        self.module._parameters[self.key] = value


@dataclass(eq=False)
class SharedShards:
    """Sharded weights of `owner` that a module of another tree uses too: whole while it runs, without gradients."""

    owner: Any
    borrower: nn.Module
    slots: list[tuple[ParameterSlot, ParameterSlot]]  # the borrower's, the owner's
    handles: list[Any] = field(default_factory=list)

    def begin(self) -> None:
        """From now on the borrower's forward gathers the owner's weights, and lets them go at its end."""

        def gather(*_: Any) -> None:
            self.owner.unshard()
            self._follow()

        def release(*_: Any) -> None:
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


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return hasattr(tensor, "full_tensor")  # a DTensor, told without importing it


def sync_gradients(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass adds up gradients of sharded weights over the ranks; off until the last
    micro-batch."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(wanted)


def plain_copy(unit: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a sharded unit as the module that it was, with parts as they lie in each process; see
    `gather_while_running`. `memo`: as of `copy.deepcopy`."""
    kind, held = without_sharding(unit)
    made: nn.Module = kind.__new__(kind)
    memo[id(unit)] = made
    vars(made).update(copy.deepcopy(held, memo))
    return made


def gather_while_running(unit: nn.Module) -> None:
    """From now on a module's forward gathers its sharded parameters, and lets them go at its end; without gradients."""
    places = [
        ParameterSlot(module, key)
        for module in unit.modules()
        for key, p in module._parameters.items()
        if p is not None
    ]
    sharded = [(place, place.get()) for place in places if is_sharded(place.get())]

    def gather(*_: Any) -> None:
        for place, part in sharded:
            place.put(nn.Parameter(gathered(part.detach()), requires_grad=False))

    def release(*_: Any) -> None:
        for place, part in sharded:
            place.put(part)

    unit.register_forward_pre_hook(gather, prepend=True)
    unit.register_forward_hook(release, always_call=True)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside the `with` block the weights of a sharded unit are whole; of another module they always are."""
    unit: Any = module if is_unit(module) else None
    if unit is not None:
        unit.unshard()
    try:
        yield
    finally:
        if unit is not None:
            unit.reshard()


def is_unit(module: nn.Module) -> bool:
    """Whether a module's weights are sharded, to be gathered together."""
    return hasattr(module, "unshard")


def spread(value: Tensor, like: Tensor) -> Tensor:
    """Rank 0's whole tensor, sharded as another one is; a sharded one is as it was. All ranks call it."""
    from torch.distributed.tensor import distribute_tensor

    if is_sharded(value):
        return value
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    found: Tensor = distribute_tensor(value.detach().to(mesh.device_type), mesh, like.placements)  # type: ignore[attr-defined]
    return found


@torch.no_grad()
def add_part(parameter: nn.Parameter, change: Tensor) -> None:
    """Add a whole tensor to a sharded parameter in place. All ranks call it."""
    part: Any = spread(change.to(parameter.dtype), parameter)
    parameter.to_local().add_(part.to_local())  # type: ignore[attr-defined]


def whole_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict's tensors in turn, whole and on the CPU on rank 0, empty on the others. All ranks go through it.

    Tied weights come once for each name, as one tensor.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    made: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if sum(other is tensor for other in state.values()) == 1:
            yield name, _on_first(gathered(tensor))
            continue
        if id(tensor) not in made:
            made[id(tensor)] = _on_first(gathered(tensor))
        yield name, made[id(tensor)]


def _on_first(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu() if dist.get_rank() == 0 else torch.empty(0)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all ranks call it."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def units_of(tree: nn.Module) -> list[nn.Module]:
    """What is sharded as a unit: the children of every decoder layer that hold matrices."""
    found = []
    for block in decoder_layers(tree):
        for child in block.children():
            if any(p.dim() > 1 for _, p in base_parameters(child)):
                found.append(child)
    return found


def base_parameters(unit: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A unit's parameters without those of mixers and adapters."""
    return [(name, p) for name, p in unit.named_parameters() if "mixer" not in name.split(".") and "lora_" not in name]


def decoder_layers(tree: nn.Module) -> list[nn.Module]:
    """The decoder layers of a causal LM. Raises InputError where they do not lie in one list."""
    config: Any = getattr(tree, "lm", tree).config
    number = config.get_text_config().num_hidden_layers
    for module in tree.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    raise InputError(f"{config.model_type}: its {number} layers do not lie in one list, so no process can hold a part")


def _slots(trees: Sequence[nn.Module]) -> dict[int, list[ParameterSlot]]:
    """By parameter, every place that holds it."""
    found: dict[int, list[ParameterSlot]] = {}
    for tree in trees:
        for module in tree.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    found.setdefault(id(parameter), []).append(ParameterSlot(module, key))
    return found


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
