"""Facts about the tokens of a text, whatever the model: where a token's evidence is, how many bytes it stands for.

A token that completes a pair of tokens seen before in the document can be recalled from there (associative recall
hits: Zoology, 2312.04927). Bytes turn losses into bits per byte, which compare across tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from linearize.metrics.token_scores import IGNORED, number_documents
from linearize.training.data.packing import PackedRows

NO_EVIDENCE = -1
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "▁"


def evidence_distance(rows: PackedRows) -> Tensor:
    """For every counted token, in the order of `score_batches`: how far back its last evidence is.

    The token t completes the pair (x[t-1], x[t]). Its evidence is the last place s < t of the same document (or part
    of one) with the same pair, the distance `t - 1 - s` that from the predicting token to s; a pair may overlap itself.
    `NO_EVIDENCE` where the pair is new. Returns [N] int64.
    """
    document_BT, _ = number_documents(rows.position_ids)
    distance_BT = torch.full_like(rows.input_ids, NO_EVIDENCE)
    for row, (ids, documents) in enumerate(zip(rows.input_ids.tolist(), document_BT.tolist(), strict=True)):
        last: dict[tuple[int, int], int] = {}
        for t in range(1, len(ids)):
            if documents[t] != documents[t - 1]:
                last = {}
                continue
            pair = (ids[t - 1], ids[t])
            if pair in last:
                distance_BT[row, t] = t - 1 - last[pair]
            last[pair] = t
    return distance_BT[:, 1:][rows.labels[:, 1:] != IGNORED]


def evidence_classes(distance_N: Tensor, reach: int) -> Mapping[str, Tensor]:
    """Masks [N]: evidence `beyond` a window of `reach` tokens (the query included), `inside` it, or `none`."""
    return {
        "beyond": distance_N >= reach,
        "inside": (distance_N >= 0) & (distance_N < reach),
        "none": distance_N == NO_EVIDENCE,
    }


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


def bytes_of_targets(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, rows: PackedRows, target_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Bytes [N] of the text that each counted token stands for, and whether [N] it is text, which no EOS is.

    The space that some tokenizers put before a text is not counted: it is taken off a document's first token.
    """
    bytes_N = bytes_of_tokens(tokenizer, vocabulary)[target_N]
    begins_BT = (rows.position_ids == 0) & (rows.input_ids == tokenizer.bos_token_id)
    first_N = begins_BT[:, :-1][rows.labels[:, 1:] != IGNORED]
    return (bytes_N - prefix_bytes(tokenizer) * first_N).clamp(min=0), bytes_N > 0


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
