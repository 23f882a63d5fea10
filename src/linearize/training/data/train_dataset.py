"""The training rows of a conversion: packed for each stage's length, and divided over the steps of a schedule."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from linearize.errors import InputError
from linearize.training.config import Batch
from linearize.training.data.documents import Document
from linearize.training.data.packing import IndexedRows, batches, index_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainDataset:
    """Documents to train on; `keep_whole`, `one_per_row`: see `pack`."""

    documents: Sequence[Document]
    pad_token_id: int
    keep_whole: bool = False
    one_per_row: bool = False
    packed: dict[int, IndexedRows] = field(default_factory=dict)

    def rows(self, length: int, part: int = 0, parts: int = 1) -> IndexedRows:
        """Rows of `length` tokens: every `parts`-th of all, from row `part` on; different parts share no row.

        Raises:
            InputError: fewer rows than parts.
        """
        if length not in self.packed:
            self.packed[length] = index_rows(
                self.documents,
                length,
                pad_token_id=self.pad_token_id,
                keep_whole=self.keep_whole,
                one_per_row=self.one_per_row,
            )
        rows = self.packed[length]
        if len(rows) < parts:
            raise InputError(
                f"the training text has {len(rows)} rows of {length} tokens, fewer than the schedule's {parts} steps, "
                "each of which needs rows of its own: give more data or a shorter length"
            )
        return rows.every(part, parts)

    def sample(self, length: int, tokens: int, batch: int, device: torch.device | str = "cpu") -> list[Batch]:
        """Batches of about `tokens` tokens, at least a row, drawn the same way each time."""
        rows = self.rows(length)
        count = min(len(rows), max(1, round(tokens / length)))
        stream: Iterator[Batch] = batches(rows, 1, 0)
        drawn = [next(stream) for _ in range(count)]
        return [_joined(drawn[first : first + batch], device) for first in range(0, count, batch)]

    def fingerprint(self, length: int, heldout: Sequence[Batch]) -> str:
        """What distinguishes these rows and these held-out batches from others."""
        rows = self.rows(length)
        packing = [rows.documents.digest, length, len(rows), self.pad_token_id, self.keep_whole, self.one_per_row]
        digest = hashlib.sha256(json.dumps(packing).encode())
        for batch in heldout:
            digest.update(batch["input_ids"].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _joined(drawn: Sequence[Batch], device: torch.device | str) -> Batch:
    return {name: torch.cat([one[name] for one in drawn]).to(device) for name in drawn[0]}
