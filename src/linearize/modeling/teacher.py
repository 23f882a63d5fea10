"""Loading teachers: any causal LM that transformers loads, weights as safetensors only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linearize.errors import InputError, one_line


def load_teacher(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A pretrained causal LM in eval mode, frozen, and its tokenizer.

    A folder is read from disk; anything else is a Hub name. `dtype`: default is that of the checkpoint.

    Raises:
        InputError: no such folder or model, no causal LM, weights only as pickle, a student instead of a teacher.
    """
    name = str(name_or_path)
    check_model_folder(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if config.model_type == "linearized":
            raise InputError(f"{name} is a student already: give the teacher, a model with softmax attention")
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype or "auto", use_safetensors=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(f"cannot load {name} as a causal language model: {one_line(error)}") from error
    placed: Any = model.to(device or "cpu")  # type: ignore[arg-type]
    return placed.eval().requires_grad_(False), tokenizer


def check_model_folder(name: str) -> None:
    """Refuse early, and in one line, what looks like a path but is no model folder.

    Raises:
        InputError: a missing folder, a file, a folder without config.json, or one whose weights are pickles.
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
