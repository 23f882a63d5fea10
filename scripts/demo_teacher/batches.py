"""Batches made on the fly: fresh recall documents and reshuffled stories; seed, k and length level decide batch k.

Rows are padded on the right and hold one document each, so plain causal attention keeps documents apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from demo_teacher.text import BOS_ID, EOS_ID, PAD_ID
from linearize.evaluation.needles import CODE_DIGITS, RecallDocument, recall_document

Level = tuple[int, tuple[int, int], tuple[int, int]]
CURRICULA: dict[str, tuple[Level, ...]] = {
    "few": (
        (64, (1, 2), (1, 1)),
        (128, (2, 3), (2, 3)),
        (256, (1, 4), (3, 7)),
        (512, (1, 4), (4, 12)),
        (1024, (1, 4), (6, 16)),
    ),
    "many": (
        (64, (2, 3), (1, 1)),
        (128, (3, 6), (2, 3)),
        (256, (4, 9), (4, 7)),
        (512, (1, 8), (4, 12)),
        (1024, (1, 8), (6, 16)),
    ),
}
"""Recall documents level by level: longest in tokens, fewest and most facts, fewest and most questions.

Copying the only code in sight is learned in minutes, choosing the right one takes long: short rows dense with facts
and questions teach it soonest, and both carry over to long rows.
"""
TOP_LEVEL_SHARE = 0.6
"""Share of steps at the level reached; the others draw one of levels 1 to it."""
POOL = 16
"""Batches of stories that are sorted by length together, so that little is padding."""
FACT_TOKENS, QUESTION_TOKENS = 14, 25
LENGTH_MARGIN = 0.94

Rows = tuple[Tensor, Tensor]
"""Token ids `[B, T]` int64 and the loss weight of each token `[B, T]` float32 (0 on padding and on the first token)."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What a step holds: `recall_tokens` tokens of recall documents and `num_stories` stories."""

    recall_tokens: int
    num_stories: int
    curriculum: str
    """A key of CURRICULA."""
    context: int
    answer_weight: float
    hay_weight: float
    hay_share: float
    """Share of the tokens of recall documents, answers apart, that are learned from at all."""
    seed: int


class RecallAndStories(Dataset[tuple[Rows, Rows]]):
    """Item k is step k's (recall rows, story rows); `level()` is the curriculum's level."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stories: Sequence[str],
        hay: Sequence[str],
        plan: BatchPlan,
        ratio: float,
        level: Callable[[], int],
    ) -> None:
        self.encoder, self.hay = WordEncoder(tokenizer), hay
        self.encoder.check(stories[:50])
        self.rows = [self.encoder.document(story)[: plan.context // 2] for story in stories]
        self.plan, self.ratio, self.level = plan, ratio, level
        self.order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, step: int) -> tuple[Rows, Rows]:
        return self._recall_rows(step), self._story_rows(step)

    def _recall_rows(self, step: int) -> Rows:
        rng = random.Random(self.plan.seed * 1_000_003 + step)
        top = self.level()
        level = top if rng.random() < TOP_LEVEL_SHARE else rng.randint(min(1, top), top)
        length = min(CURRICULA[self.plan.curriculum][level][0], self.plan.context)
        items = [self._document(rng, level, length) for _ in range(max(1, self.plan.recall_tokens // length))]
        encoded = [self.encoder.recall(item) for item in items]
        weights = [self._weights(rng, answer)[:length] for _, answer in encoded]
        return pad([ids[:length] for ids, _ in encoded], weights)

    def _weights(self, rng: random.Random, answer: np.ndarray) -> np.ndarray:
        """Answers in full, a random share of the rest."""
        drawn = np.random.default_rng(rng.getrandbits(32)).random(len(answer)) < self.plan.hay_share
        return np.where(answer, self.plan.answer_weight, self.plan.hay_weight * drawn)

    def _document(self, rng: random.Random, level: int, length: int) -> RecallDocument:
        """A recall document of at most about `length` tokens."""
        num_facts, num_questions = (rng.randint(*span) for span in CURRICULA[self.plan.curriculum][level][1:])
        overhead = 2 + FACT_TOKENS * num_facts + QUESTION_TOKENS * num_questions
        num_words = max(8, int(LENGTH_MARGIN * (length - overhead) / self.ratio))
        return recall_document(rng, self.hay, num_words=num_words, num_facts=num_facts, num_questions=num_questions)

    def _story_rows(self, step: int) -> Rows:
        """The next stories of an endless row of shuffled epochs."""
        count, total = self.plan.num_stories, len(self.rows)
        rows: list[list[int]] = []
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, total)
            rows.append(self.rows[self._order(epoch)[place]])
        return pad(rows, [np.ones(len(row)) for row in rows])

    def _order(self, epoch: int) -> list[int]:
        """The epoch's shuffled stories, neighbours of about one length: sorted in pools, then batches shuffled."""
        if self.order[0] != epoch:
            rng, count = random.Random(f"{self.plan.seed}/{epoch}"), self.plan.num_stories
            shuffled = rng.sample(range(len(self.rows)), len(self.rows))
            pools = [shuffled[at : at + POOL * count] for at in range(0, len(shuffled), POOL * count)]
            pools = [sorted(pool, key=lambda index: len(self.rows[index])) for pool in pools]
            batches = [pool[at : at + count] for pool in pools for at in range(0, len(pool), count)]
            rng.shuffle(batches)
            self.order = (epoch, [index for batch in batches for index in batch])
        return self.order[1]


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

    def recall(self, item: RecallDocument) -> tuple[list[int], np.ndarray]:
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
