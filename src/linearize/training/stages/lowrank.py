"""Low-rank linearizing: with the mixers in place, LoRA repairs what is left (LoLCATs, 2410.10254, section 3.2).

The loss is next-token cross-entropy (published) or KL to the teacher on the same text. LoRA comes from peft. Teacher
and student share weights, so merging makes new tensors and never touches the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.adapter_reach import reach_of
from linearize.modeling.io.adapters import KeptAdapters, LowRankChange
from linearize.modeling.io.quantized import is_quantized, whole_weight, with_weight
from linearize.modeling.parallel import add_part
from linearize.modeling.sharding import shards_of
from linearize.training.config import Batch, LossSum, ParameterGroup, StageConfig, StageRun
from linearize.training.stages.chunked_logits import SplitModel
from linearize.training.stages.earlier_adapter import check_start, start_from, start_identity
from linearize.training.stages.losses import distillation_loss
from linearize.training.stages.window_dropout import (
    WindowDropout,
    check_window_dropout,
    draw_branches,
    two_branch_layers,
)
from linearize.training.student_run import LogitsRun

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "query_key_value", "qkv_proj", "Wqkv", "c_attn"),
    "k": ("k_proj", "key", "query_key_value", "qkv_proj", "Wqkv", "c_attn"),
    "v": ("v_proj", "value", "query_key_value", "qkv_proj", "Wqkv", "c_attn"),
    "o": ("o_proj", "dense", "out_proj", "c_proj"),
}
"""Short names of projections, and what families call them."""


class LowRankConfig(StageConfig):
    """Settings of the stage; the LoRA defaults are the published ones.

    `targets`: projections (q, k, v, o, `all`, or names of the family's own). `loss`: `ce` (next token) or `kl`
    (KL(teacher||student)).
    `train_mixers`: whether to train the mixers too, at `mixer_lr_scale` times the learning rate. `merge`: merge the
    adapters into the saved weights; otherwise they are saved next to them (`adapter/`, peft's format) and applied on
    loading. `window_dropout`: see `stages/window_dropout.py`. `start`: folder of an earlier conversion in adapter form,
    whose mixers and LoRA go on training; store and heads of the plan may differ from what it had.
    """

    places: ClassVar[tuple[str, ...]] = ("start",)

    name: Literal["lowrank"] = "lowrank"
    rank: int = Field(8, ge=1)
    alpha: int = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(("q", "k", "v", "o"), min_length=1)
    loss: Literal["ce", "kl"] = "ce"
    train_mixers: bool = False
    mixer_lr_scale: float = Field(1.0, gt=0)
    merge: bool = True
    window_dropout: WindowDropout = ()
    start: str | None = Field(None, min_length=1)

    def check(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> None:
        """Raise `InputError` for window dropout that no mixer can have, an adapter that the stage cannot start from,
        and where no converted layer is trained."""
        check_window_dropout(self.window_dropout, student)
        if self.start is not None:
            projections = find_projections(student, self.targets)
            check_start(self.start, student, rank=self.rank, alpha=self.alpha, projections=projections)
        if not self.train_mixers:
            reach_of(student, find_projections(student, self.targets))

    def build(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> StageRun:
        """The stage over a student and its teacher."""
        return LowRank(self, student, teacher)


class LowRank(LogitsRun):
    """The running stage."""

    def __init__(self, config: LowRankConfig, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> None:
        self.config, self.two_branch_layers = config, two_branch_layers(student)
        self.student_split = SplitModel(student)
        self.teacher_split = SplitModel(teacher) if config.loss == "kl" else None
        self.adapters = add_adapters(
            student, rank=config.rank, alpha=config.alpha, dropout=config.dropout, targets=config.targets
        )
        if config.start is not None:
            start_from(config.start, student, teacher, self.adapters.parameters())
        groups = [ParameterGroup(self.adapters.parameters())]
        if config.train_mixers and (mixers := student.mixer_parameters()):
            groups.append(ParameterGroup(mixers, config.mixer_lr_scale))
        super().__init__(student, *groups)
        self._train_adapters(True)

    def identity(self) -> dict[str, str]:
        """A digest of the adapter that the stage starts from."""
        return {} if self.config.start is None else {"start": start_identity(self.config.start)}

    def loss(self, batch: Batch) -> LossSum:
        """Next-token loss or KL, summed over the tokens that count."""
        kl = float(self.config.loss == "kl")
        branch = draw_branches(self.config.window_dropout, self.two_branch_layers, self.progress)
        return distillation_loss(self.student_split, self.teacher_split, batch, kl=kl, ce=1.0 - kl, branch=branch)

    def heldout_loss(self, batch: Batch) -> LossSum:
        """Next-token loss of the student, adapters without dropout."""
        self._train_adapters(False)
        result = distillation_loss(self.student_split, None, batch, kl=0.0, ce=1.0)
        self._train_adapters(True)
        return result

    def finish(self) -> None:
        """Merge the adapters; those to be kept next to the weights stay in `adapter_state` for `save_student`."""
        self.adapters.remove(keep=not self.config.merge)
        super().finish()

    def _train_adapters(self, training: bool) -> None:
        """Switch their dropout on or off."""
        for layer in self.adapters.layers.values():
            layer.train(training)


@dataclass(eq=False)
class Adapters:
    """LoRA layers injected into a student."""

    student: LinearizedForCausalLM
    config: Any
    layers: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by name."""
        return {name: p for name, p in self.student.named_parameters() if ".lora_" in name}

    def state(self) -> dict[str, Tensor]:
        """The adapters' tensors as peft names them."""
        from peft import get_peft_model_state_dict

        return {k: v.detach().contiguous() for k, v in get_peft_model_state_dict(self.student).items()}

    def remove(self, *, keep: bool) -> None:
        """Take the LoRA layers out again, their product in new weight tensors; what is left to save of them goes to the
        student's `adapter_state`."""
        tensors = self.state() if keep else {}
        before: dict[str, nn.Parameter] = {}
        changes: dict[str, LowRankChange] = {}
        if (shards := shards_of(self.student)) is not None:
            shards.separate(layer.base_layer.weight for layer in self.layers.values())
        for name, layer in self.layers.items():
            base = layer.base_layer
            delta = layer.get_delta_weight("default")
            if keep:
                weight = base.weight
                before[name] = weight if shards is None else nn.Parameter(weight.detach().clone(), requires_grad=False)
            if shards is None:
                if is_quantized(base.weight):
                    changes[name] = _change(layer)
                whole = whole_weight(base.weight)
                base = with_weight(base, whole + delta.to(whole.dtype))
            else:
                add_part(base.weight, delta)
            parent, _, child = name.rpartition(".")
            setattr(self.student.get_submodule(parent), child, base)
        left = self.student.adapter_state.with_changes(changes)
        self.student.adapter_state = replace(left, kept=KeptAdapters(self.config, tensors, before)) if keep else left


def _change(layer: Any) -> LowRankChange:
    """What an adapter adds, to be added again to the weight that the layer had before it was quantized."""
    a_RI, b_OR = (part["default"].weight.detach().cpu() for part in (layer.lora_A, layer.lora_B))
    return LowRankChange(a_RI, b_OR, float(layer.scaling["default"]))


def find_projections(student: LinearizedForCausalLM, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers that `targets` mean: q, k, v, o, `all` (every linear layer of the blocks), or a
    layer's own name.

    Raises:
        InputError: a target that names nothing in this family; lists what there is.
    """
    linear = {n: m for n, m in student.named_modules() if isinstance(m, nn.Linear) and ".mixer." not in n}
    blocks = {n for n in linear if any(part.isdigit() for part in n.split("."))}
    attention = {n for n in blocks if any(n.startswith(f"lm.{site}.") for site in student.config.attention)}
    chosen: set[str] = set()
    for target in targets:
        if target == "all":
            named = set(blocks)
        elif target in PROJECTIONS:
            named = {n for n in attention if n.rpartition(".")[2] in PROJECTIONS[target]}
        else:
            named = {n for n in blocks if n.rpartition(".")[2] == target}
        if not named:
            names = sorted({n.rpartition(".")[2] for n in blocks})
            raise InputError(
                f"target {target!r} names no projection: known are q, k, v, o, all, and here {', '.join(names)}"
            )
        chosen |= named
    return sorted(chosen)


def add_adapters(
    student: LinearizedForCausalLM, *, rank: int, alpha: int, dropout: float, targets: Sequence[str]
) -> Adapters:
    """Inject LoRA layers; A random (from torch's generator), B zero, so that nothing changes yet.

    Their parameters are in fp32 at least, also over weights of 16 bits: bf16 rounds a step of 1e-4 on a weight of 0.1
    away.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    names = find_projections(student, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    inject_adapter_in_model(config, student)
    layers = {name: module for name, module in student.named_modules() if isinstance(module, LoraLayer)}
    adapters = Adapters(student, config, layers)
    for parameter in adapters.parameters().values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return adapters
