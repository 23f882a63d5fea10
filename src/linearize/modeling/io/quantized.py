"""A teacher whose linear layers are in memory in 8 or 4 bits while only new parameters train."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.modeling.io.nf4 import is_nf4, linear_of, nf4_config, nf4_numbers, nf4_parts, settle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BaseWeights = Literal["full", "8bit", "4bit"]
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_SMALL, _LARGEST = 2**20, 2**25  # bytes; glibc raises its threshold by itself up to the second


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


def parts_of(weight: Tensor) -> dict[str, Tensor]:
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


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Return memory of a mebibyte and more to the system when it is freed, inside the `with` block.

    Otherwise glibc puts the codes of a weight into the hole that the whole weight left, grows for the next one, and the
    process holds all of the model in the end. Afterwards its thresholds are those that it reaches by itself.
    """
    libc = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
