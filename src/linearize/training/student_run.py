"""The base of stages that train a student: trained parameters in memory of their own, and recomputation of blocks in
the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.parallel import is_sharded
from linearize.modeling.sharding import shards_of
from linearize.modeling.truncate import block_name
from linearize.training.config import ParameterGroup, StageRun


class StudentRun(StageRun):
    """A stage that trains exactly these parameters of a student, each by its name."""

    def __init__(self, student: LinearizedForCausalLM, *groups: ParameterGroup) -> None:
        self.student, self.groups = student.eval(), list(groups)
        student.requires_grad_(False)
        for group in groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The groups of the stage."""
        return self.groups

    def finish(self) -> None:
        """Freeze what was trained."""
        self.student.eval().requires_grad_(False)


class LogitsRun(StudentRun):
    """A stage whose loss is on the student's logits, so that its blocks can be recomputed in the backward pass."""

    checkpoints_gradients = True
    _recomputed = False

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass."""
        recompute_blocks(self.student, True)
        self._recomputed = True

    def finish(self) -> None:
        """Freeze what was trained, and stop recomputing."""
        if self._recomputed:
            recompute_blocks(self.student, False)
        super().finish()


def mlp_parameters(student: LinearizedForCausalLM) -> set[str]:
    """Names of the parameters of all MLPs, experts and routers: all of a block except attention and norms."""
    names: set[str] = set()
    for site in student.config.attention:
        attention, block = f"lm.{site}", f"lm.{block_name(site)}"
        for name, child in student.get_submodule(block).named_children():
            path = f"{block}.{name}"
            holds_attention = attention == path or attention.startswith(f"{path}.")
            if not holds_attention and any(parameter.dim() > 1 for parameter in child.parameters()):
                names |= {f"{path}.{inner}" for inner, _ in child.named_parameters()}
    return names


def unshare(student: nn.Module, teacher: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The student's parameters of these names, those that share memory with the teacher replaced by copies.

    All parameters are frozen first, so that those of the teacher stay frozen after the copies part from them.
    A copy takes the place of its original wherever the student holds it, so tied weights stay tied. Sharded weights
    that the teacher borrows are copied for the teacher instead.
    """
    student.requires_grad_(False)
    named, names = dict(student.named_parameters()), list(names)
    if (shards := shards_of(student)) is not None:
        shards.separate(named[name] for name in names)
    taken = {_memory(parameter) for parameter in teacher.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for name in names:
        parameter = named[name]
        if _memory(parameter) in taken:
            copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
    for module in student.modules():
        for key, value in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(value) in copies:
                setattr(module, key, copies[id(value)])
    now = dict(student.named_parameters())
    return {name: now[name] for name in names}


def _memory(tensor: Tensor) -> int:
    """The identity of a tensor's memory; sharded weights never count as shared between trees."""
    return id(tensor) if is_sharded(tensor) else tensor.untyped_storage().data_ptr()


def recompute_blocks(student: LinearizedForCausalLM, on: bool) -> None:
    """Gradient checkpointing of every block: `gradient_` in transformers until 5.22, `activation_` since."""
    lm: Any = student.lm
    kind = "activation" if hasattr(lm, "activation_checkpointing_enable") else "gradient"
    if on:
        student.train()
        getattr(lm, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(lm, f"{kind}_checkpointing_disable")()
