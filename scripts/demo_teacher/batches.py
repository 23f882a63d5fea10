"""Batches made on the fly: fresh recall documents and reshuffled stories; batch k depends on the seed and k alone.

Rows are padded on the right and hold one document each, so plain causal attention keeps documents apart.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from demo_teacher.text import BOS_ID, EOS_ID, PAD_ID
from linearize.demo.recall import CODE_DIGITS, RecallItem, recall_document

CURRICULUM = ((0.0, 128), (0.06, 256), (0.15, 512), (0.30, 1024))
"""(share of training done, longest recall document from there on, in tokens)."""
FACT_TOKENS, QUESTION_TOKENS = 14, 25
LENGTH_MARGIN = 0.94

Rows = tuple[Tensor, Tensor]
"""Token ids `[B, T]` int64 and the loss weight of each token `[B, T]` float32 (0 on padding and on the first token)."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What a step holds: `recall_tokens` tokens of recall documents and `num_stories` stories."""

    recall_tokens: int
    num_stories: int
    context: int
    answer_weight: float
    hay_weight: float
    seed: int


class RecallAndStories(Dataset[tuple[Rows, Rows]]):
    """Item k is step k's (recall rows, story rows); `progress(k)` in [0, 1] sets the length of the recall documents."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stories: Sequence[str],
        hay: Sequence[str],
        plan: BatchPlan,
        ratio: float,
        progress: Callable[[int], float],
    ) -> None:
        self.encoder, self.hay = WordEncoder(tokenizer), hay
        self.encoder.check(stories[:50])
        self.rows = [self.encoder.document(story)[: plan.context // 2] for story in stories]
        self.plan, self.ratio, self.progress = plan, ratio, progress

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, step: int) -> tuple[Rows, Rows]:
        return self._recall_rows(step), self._story_rows(step)

    def _recall_rows(self, step: int) -> Rows:
        rng = random.Random(self.plan.seed * 1_000_003 + step)
        length = min(row_length(self.progress(step)), self.plan.context)
        items = [self._document(rng, length) for _ in range(max(1, self.plan.recall_tokens // length))]
        encoded = [self.encoder.recall(item) for item in items]
        weights = [np.where(answer, self.plan.answer_weight, self.plan.hay_weight)[:length] for _, answer in encoded]
        return pad([ids[:length] for ids, _ in encoded], weights)

    def _document(self, rng: random.Random, length: int) -> RecallItem:
        """A recall document of at most about `length` tokens, with one to four facts."""
        most = 4 if length >= 256 else 2
        num_facts, num_questions = rng.randint(1, most), rng.randint(1, 2 * most)
        overhead = 2 + FACT_TOKENS * num_facts + QUESTION_TOKENS * num_questions
        num_words = max(8, int(LENGTH_MARGIN * (length - overhead) / self.ratio))
        return recall_document(rng, self.hay, num_words=num_words, num_facts=num_facts, num_questions=num_questions)

    def _story_rows(self, step: int) -> Rows:
        """The next stories of an endless row of shuffled epochs."""
        count, total = self.plan.num_stories, len(self.rows)
        rows: list[list[int]] = []
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, total)
            rows.append(self.rows[_order(self.plan.seed, epoch, total)[place]])
        return pad(rows, [np.ones(len(row)) for row in rows])


def row_length(progress: float) -> int:
    """Tokens of a recall document at this share of training."""
    return CURRICULUM[bisect_right([start for start, _ in CURRICULUM], progress) - 1][1]


class WordEncoder:
    """The tokenizer's ids from a table of words, several times faster than the tokenizer itself.

    A word is cut with the white space before it; byte-level BPE never merges across that, so the ids are the same.
    """

    _WORD = re.compile(r"\s*\S+")

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of `text`, which must not end in white space, each with its ids."""
        return [(word, self._ids(word)) for word in self._WORD.findall(text)]

    def document(self, text: str) -> list[int]:
        """`<s> text </s>` as ids."""
        return [BOS_ID, *(token for _, ids in self.words(text) for token in ids), EOS_ID]

    def recall(self, item: RecallItem) -> tuple[list[int], np.ndarray]:
        """Ids of the whole document and a bool mask of its answers' digits."""
        ids, starts, offset = [BOS_ID], {start - 1 for start, _ in item.answers}, 0
        answers: list[int] = []
        for word, word_ids in self.words(item.text):
            if offset in starts:
                answers += range(len(ids) + 1, len(ids) + 1 + CODE_DIGITS)
            ids += word_ids
            offset += len(word)
        mask = np.zeros(len(ids) + 1, dtype=bool)
        mask[answers] = True
        return [*ids, EOS_ID], mask

    def check(self, texts: Sequence[str]) -> None:
        """Raise unless the tokenizer gives the same ids for `texts`."""
        for text in texts:
            if self.document(text) != [*self.tokenizer(text)["input_ids"], EOS_ID]:
                raise RuntimeError(f"the table of words and the tokenizer differ on {text[:60]!r}")

    def _ids(self, word: str) -> list[int]:
        if word not in self.known:
            self.known[word] = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return self.known[word]


def pad(rows: Sequence[Sequence[int]], weights: Sequence[np.ndarray]) -> Rows:
    """Right-pad to a multiple of 32; the first token of a row has weight 0, since nothing predicts it."""
    width = -(-max(map(len, rows)) // 32) * 32
    ids = torch.full((len(rows), width), PAD_ID, dtype=torch.long)
    weight = torch.zeros(len(rows), width)
    for index, (row, row_weight) in enumerate(zip(rows, weights, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        weight[index, : len(row)] = torch.from_numpy(np.asarray(row_weight, dtype=np.float32))
    weight[:, 0] = 0.0
    return ids, weight


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


def _order(seed: int, epoch: int, total: int) -> list[int]:
    key = (seed, epoch, total)
    if key not in _ORDERS:
        _ORDERS.clear()
        order = list(range(total))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        _ORDERS[key] = order
    return _ORDERS[key]
