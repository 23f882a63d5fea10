"""Loading teachers: any causal LM that transformers loads, weights as safetensors only."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearize.errors import InputError, one_line
from linearize.files import expand_home
from linearize.modeling.allocation import freed_at_once
from linearize.modeling.model_files import check_model_files
from linearize.modeling.quantized import BaseWeights, after_loading, loading_options

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
) -> tuple[PreTrainedModel, Any]:
    """A pretrained causal LM in eval mode, frozen, and its tokenizer.

    A folder is read from disk; anything else is a Hub name. `dtype`: default is that of the checkpoint. `base`:
    what its linear layers are held in.

    Raises:
        InputError: no such folder or model, no causal LM, weights only as pickle, a student instead of a teacher, a
            missing library.
    """
    name = expand_home(name_or_path)
    check_model_folder(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if config.model_type == "linearized":
            raise InputError(f"{name} is a student already: give the teacher, a model with softmax attention")
        numbers = dtype or getattr(config, "dtype", None) or torch.float32
        numbers = getattr(torch, numbers) if isinstance(numbers, str) else numbers
        how = loading_options(base, numbers, torch.device(device or "cpu"))
        how |= {"config": config, "dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
        with freed_at_once() if base != "full" else nullcontext():
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options, **how)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"cannot load {name} as a causal language model: {one_line(error)}") from error
    model, info = loaded
    if missing := sorted(info.get("missing_keys") or ()):
        raise InputError(
            f"{name} lacks weights of a {config.model_type} model ({missing[0]}; {len(missing)} missing): "
            "copy or download the folder again"
        )
    after_loading(model, base)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    placed: Any = model.to(device or "cpu")
    return placed.eval().requires_grad_(False), tokenizer


def load_tokenizer(name: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, by folder or Hub name. Raises InputError where there is none that can be used."""
    name = expand_home(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises nothing more special
        told = f"cannot load the tokenizer of {name}: {one_line(error)}"
        folder = Path(name)
        if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZERS):
            told = f"{name} has no tokenizer: tokenizer.json is missing; copy or download the folder again"
        raise InputError(told) from error


def check_model_folder(name: str) -> None:
    """Refuse early, and in one line, what looks like a path but is no model folder.

    Raises:
        InputError: a missing folder, a file, a folder without config.json, one whose weights are pickles, or one with
            files that are missing or damaged as far as sizes and headers tell.
    """
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.exists()
    if not looks_local:
        return
    if not path.is_dir():
        raise InputError(
            f"{name} is not a model folder: give a folder with config.json and model.safetensors, or a Hub name"
        )
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise InputError(f"{name} is not a model folder: it has no config.json (found: {found})")
    if not any(path.glob("*.safetensors")):
        pickles = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise InputError(
                f"{name} holds weights as pickle ({pickles[0]}), which can run code: save them as safetensors first"
            )
        raise InputError(f"{name} holds no weights: model.safetensors is missing")
    check_model_files(path)
