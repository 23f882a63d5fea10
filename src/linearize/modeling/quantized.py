"""A teacher whose linear layers lie in memory in 8 bits while only new parameters train, and the whole student that is
saved: the teacher's own weights from its folder, with what was trained."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from linearize.errors import InputError

if TYPE_CHECKING:
    from linearize.modeling.student import LinearizedForCausalLM

BaseWeights = Literal["full", "8bit"]


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


def quantization_config(base: BaseWeights) -> Any:
    """What transformers needs to load linear layers like this; None for whole weights.

    Raises:
        InputError: the library is not installed.
    """
    if base == "full":
        return None
    if importlib.util.find_spec("torchao") is None:
        raise InputError("base weights in 8 bits need torchao, which is not installed: pip install linearize[quant]")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight is in fewer bits than its dtype says."""
    return hasattr(tensor, "__tensor_flatten__") and hasattr(tensor, "dequantize")


def whole_weight(weight: Tensor) -> Tensor:
    """A weight as plain numbers."""
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
    from linearize.modeling.student import LinearizedForCausalLM
    from linearize.modeling.teacher import load_teacher

    teacher, _ = load_teacher(str(student.config.teacher_name))
    whole = LinearizedForCausalLM.from_teacher(
        teacher, student.config.mixers(), teacher_name=student.config.teacher_name
    )
    trained = student.mixer_parameters()
    for name, parameter in whole.mixer_parameters().items():
        parameter.data = trained[name].detach().cpu()
    for name, changes in student.weight_changes.items():
        layer: Any = whole.get_submodule(name)
        weight = layer.weight.data
        for change in changes:
            weight = change.added_to(weight.float())
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    whole.generation_config = student.generation_config
    return whole
