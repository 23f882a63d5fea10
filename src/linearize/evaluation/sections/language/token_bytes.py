"""How many bytes of text each token stands for, so that losses become bits per byte, whatever the tokenizer."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "▁"


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Bytes [size] of every token id in UTF-8; 0 for special tokens (BOS, roles of a chat) and unused ids.

    `size`: the vocabulary of the model. The bytes are those of the text as the tokenizer normalises it.
    """
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    byte_level = _is_byte_level(tokenizer)
    known = min(size, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(range(known)))
    table = torch.zeros(size, dtype=torch.int64)
    for i, name in enumerate(names):
        if name is not None and i not in special:
            table[i] = len(name) if byte_level and i not in added else _bytes(name)
    return table


def prefix_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes that the tokenizer puts before every text: 1 for the space of sentencepiece, mostly 0."""
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    table = bytes_of_tokens(tokenizer, max(ids) + 1)
    return int(table[ids].sum()) - 1


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token's name holds one character for each of its bytes, as in GPT-2."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_encoder")
    return '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))


def _bytes(name: str) -> int:
    return 1 if _BYTE.fullmatch(name) else len(name.replace(_SPACE, " ").encode())
