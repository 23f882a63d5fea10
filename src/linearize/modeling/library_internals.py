"""Every place that reaches into what transformers, accelerate and PyTorch do not document, each with the version read.

A new release of one of them is checked against this file first. The pinned versions are those of `constraints.txt`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, DynamicSlidingWindowLayer

# transformers 5.23: configs


def attention_of(config: PreTrainedConfig) -> str | None:
    """Return the name of the attention function that a model's modules call (`modeling_utils.py`)."""
    name: str | None = config._attn_implementation
    return name


def set_attention(config: PreTrainedConfig, name: str | None) -> None:
    """Let modules with this config call another attention function, without the checks of `set_attn_implementation`.

    Those refuse names of functions that the class does not list, and change all configs of a model at once.
    """
    config._attn_implementation = name


def use_batched_experts(config: PreTrainedConfig) -> None:
    """Compute experts by batched products, the one implementation that runs on meta (`integrations/moe.py`)."""
    config._experts_implementation = "batched_mm"


def run_config_checks(config: PreTrainedConfig, without: Collection[str]) -> None:
    """Run the checks of the parent class but those of these names.

    huggingface_hub 2.4 lists them on a strict dataclass (`dataclasses.py`), and offers no way to leave one out.
    """
    checks: Any = vars(PreTrainedConfig)["__class_validators__"]
    for check in checks:
        if check.__name__ not in without:
            check(config)


# transformers 5.23: caches and generation


def register_cache_layer(name: str, layer: type) -> None:
    """Let `DynamicCache` and `StaticCache` make this class for layers of a type (`cache_utils.py`)."""
    STATIC_LAYER_TYPE_MAPPING[name] = layer


def hide_old_states(cache: Cache) -> None:
    """Let layers with a sliding window return the states that they announce to the mask (`cache_utils.py`).

    transformers 5.17 returns older ones too where several calls follow each other without `crop`; 5.18 does not.
    """
    if Version(transformers.__version__) >= Version("5.18"):
        return
    layers: list[Any] = [layer for layer in cache.layers if type(layer) is DynamicSlidingWindowLayer]
    for layer in layers:
        layer.update = partial(_recent_states, layer, layer.update)


def _recent_states(layer: Any, update: Callable[..., Any], keys: Tensor, values: Tensor, *rest: Any) -> Any:
    count = layer.sliding_window - 1 + keys.shape[-2]
    return tuple(states[:, :, -count:] for states in update(keys, values, *rest))


def keeps_recurrent_state(model: PreTrainedModel) -> bool:
    """Return whether a model says that its cache cannot roll back (`generation/utils.py`)."""
    return bool(getattr(model, "_is_stateful", False))


def filled_generation_config(model: Any, config: GenerationConfig | None) -> GenerationConfig:
    """Return a copy of a generation config with unset values taken from the model's own (`generation/utils.py`)."""
    filled: GenerationConfig = model._prepare_generation_config(copy.deepcopy(config))[0]
    return filled


def prepare_special_tokens(model: Any, config: GenerationConfig) -> None:
    """Make the tensors of special tokens that the logits processors of this config read (`generation/utils.py`)."""
    model._prepare_special_tokens(config, True, device=model.device)


def logits_processors(model: Any, config: GenerationConfig, prompt_length: int) -> LogitsProcessorList:
    """Return the logits processors that `generate` would run (`generation/utils.py`)."""
    return model._get_logits_processor(config, input_ids_seq_length=prompt_length, device=model.device)


# transformers 5.23: checkpoints


def find_hub_file(name: str, file: str) -> str | None:
    """Return the path of a file of a Hub model, None where it has none (`utils/hub.py`). Raises OSError."""
    from transformers.utils import cached_file

    path: str | None = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return path


def holds_adapter(model: PreTrainedModel) -> bool:
    """Return whether `from_pretrained` attached an adapter by itself (`integrations/peft.py`)."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def fp32_names(model: PreTrainedModel) -> Collection[str]:
    """Return names, or their beginnings, of parameters that stay in fp32 whatever the dtype (`modeling_utils.py`)."""
    names: Collection[str] = model._keep_in_fp32_modules_strict or ()
    return names


def ignored_patterns(model: PreTrainedModel) -> Collection[str]:
    """Return patterns of tensors in a checkpoint that the class does not read (`modeling_utils.py`)."""
    patterns: Collection[str] = model._keys_to_ignore_on_load_unexpected or ()
    return patterns


def checkpoint_renamer(model: PreTrainedModel, state: dict[str, Any]) -> Callable[[str], tuple[str, str | None]]:
    """Return what gives a checkpoint's tensor its name in the model's state, and the pattern of its conversion, if any.

    As `core_model_loading.py` applies them: renamings first, then converters, which stack or split tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(key: str) -> tuple[str, str | None]:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        return name, pattern

    return rename


def load_converted(model: PreTrainedModel, state: dict[str, Any], dtype: torch.dtype) -> None:
    """Load tensors that transformers joins or splits, by its own rules (`core_model_loading.py`)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    bars_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        rules: Any = get_model_conversion_mapping(model)
        load = LoadStateDictConfig(dtype=dtype, weight_mapping=rules)
        convert_and_load_state_dict_in_model(model, state, load)
    finally:
        if bars_shown:
            logging.enable_progress_bar()


def saved_names(model: PreTrainedModel, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors by the names that `save_pretrained` gives them, joined ones split (`core_model_loading.py`)."""
    from transformers.core_model_loading import revert_weight_conversion

    saved: Mapping[str, Tensor] = revert_weight_conversion(model, dict(state))
    return saved


def without_tied(state: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return tied weights once (`modeling_utils.py`). Raises RuntimeError for memory that is shared otherwise."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    kept: dict[str, Tensor] = remove_tied_weights_from_state_dict(state, model)
    return kept


# accelerate 1.15


def is_hooked(module: nn.Module) -> bool:
    """Return whether accelerate moves weights or inputs when this module is called (`hooks.py`)."""
    return hasattr(module, "_hf_hook")


def execution_device(module: nn.Module) -> Any:
    """Return the device that accelerate runs an offloaded module on, None where it does not (`hooks.py`)."""
    return getattr(getattr(module, "_hf_hook", None), "execution_device", None)


# torch 2.13


def remove_pre_hooks(module: nn.Module, kind: type) -> None:
    """Remove forward pre-hooks that are instances of a class; their handles may be lost (`nn/modules/module.py`)."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def without_sharding(unit: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    """Return the class of a unit before `fully_shard`, and its attributes without sharding (`distributed/fsdp`)."""
    kind: Any = type(unit).__mro__[2]  # after the class that fully_shard made, and its own
    attributes = {key: value for key, value in vars(unit).items() if not key.startswith("__composable_api_")}
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        kept = {key: hook for key, hook in attributes[hooks].items() if not _is_sharding(hook)}
        attributes[hooks] = type(attributes[hooks])(kept)
    return kind, attributes


def _is_sharding(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.")


def can_pack_weights() -> bool:
    """Return whether this build of torch has oneDNN's packed products (`_inductor/mkldnn_ir.py`)."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def packed_weight(weight: Tensor, tokens: int) -> Tensor:
    """Return a weight in the blocks that oneDNN multiplies `tokens` tokens with."""
    blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    return blocks


def packed_product(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + bias` of a packed weight."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")
    return y
