"""A model to run, by path or Hub id: a student folder or any causal LM of transformers, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import linearize.modeling as modeling
from linearize.errors import InputError
from linearize.modeling.config import LinearizeConfig
from linearize.modeling.io.hub import local_copy
from linearize.modeling.io.teacher import check_device_map, load_teacher, load_tokenizer
from linearize.storage.files import expand_home, read_json


def load_any(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str | None = None,
    store: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in eval mode on `device` (None: the GPU if there is one) and tokenizer.

    `adapter`: the folder of a student in adapter form, whose teacher is `path`; the tokenizer is the teacher's where
    the folder has none. `store`: exact pairs of a student's window + linear mixers (see `linearize.load`, also for the
    further arguments). Raises InputError for a folder that is not a model, a device that is not there, and a store for
    what has none.
    """
    check_device_map(device, device_map)
    how: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    how["device"] = pick_device(device) if device_map is None else None
    name, path = path, local_copy(path, revision=revision, token=token).path
    if adapter is not None:
        own = Path(expand_home(adapter)) / "tokenizer_config.json"
        tokenizer = load_tokenizer(adapter if own.is_file() or not own.parent.is_dir() else path)
        return modeling.load(path, adapter=adapter, store=store, **how), tokenizer
    if is_student(path):
        return modeling.load(path, store=store, **how), load_tokenizer(path)
    if store is not None:
        raise InputError(f"store {store}: {name} is no student, and a softmax model keeps every pair: leave it out")
    model, tokenizer = load_teacher(path, **how)
    return model, tokenizer


def is_student(path: str | Path) -> bool:
    """Whether a local folder holds a student (a Hub id or a plain transformers model does not)."""
    config = Path(expand_home(path)) / "config.json"
    document: Any = read_json(config) if config.is_file() else {}
    return isinstance(document, dict) and document.get("model_type") == LinearizeConfig.model_type


def pick_device(device: str | None) -> torch.device:
    """The named device, or the GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: give cpu, or cuda where there is a GPU") from error
    return chosen


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's pad token, else its EOS, else 0 (padding is masked, so any id serves)."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)
