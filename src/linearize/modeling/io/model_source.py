"""Where a model is, and how transformers reads its config: a folder, a Hub name, or a GGUF file; special tokens mended.

Tokenizers with a pad token added later often have an id for it that the model has no embedding for.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.modeling.io.integrity import check_model_files
from linearize.storage.files import expand_home

ADAPTER_CONFIG = "adapter_config.json"
LOG = logging.getLogger("linearize")
_MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('{name}').merge_and_unload().save_pretrained('MERGED')\""
)
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class ModelSource:
    """`name`: a folder (`~` written out) or a Hub name. `gguf_file`: the file in the folder that is the model, None
    where the folder holds safetensors."""

    name: str
    gguf_file: str | None = None

    def __str__(self) -> str:
        return self.name if self.gguf_file is None else str(Path(self.name) / self.gguf_file)

    @property
    def options(self) -> dict[str, str]:
        """What `from_pretrained` of transformers takes besides the name."""
        return {} if self.gguf_file is None else {"gguf_file": self.gguf_file}


def find_model(name_or_path: str | os.PathLike[str]) -> ModelSource:
    """Refuse early, and in one line, what looks like a path but is no model.

    Raises:
        InputError: a missing folder, a folder without config.json, one whose weights are pickles, one with an adapter,
            one with files that are missing or damaged as far as sizes and headers tell; a GGUF file that is a part of
            a model, several in one folder, or no `gguf` package to read one.
    """
    name = expand_home(name_or_path)
    path = Path(name)
    if path.suffix == ".gguf" and not path.is_dir():
        return _gguf(path)
    if not looks_local(name):
        return ModelSource(name)
    if not path.is_dir():
        raise InputError(
            f"{name} is not a model folder: give a folder with config.json and model.safetensors, a .gguf file, or a "
            "Hub name"
        )
    _check_adapter(path)
    gguf_files = sorted(path.glob("*.gguf"))
    if gguf_files and not any(path.glob("*.safetensors")):
        if len(gguf_files) > 1:
            names = ", ".join(file.name for file in gguf_files[:5])
            raise InputError(f"{name} holds {len(gguf_files)} GGUF files ({names}): give the path of one of them")
        return _gguf(gguf_files[0])
    if not (path / "config.json").is_file():
        names = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise InputError(f"{name} is not a model folder: it has no config.json (found: {names})")
    if not any(path.glob("*.safetensors")):
        pickles = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise InputError(
                f"{name} holds weights as pickle ({pickles[0]}), which can run code: save them as safetensors first"
            )
        raise InputError(f"{name} holds no weights: model.safetensors is missing")
    check_model_files(path)
    return ModelSource(name)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype of torch by its name, like `bfloat16`. Raises InputError for another one."""
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype) or not known.is_floating_point:
        raise InputError(f"dtype {dtype!r} given; allowed: float32, bfloat16 or float16")
    return known


def looks_local(name: str) -> bool:
    """Whether a name is that of a folder or file, there or not, and not of a Hub model; `~` is written out."""
    path = Path(name)
    return path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix == ".gguf" or path.exists()


def find_config(name_or_path: str | os.PathLike[str]) -> ModelSource:
    """As `find_model` where the config alone is read: of a folder without weights too, or of a config.json."""
    path = Path(expand_home(name_or_path))
    is_gguf = path.suffix == ".gguf" or (
        path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf"))
    )
    return find_model(name_or_path) if is_gguf else ModelSource(expand_home(name_or_path))


def read_config(source: ModelSource, *, trust_remote_code: bool | None = None) -> PreTrainedConfig:
    """The config of a model. Raises InputError where there is none that transformers can read."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source.name, **source.options, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # strict configs raise errors of their own besides OSError, ValueError, KeyError
        if is_adapter(source.name):
            raise adapter_alone(source.name) from error
        reason = (
            " ".join(str(error).split())[:300] or type(error).__name__
        )  # strict configs tell the field and its fault
        raise InputError(f"cannot read the config of {source}: {reason}") from error
    fit_pad_token_of_config(config)
    return config


def is_adapter(name: str) -> bool:
    """Whether a folder or Hub name has the config of an adapter."""
    from transformers.utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):
        return False


def adapter_alone(name: str) -> InputError:
    """The refusal of an adapter in the place of a model."""
    return InputError(f"{name} is an adapter, not a model: merge it first ({_MERGE.format(name=name)})")


def _check_adapter(folder: Path) -> None:
    """Refuse adapters: transformers would attach one, and its tensors would be taken for the model's own."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    weights = [p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_")]
    if not weights:
        raise adapter_alone(str(folder))
    raise InputError(
        f"{folder} holds an adapter ({ADAPTER_CONFIG}) next to the weights of a model: where these contain it, remove "
        "adapter_config.json and adapter_model.safetensors; where they do not, move both to a folder of their own and "
        f"merge it ({_MERGE.format(name='THAT FOLDER')})"
    )


def _gguf(path: Path) -> ModelSource:
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    if (part := _PART.search(path.name)) and int(part.group(1)) > 1:
        raise InputError(
            f"{path} is one of {int(part.group(1))} parts of a model, and transformers reads whole GGUF files: join "
            "them first (llama-gguf-split --merge FIRST_PART WHOLE)"
        )
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is damaged: it does not begin as a GGUF file; copy or download it again")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path} needs gguf, which is not installed: pip install linearize[gguf]")
    return ModelSource(str(path.parent), path.name)


def fit_pad_token_of_config(config: PreTrainedConfig) -> None:
    """Let a config pad with EOS where its pad id is beyond the vocabulary; no model can be built with such an id."""
    for each in {id(part): part for part in (config, config.get_text_config())}.values():
        _fit(each, getattr(each, "vocab_size", None))


def fit_pad_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer, and `generate` of the model, pad with EOS where the pad id has no embedding."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    _fit(model.generation_config, vocabulary)
    if is_outside(tokenizer.pad_token_id, vocabulary):
        LOG.warning(
            "the tokenizer's pad token %r has the id %d and the model %d embeddings: padding with EOS instead",
            tokenizer.pad_token, tokenizer.pad_token_id, vocabulary,
        )  # fmt: skip
        tokenizer.pad_token = None if is_outside(tokenizer.eos_token_id, vocabulary) else tokenizer.eos_token


def take_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give a tokenizer the BOS, EOS and pad token that a config names by ids: some versions of transformers read a
    GGUF file's BOS as its EOS."""
    for kind in ("bos", "eos", "pad"):
        token = getattr(config, f"{kind}_token_id", None)
        if isinstance(token, int) and token != getattr(tokenizer, f"{kind}_token_id"):
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token))


def is_outside(token: int | None, vocabulary: int) -> bool:
    """Whether there is such a token, and no embedding for it."""
    return token is not None and not 0 <= token < vocabulary


def _fit(config: PreTrainedConfig | GenerationConfig, vocabulary: int | None) -> None:
    """The pad id of a config that has EOS ids, one or several, beside it."""
    if vocabulary is None or not is_outside(getattr(config, "pad_token_id", None), vocabulary):
        return
    ends = getattr(config, "eos_token_id", None)
    inside = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None and 0 <= end < vocabulary]
    config.pad_token_id = inside[0] if inside else None
