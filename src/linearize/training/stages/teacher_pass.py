"""One pass of a teacher with the calls of chosen modules written down, to be repeated by a student's modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.modeling.attention import MixerCall
from linearize.ops.layout import Layout
from linearize.training.config import Batch


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """What a module of the teacher was given and what it gave, without a cache: `hidden`, `output`: `[B, T, M]`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def hidden(self) -> Tensor:
        """The hidden states it was given."""
        given: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return given

    def repeat(self, module: nn.Module, layout: Layout) -> Tensor:
        """The output of a student's module of the same name on the same input."""
        return _tensor(module(*self.args, **{**self.kwargs, "mixer_call": MixerCall(layout)}))


@torch.no_grad()
def module_calls(teacher: nn.Module, batch: Batch, names: Iterable[str]) -> dict[str, ModuleCall]:
    """Run a teacher over a batch; the calls of its modules of these names. The teacher is unchanged."""
    calls: dict[str, ModuleCall] = {}

    def writer(name: str) -> Any:
        def write(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = ModuleCall(args, kwargs, _tensor(output))

        return write

    hooks = [teacher.get_submodule(name).register_forward_hook(writer(name), with_kwargs=True) for name in names]
    try:
        teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def batch_layout(batch: Batch) -> Layout:
    """Where the documents of a batch are."""
    tokens = batch["input_ids"].shape[1]
    return Layout.from_inputs(num_tokens=tokens, past=0, position_ids=batch["position_ids"])


def _tensor(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
