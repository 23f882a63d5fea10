"""Tensors and modules whose weights are sharded over processes: told apart, gathered, added to, copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.modeling.library_internals import without_sharding


class ParameterSlot(NamedTuple):
    """A place that holds a parameter."""

    module: nn.Module
    key: str

    def get(self) -> nn.Parameter:
        """The parameter that is there now."""
        parameter = self.module._parameters[self.key]
        assert parameter is not None
        return parameter

    def put(self, value: nn.Parameter) -> None:
        """Another parameter in its place."""
        self.module._parameters[self.key] = value


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of it."""
    return hasattr(tensor, "full_tensor")  # a DTensor, told without importing it


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass adds up gradients of sharded weights over the ranks; off until the last
    micro-batch."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled)


def plain_copy(unit: nn.Module, memo: dict[int, object]) -> nn.Module:
    """A deep copy of a sharded unit as the module that it was, with parts as they lie in each process; see
    `gather_while_running`. `memo`: as of `copy.deepcopy`."""
    kind, attributes = without_sharding(unit)
    made: nn.Module = kind.__new__(kind)
    memo[id(unit)] = made
    vars(made).update(copy.deepcopy(attributes, memo))
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

    def gather(*_: object) -> None:
        for place, part in sharded:
            place.put(nn.Parameter(gathered(part.detach()), requires_grad=False))

    def release(*_: object) -> None:
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
    sharded: Tensor = distribute_tensor(value.detach().to(mesh.device_type), mesh, like.placements)  # type: ignore[attr-defined]
    return sharded


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
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def units_of(tree: nn.Module) -> list[nn.Module]:
    """What is sharded as a unit: the children of every decoder layer that hold matrices."""
    units = []
    for block in decoder_layers(tree):
        for child in block.children():
            if any(p.dim() > 1 for _, p in base_parameters(child)):
                units.append(child)
    return units


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
