"""A teacher whose linear layers lie in memory in 8 or 4 bits while only new parameters train, and the whole student
that is saved: the teacher's own weights from its folder, with what was trained."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.modeling.io.nf4 import is_nf4, linear_of, nf4_config, nf4_numbers, nf4_parts, settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from linearize.modeling.student import LinearizedForCausalLM

BaseWeights = Literal["full", "8bit", "4bit"]


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """What a linear layer's weight gained: `scale * b_OR @ a_RI`."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float

    def added_to(self, weight_OI: Tensor) -> Tensor:
        """A weight with the change."""
        change_OI = self.scale * (self.b_OR.float() @ self.a_RI.float())
        return weight_OI + change_OI.to(weight_OI.device, weight_OI.dtype)


def loading_options(base: BaseWeights, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What transformers' `from_pretrained` needs to load linear layers like this, rounding each as it is read.

    Raises:
        InputError: the library is not installed, or the device cannot.
    """
    if base == "full":
        return {}
    if base == "4bit":
        return {"quantization_config": nf4_config(dtype, device), "device_map": {"": device}}
    if importlib.util.find_spec("torchao") is None:
        raise InputError("base weights in 8 bits need torchao, which is not installed: pip install linearize[quant]")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


def after_loading(model: PreTrainedModel, base: BaseWeights) -> None:
    """Take from a model what loading it left that a student cannot share."""
    if base == "4bit":
        settle(model)


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight is in fewer bits than a whole one."""
    return is_nf4(tensor) or (hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "dequantize"))


def parts_of(weight: Any) -> dict[str, Tensor]:
    """The plain tensors that a quantized weight is made of, by name; none of a whole one."""
    if is_nf4(weight):
        return nf4_parts(weight)
    names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else ()
    return {name: getattr(weight, name) for name in names}


def with_weight(layer: nn.Linear, weight_OI: Tensor) -> nn.Linear:
    """A linear layer with a new, whole, frozen weight: itself, unless it can only compute with codes."""
    if is_nf4(layer.weight):
        return linear_of(layer, weight_OI)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer


def whole_weight(weight: Tensor) -> Tensor:
    """A weight as plain numbers."""
    if is_nf4(weight):
        return nf4_numbers(weight)
    if not is_quantized(weight):
        return weight.data
    plain: Tensor = weight.dequantize()
    return plain


def has_quantized(model: nn.Module) -> bool:
    """Whether a model has any such weight."""
    return any(is_quantized(parameter) for parameter in model.parameters())


@torch.no_grad()
def whole_student(student: LinearizedForCausalLM) -> LinearizedForCausalLM:
    """A student over its teacher's own weights, read again on the CPU, with its mixers and what adapters changed.

    Raises:
        InputError: the teacher cannot be read any more.
    """
    from linearize.modeling.io.teacher import load_teacher
    from linearize.modeling.student import LinearizedForCausalLM

    teacher, _ = load_teacher(str(student.config.teacher_name))
    whole = LinearizedForCausalLM.from_teacher(
        teacher, student.config.mixers(), teacher_name=student.config.teacher_name
    )
    trained = student.mixer_parameters()
    for name, parameter in whole.mixer_parameters().items():
        parameter.data = trained[name].detach().cpu()
    for name, changes in student.weight_changes.items():
        layer: Any = whole.get_submodule(name)
        turned = type(layer).__name__ == "Conv1D"  # GPT-2's weights are [I, O]
        weight_OI = layer.weight.data.T if turned else layer.weight.data
        for change in changes:
            weight_OI = change.added_to(weight_OI.float())
        weight_OI = weight_OI.to(layer.weight.dtype)
        layer.weight = nn.Parameter((weight_OI.T if turned else weight_OI).contiguous(), requires_grad=False)
    whole.generation_config = student.generation_config
    return whole
