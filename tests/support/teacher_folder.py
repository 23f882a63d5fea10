"""A folder with a random teacher and a tokenizer of single characters, and text that it knows."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from models import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

WORDS = ["the cat sat", "a red box", "on the mat", "code 4821", "and ran", "to see", "Ann: why", "so it was"]
TOKENS = ["<s>", "</s>", *string.ascii_letters[:26], *"ARN", *string.digits, *" \n:.,>"]


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def write_teacher(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """`changes`: of its config; `shard`: bytes a weights file holds at most."""
    write_tokenizer(folder)
    shard = changes.pop("shard", None)
    sizes = {"vocab_size": len(TOKENS), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    teacher = tiny(family, attention=None, **{**sizes, "max_position_embeddings": 64, **changes}).to(dtype)
    teacher.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))


def write_text(path: Path, documents: int = 30) -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [
        ", ".join(WORDS[i] for i in torch.randint(len(WORDS), (4 + n % 9,), generator=generator)) + "."
        for n in range(documents)
    ]
    path.write_text("\n\n".join(texts))
