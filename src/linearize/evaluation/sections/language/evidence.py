"""Tokens that the text itself has announced, by how far back it did: recall measured on plain text.

A token that completes a pair of tokens seen before in the document can be recalled from there (associative recall
hits: Zoology, 2312.04927). Which tokens these are is read off the text alone, so no model chooses them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from linearize.metrics.token_scores import IGNORED, number_documents
from linearize.training.data.packing import PackedRows

NO_EVIDENCE = -1


def evidence_distance(rows: PackedRows) -> Tensor:
    """For every counted token, in the order of `score_batches`: how far back its last evidence is.

    The token t completes the pair (x[t-1], x[t]). Its evidence is the last place s < t of the same document (or piece
    of one) with the same pair, the distance `t - 1 - s` that from the predicting token to s; a pair may overlap itself.
    `NO_EVIDENCE` where the pair is new. Returns [N] int64.
    """
    document_BT, _ = number_documents(rows.position_ids)
    found = torch.full_like(rows.input_ids, NO_EVIDENCE)
    for row, (ids, documents) in enumerate(zip(rows.input_ids.tolist(), document_BT.tolist(), strict=True)):
        last: dict[tuple[int, int], int] = {}
        for t in range(1, len(ids)):
            if documents[t] != documents[t - 1]:
                last = {}
                continue
            pair = (ids[t - 1], ids[t])
            if pair in last:
                found[row, t] = t - 1 - last[pair]
            last[pair] = t
    return found[:, 1:][rows.labels[:, 1:] != IGNORED]


def evidence_classes(distance_N: Tensor, reach: int) -> Mapping[str, Tensor]:
    """Masks [N]: evidence `beyond` a window of `reach` tokens (the query included), `inside` it, or `none`."""
    return {
        "beyond": distance_N >= reach,
        "inside": (distance_N >= 0) & (distance_N < reach),
        "none": distance_N == NO_EVIDENCE,
    }
