"""LoRA on chosen projections through peft, over weights that teacher and student share: merging never touches the
teacher's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.adapters import LowRankChange
from linearize.modeling.io.quantized import is_quantized, whole_weight, with_weight
from linearize.modeling.parallel import add_part
from linearize.modeling.sharding import shards_of

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "query", "query_key_value", "qkv_proj", "Wqkv", "c_attn"),
    "k": ("k_proj", "key", "query_key_value", "qkv_proj", "Wqkv", "c_attn"),
    "v": ("v_proj", "value", "query_key_value", "qkv_proj", "Wqkv", "c_attn"),
    "o": ("o_proj", "dense", "out_proj", "c_proj"),
}
"""Short names of projections, and what families call them."""


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

    def remove(self, *, keep: bool) -> dict[str, nn.Parameter]:
        """Take the LoRA layers out again, their product in new weight tensors; returns the weights from before if they
        are to be kept."""
        before: dict[str, nn.Parameter] = {}
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
                    self.student.adapter_state.changes.setdefault(name, []).append(_change(layer))
                whole = whole_weight(base.weight)
                base = with_weight(base, whole + delta.to(whole.dtype))
            else:
                add_part(base.weight, delta)
            parent, _, child = name.rpartition(".")
            setattr(self.student.get_submodule(parent), child, base)
        return before


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
            found = set(blocks)
        elif target in PROJECTIONS:
            found = {n for n in attention if n.rpartition(".")[2] in PROJECTIONS[target]}
        else:
            found = {n for n in blocks if n.rpartition(".")[2] == target}
        if not found:
            names = sorted({n.rpartition(".")[2] for n in blocks})
            raise InputError(
                f"target {target!r} names no projection: known are q, k, v, o, all, and here {', '.join(names)}"
            )
        chosen |= found
    return sorted(chosen)


def add_adapters(
    student: LinearizedForCausalLM, *, rank: int, alpha: int, dropout: float, targets: Sequence[str]
) -> Adapters:
    """Inject LoRA layers; A random (from torch's generator), B zero, so that nothing changes yet."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    names = find_projections(student, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    inject_adapter_in_model(config, student)
    layers = {name: module for name, module in student.named_modules() if isinstance(module, LoraLayer)}
    return Adapters(student, config, layers)
