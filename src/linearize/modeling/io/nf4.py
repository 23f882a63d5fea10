"""Linear layers whose weights are 4-bit codes with a scale for every 64 of them: nf4 by bitsandbytes, the scales in 8
bits themselves (QLoRA, 2305.14314, section 3). Products are computed in the model's own type of numbers.

Letters: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def nf4_config(dtype: torch.dtype, device: torch.device) -> Any:
    """What transformers needs to load linear layers in 4 bits on a device, one at a time.

    Raises:
        InputError: bitsandbytes is not installed, or cannot do it on this device.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            "base weights in 4 bits need bitsandbytes, which is not installed: pip install linearize[quant]"
        )
    _try_out(dtype, device)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _try_out(dtype: torch.dtype, device: torch.device) -> None:
    """Round a small weight on the device and back, which tells more than its name. Raises InputError."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight_OI = torch.ones(4, 64, dtype=dtype, device=device)
        codes, state = quantize_4bit(weight_OI, quant_type="nf4", compress_statistics=True)
        wrong = not torch.allclose(dequantize_4bit(codes, state), weight_OI, atol=0.1)
    except Exception as error:  # whatever a library without kernels for this device raises
        raise InputError(
            f"bitsandbytes cannot hold weights in 4 bits on {device} ({one_line(error)}): give another --device, or "
            "--base 8bit"
        ) from error
    if wrong:
        raise InputError(f"bitsandbytes rounds wrongly in 4 bits on {device}: give another --device, or --base 8bit")


def settle(model: PreTrainedModel) -> None:
    """Make a model that was loaded in 4 bits one like any other: no hooks that move inputs, and no repacking.

    On CPUs with bf16 instructions bitsandbytes would replace the weights of a layer that runs without gradients by ones
    that have none; a student shares them and trains.
    """
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_nf4(tensor: Tensor) -> bool:
    """Whether a weight is in 4 bits."""
    return getattr(tensor, "quant_state", None) is not None


def nf4_numbers(weight: Any) -> Tensor:
    """The numbers `[O, I]` that a weight in 4 bits stands for."""
    from bitsandbytes.functional import dequantize_4bit

    numbers_OI: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return numbers_OI


def nf4_parts(weight: Any) -> dict[str, Tensor]:
    """The tensors that a weight in 4 bits is made of: codes, and what scales them."""
    state, inner = weight.quant_state, weight.quant_state.state2
    parts = {"codes": weight.detach().as_subclass(Tensor), "absmax": state.absmax, "code": state.code}
    if inner is not None:
        parts |= {"offset": state.offset, "nested_absmax": inner.absmax, "nested_code": inner.code}
    return parts


def nf4_states(model: nn.Module) -> Iterator[object]:
    """What layers in 4 bits keep beside their weights, for module trees that share it."""
    for layer in model.modules():
        if (state := getattr(layer, "quant_state", None)) is not None:
            yield state


def linear_of(layer: nn.Linear, weight_OI: Tensor) -> nn.Linear:
    """A plain frozen linear layer with this weight and a layer's bias."""
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight_OI, requires_grad=False)
    made.bias = layer.bias
    return made.train(layer.training)
