"""A block of consecutive layers that starts from given hidden states: the family's own forward, with what arrives at
the block's first layer replaced.

Letters: B batch, T tokens, M model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from linearize.modeling.attention import ATTENTION
from linearize.modeling.config import LinearizeConfig
from linearize.modeling.library_internals import set_attention
from linearize.modeling.probe import attention_configs
from linearize.modeling.student import LinearizedForCausalLM
from linearize.modeling.truncate import cut_student_config, cut_tree, list_of_layers


class HiddenInput:
    """The hidden states `[B, T, M]` that blocks start from; None: what the model itself computes. Copies share it.

    `as_tuple`: whether layers give their output in a tuple, once one was seen.
    """

    hidden: Tensor | None = None
    as_tuple: bool = False

    def __deepcopy__(self, _memo: dict[int, object]) -> HiddenInput:
        return self

    @contextmanager
    def holding(self, hidden_BTM: Tensor) -> Iterator[None]:
        """These hidden states inside the `with` block."""
        self.hidden = hidden_BTM
        try:
            yield
        finally:
            self.hidden = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """Layers `span` of a teacher and, where they train, of its student; both start from what `hidden_input` holds.

    `layers`: the name of the list of layers in `teacher`, which holds those of the block alone.
    """

    span: range
    teacher: Any
    layers: str
    hidden_input: HiddenInput
    dtype: torch.dtype
    device: torch.device
    student: LinearizedForCausalLM | None = None

    def outputs(self, batch: Mapping[str, Tensor], hidden_BTM: Tensor) -> Tensor:
        """The teacher's hidden states after the block, `[B, T, M]`."""
        return self._pass(self.teacher, self.teacher.get_submodule(self.layers)[-1], batch, hidden_BTM)

    def student_outputs(self, batch: Mapping[str, Tensor], hidden_BTM: Tensor, **options: Any) -> Tensor:
        """The student's; `options` of its forward, as `branch`."""
        assert self.student is not None
        last: Any = self.student.lm.get_submodule(self.layers)[-1]  # type: ignore[index]
        return self._pass(self.student, last, batch, hidden_BTM, **options)

    def placed(self, hidden_BTM: Tensor) -> Tensor:
        """Stored hidden states as the block computes with them."""
        return hidden_BTM.to(device=self.device, dtype=self.dtype)

    def _pass(
        self, model: nn.Module, last: nn.Module, batch: Mapping[str, Tensor], hidden_BTM: Tensor, **options: Any
    ) -> Tensor:
        with self.hidden_input.holding(self.placed(hidden_BTM)):
            return reached(model, last, batch, before=False, hidden_input=self.hidden_input, **options)


class Blocks(Protocol):
    """Where blocks come from: models in memory, or weights on disk.

    `layers`: of the model. `model_dim`: its width. `dtype`: of stored hidden states. `device`: where it computes.
    """

    layers: int
    model_dim: int
    dtype: torch.dtype
    device: torch.device

    def enter(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """What gives the hidden states at the first layer's input for a batch, `[B, T, M]`."""
        ...

    def teacher(self, span: range) -> Block:
        """The teacher's layers alone."""
        ...

    def pair(self, span: range) -> Block:
        """The teacher's layers and the student's, whose mixers are as they start."""
        ...


class LoadedBlocks:
    """Blocks of a teacher and a student in memory, over their own tensors.

    `dtype`: of the hidden states to store, by default the teacher's.
    """

    def __init__(self, teacher: Any, student: LinearizedForCausalLM, *, dtype: torch.dtype | None = None) -> None:
        self._teacher, self._student, self._hidden_input = teacher, student, HiddenInput()
        self._sites = student.config.attention
        self.layers, self.model_dim = len(self._sites), student.config.attention_shapes()[0].model_dim
        self.dtype, self.device = dtype or teacher.dtype, teacher.device

    def enter(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """See `Blocks`."""
        first: Any = self._teacher.get_submodule(list_of_layers(self._sites))[0]
        return lambda batch: reached(self._teacher, first, batch, before=True)

    def teacher(self, span: range) -> Block:
        """See `Blocks`."""
        teacher = cut_tree(self._teacher, self._sites, span)
        return make_block(teacher, span, list_of_layers(self._sites), self._hidden_input)

    def pair(self, span: range) -> Block:
        """See `Blocks`. The student's parameters are those of the whole student."""
        teacher = cut_tree(self._teacher, self._sites, span)
        lm = cut_tree(self._student.lm, self._sites, span)
        config = cut_student_config(self._student.config, span)
        return make_block(teacher, span, list_of_layers(self._sites), self._hidden_input, student_around(lm, config))


def make_block(
    teacher: Any,
    span: range,
    layers: str,
    hidden_input: HiddenInput,
    student: LinearizedForCausalLM | None = None,
) -> Block:
    """A block of trees that hold its layers alone: from now on both start from what `hidden_input` holds."""
    trees = [teacher] if student is None else [teacher, student.lm]
    for tree in trees:
        first: Any = tree.get_submodule(layers)[0]
        first.register_forward_pre_hook(_starting_from(hidden_input), with_kwargs=True)
    parameter = next(teacher.get_submodule(layers).parameters())
    return Block(
        span=span, teacher=teacher, layers=layers, hidden_input=hidden_input, dtype=parameter.dtype,
        device=parameter.device, student=student,
    )  # fmt: skip


def student_around(lm: PreTrainedModel, config: LinearizeConfig) -> LinearizedForCausalLM:
    """A student of layers that hold their mixers already."""
    if all(entry is not None for entry in config.plan):  # as `surgery.install`: no layer needs a T x T mask
        for own in attention_configs(lm):
            set_attention(own, ATTENTION)
    with no_init_weights():
        return LinearizedForCausalLM(copy.deepcopy(config), lm=lm).eval()


def _starting_from(hidden_input: HiddenInput) -> Callable[..., Any]:
    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if hidden_input.hidden is None:
            return args, kwargs
        arriving = args[0] if args else kwargs["hidden_states"]
        assert arriving.shape == hidden_input.hidden.shape, (
            f"{tuple(hidden_input.hidden.shape)} given for {tuple(arriving.shape)}"
        )
        if args:
            return (hidden_input.hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_input.hidden}

    return replace


class _Reached(Exception):  # noqa: N818 (no error: how a pass ends early)
    """The pass has come as far as it was wanted."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("reached")
        self.hidden = hidden


@torch.no_grad()
def reached(
    model: nn.Module,
    module: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    before: bool,
    hidden_input: HiddenInput | None = None,
    **options: Any,
) -> Tensor:
    """The hidden states that a module of the model is given (`before`) or gives; nothing after it is computed."""

    def stop_before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args[0] if args else kwargs["hidden_states"])

    def stop_after(_module: nn.Module, _args: object, _kwargs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    if before:
        hook = module.register_forward_pre_hook(stop_before, with_kwargs=True)
    else:
        hook = module.register_forward_hook(stop_after, with_kwargs=True)
    try:
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **options)
    except _Reached as stop:
        return stop.hidden
    finally:
        hook.remove()
    raise AssertionError("the module was never called")
