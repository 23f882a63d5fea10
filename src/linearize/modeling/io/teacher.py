"""Loading teachers: any causal LM that transformers loads, weights as safetensors only."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import InputError, one_line
from linearize.modeling.io.checkpoint_checks import check_keys, check_numbers
from linearize.modeling.io.integrity import number_types
from linearize.modeling.io.model_source import (
    ModelSource,
    adapter_alone,
    find_model,
    fit_pad_token,
    read_config,
    take_special_tokens,
)
from linearize.modeling.io.quantized import BaseWeights, after_loading, freed_at_once, loading_options
from linearize.modeling.io.quantized_teacher import check_readable, make_plain, reading_options
from linearize.modeling.io.weight_files import WeightFiles
from linearize.modeling.library_internals import holds_adapter

_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"
)  # fmt: skip


def load_teacher(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    base: BaseWeights = "full",
    attn_implementation: str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pretrained causal LM in eval mode, frozen, and its tokenizer.

    A folder or a GGUF file is read from disk; anything else is a Hub name. Quantized files are read as plain numbers.
    `dtype`: default is that of the checkpoint. `base`: what its linear layers are held in. `device_map`: as
    transformers takes it, in the place of `device`.

    Raises:
        InputError: no such folder or model, no causal LM, weights only as pickle, a student instead of a teacher, a
            missing library.
    """
    source = find_model(name_or_path)
    config = read_config(source, trust_remote_code=trust_remote_code)
    if config.model_type == "linearized":
        raise InputError(f"{source} is a student already: give the teacher, a model with softmax attention")
    check_readable(source, config, base)
    check_numbers(str(source), number_types(Path(source.name)), config)
    numbers = dtype or getattr(config, "dtype", None) or torch.float32
    numbers = getattr(torch, numbers) if isinstance(numbers, str) else numbers
    try:
        how = loading_options(base, numbers, torch.device(device or "cpu")) | reading_options(source) | source.options
        how |= {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        how |= {} if device_map is None else {"device_map": device_map}
        how |= {"config": config, "dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
        with freed_at_once() if base != "full" else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(source.name, trust_remote_code=trust_remote_code, **how)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"cannot load {source} as a causal language model: {one_line(error)}") from error
    model, info = loaded
    if holds_adapter(model):  # of the Hub: folders were looked at
        raise adapter_alone(source.name)
    check_numbers(str(source), _types_on_hub(source), config)
    keys = {kind: info.get(f"{kind}_keys") or () for kind in ("missing", "unexpected")}
    check_keys(str(source), config, **keys, prefix=model.base_model_prefix)
    if base == "full":
        make_plain(model, numbers, trust_remote_code=trust_remote_code)
    after_loading(model, base)
    tokenizer = load_tokenizer(name_or_path, trust_remote_code=trust_remote_code)
    fit_pad_token(model, tokenizer)
    placed: Any = model.to(device or "cpu") if device_map is None else model
    return placed.eval().requires_grad_(False), tokenizer


def load_tokenizer(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by folder or Hub name. Raises InputError where there is none that can be used."""
    source = ModelSource(str(name)) if Path(name).is_dir() and _has_tokenizer(Path(name)) else find_model(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.name, **source.options, trust_remote_code=trust_remote_code
        )
        if source.gguf_file is not None:
            take_special_tokens(tokenizer, read_config(source))
        return tokenizer
    except Exception as error:  # tokenizers raises nothing more special
        message = f"cannot load the tokenizer of {source}: {one_line(error)}"
        folder = Path(source.name)
        if source.gguf_file is None and folder.is_dir() and not _has_tokenizer(folder):
            message = f"{source} has no tokenizer: tokenizer.json is missing; copy or download the folder again"
        raise InputError(message) from error


def _types_on_hub(source: ModelSource) -> dict[str, str]:
    """The types of a Hub model's tensors, whose files are in the cache by now; none of a folder's."""
    if Path(source.name).is_dir():
        return {}
    try:
        return WeightFiles(source.name).types()
    except InputError:  # files that transformers found elsewhere
        return {}


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZERS)


def own_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder that a model was loaded from. Raises InputError where there is none."""
    origin = model.name_or_path
    if not origin or not Path(origin).is_dir():
        raise InputError("a model in memory needs its tokenizer: give tokenizer=")
    return load_tokenizer(origin)


def check_device_map(device: object, device_map: object) -> None:
    """Refuse two places for the weights. Raises InputError."""
    if device is not None and device_map is not None:
        raise InputError(f"device {device} and device_map {device_map} given: each says where weights go, choose one")
