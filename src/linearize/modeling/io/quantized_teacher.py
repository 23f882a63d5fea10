"""Teachers whose own files hold quantized weights: read as plain numbers, so that everything can be done with them that
can be done with others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from linearize.errors import InputError
from linearize.modeling.io.model_source import ModelSource
from linearize.modeling.io.quantized import BaseWeights, is_quantized, whole_weight

READ = ("bitsandbytes", "torchao", "gguf")  # what can be turned into plain numbers here


def check_readable(source: ModelSource, config: PreTrainedConfig, base: BaseWeights = "full") -> None:
    """Refuse quantized files that cannot be read as plain numbers, before anything of them is read.

    Raises:
        InputError: another library's numbers, or files that are to be quantized once more.
    """
    method = quantization_of(source, config)
    if method is None:
        return
    if method not in READ:
        raise InputError(
            f"{source} holds weights quantized by {method}, which cannot be made plain here ({', '.join(READ)} can): "
            "load it with transformers, dequantize it, and save it in bfloat16 first"
        )
    if base != "full":
        raise InputError(
            f"{source} holds weights quantized by {method} already, so base_weights {base} does not apply: set it to "
            "full (they are then read as plain numbers), or give the model that was quantized"
        )


def quantization_of(source: ModelSource, config: PreTrainedConfig) -> str | None:
    """What quantized the files of a model; None: nothing did."""
    if source.gguf_file is not None:
        return "gguf"
    quantization: Any = getattr(config, "quantization_config", None)
    if not quantization:
        return None
    fields: dict[str, Any] = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return "bitsandbytes"
    return str(fields.get("quant_method", "an unnamed method")).rpartition(".")[2].lower()


def reading_options(source: ModelSource) -> dict[str, Any]:
    """What `from_pretrained` needs to give plain numbers by itself, where it can."""
    if source.gguf_file is None:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:  # versions that always give plain numbers
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


@torch.no_grad()
def make_plain(model: PreTrainedModel, dtype: torch.dtype, **options: Any) -> None:
    """Turn a model that was read from quantized files into one like any other, in place.

    `options`: how `AutoModelForCausalLM` builds it from its config.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    quantizer.remove_quantization_config(model)
    layers = {name: layer for name, layer in model.named_modules() if _holds_codes(layer)}
    if layers:
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(model.config, **options)
        for name, layer in layers.items():
            model.set_submodule(name, _plain_layer(layer, plain.get_submodule(name), dtype))


def _holds_codes(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and (is_quantized(weight) or _is_int8(weight))


def _is_int8(weight: Tensor) -> bool:
    """Whether a weight is bitsandbytes' in 8 bits."""
    return type(weight).__name__ == "Int8Params"


def _plain_layer(layer: Any, plain: Any, dtype: torch.dtype) -> nn.Module:
    """`plain`, the layer that the family has in this place, with the numbers that the layer's codes stand for."""
    numbers: Tensor = _int8_numbers(layer) if _is_int8(layer.weight) else whole_weight(layer.weight)
    if type(plain).__name__ == "Conv1D":  # GPT-2's weights are [I, O]
        numbers = numbers.T
    plain.weight = nn.Parameter(numbers.to(dtype).contiguous(), requires_grad=False)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return plain.train(layer.training)


def _int8_numbers(layer: Any) -> Tensor:
    """Codes times their row's scale, over the largest code."""
    scale_O = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.data.float() * (scale_O.float()[:, None] / 127)
