"""The teacher's folder: half-precision weights, tokenizer, provenance; read back before it is trusted."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import tokenizers
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

DATASET = {
    "name": "TinyStories",
    "licence": "CDLA-Sharing-1.0",
    "source": "https://huggingface.co/datasets/roneneldan/TinyStories",
}


def save_teacher(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer.

    Weights are stored as float16 (they lie well inside its range, and it rounds eight times finer than bfloat16); the
    configuration says float32, so that a plain `from_pretrained` computes in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float32
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)  # left by from_pretrained, of no use to others
    tokenizer.save_pretrained(folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    halves = {name: tensor.to(torch.float16) for name, tensor in weights.items()}
    safetensors.torch.save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    for path in folder.iterdir():
        path.chmod(0o644)


def load_teacher(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model in float32 and tokenizer, as transformers' auto classes read them."""
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(again) is LlamaForCausalLM, type(again)
    return again, AutoTokenizer.from_pretrained(folder)


def check_tokenizer(before: PreTrainedTokenizerFast, after: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
    """Raise unless both encode `texts` to the same ids and decode them to the same text."""
    for text in texts:
        ids = before(text)["input_ids"]
        if after(text)["input_ids"] != ids or after.decode(ids, skip_special_tokens=True) != text:
            raise RuntimeError(f"the tokenizer read back from disk differs on {text[:60]!r}")


def write_provenance(folder: Path, *, data: Sequence[Path], facts: dict[str, Any]) -> None:
    """Write PROVENANCE.json: the data files with their SHA-256, then `facts`, then versions and hardware."""
    files = [{"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in data]
    record = {"data": {**DATASET, "files": files}, **facts, "versions": _versions(), "hardware": _hardware()}
    (folder / "PROVENANCE.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    """Total size of the folder's files in bytes."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _versions() -> dict[str, str]:
    modules = (torch, transformers, tokenizers, numpy)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
