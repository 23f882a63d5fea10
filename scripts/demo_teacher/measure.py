"""What a teacher is judged by: loss on stories it never saw, and exact answers by distance."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from demo_teacher.batches import FACT_TOKENS, LENGTH_MARGIN, QUESTION_TOKENS, pad
from demo_teacher.text import EOS_ID
from linearize.demo.recall import CODE_DIGITS, recall_document

DISTANCES = (50, 100, 200, 400, 600, 800, 900)
"""Tokens between a fact and its answer, roughly; the measured mean is reported beside each."""

Question = tuple[list[int], int]
"""Token ids of a prompt and its answer, and the distance in tokens from the fact's last digit to the answer's first."""


def weighted_loss(model: nn.Module, ids_BT: Tensor, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens of weight times next-token loss (nats), and the sum of the weights."""
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    weight = weight_BT[:, 1:].flatten()
    return (losses * weight).sum(), weight.sum()


@torch.no_grad()
def heldout_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, stories: Sequence[str], longest: int, batch: int = 64
) -> float:
    """Mean loss in nats per token over whole stories, `</s>` included, each read on its own."""
    device = next(model.parameters()).device
    total, count = 0.0, 0.0
    rows = sorted(([*ids, EOS_ID][:longest] for ids in tokenizer(list(stories))["input_ids"]), key=len)
    for chunk in _chunks(rows, batch):
        ids, weight = pad(chunk, [np.ones(len(row)) for row in chunk])
        loss, tokens = weighted_loss(model, ids.to(device), weight.to(device))
        total, count = total + float(loss), count + float(tokens)
    return total / count


def recall_questions(
    tokenizer: PreTrainedTokenizerFast,
    hay: Sequence[str],
    distance: int,
    *,
    count: int,
    context: int,
    ratio: float,
    seed: int,
) -> list[Question]:
    """`count` documents of at most `context` tokens with one to four facts, one of them asked `distance` tokens on."""
    rng = random.Random(seed * 7919 + distance)
    found: list[Question] = []
    while len(found) < count:
        num_facts = rng.randint(1, 4)
        room = int(LENGTH_MARGIN * (context - QUESTION_TOKENS - FACT_TOKENS * num_facts) / ratio)
        words = min(room, int(max(1, distance - QUESTION_TOKENS) / ratio))
        item = recall_document(rng, hay, num_words=rng.randint(words, room), num_facts=num_facts, distance=words)
        ids = tokenizer(item.prompt + item.answer)["input_ids"]
        fact_end = item.text.index(item.answer) + len(item.answer)
        tokens = len(ids) - CODE_DIGITS - len(tokenizer(item.text[:fact_end])["input_ids"])
        if len(ids) <= context:
            found.append((ids, tokens))
    return found


@torch.no_grad()
def recall_accuracy(model: nn.Module, questions: Sequence[Question], batch: int = 32) -> float:
    """Share of questions whose digits are all the most likely token (the same as exact greedy generation)."""
    device = next(model.parameters()).device
    right = 0
    for chunk in _chunks(sorted((ids for ids, _ in questions), key=len), batch):
        ids, _ = pad(chunk, [np.ones(len(row)) for row in chunk])
        best = model(input_ids=ids.to(device), use_cache=False).logits.argmax(-1).cpu()
        for row, tokens in enumerate(chunk):
            end = len(tokens)
            right += bool((best[row, end - CODE_DIGITS - 1 : end - 1] == ids[row, end - CODE_DIGITS : end]).all())
    return right / len(questions)


def recall_table(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    hay: Sequence[str],
    *,
    count: int,
    context: int,
    ratio: float,
    seed: int,
    distances: Sequence[int] = DISTANCES,
) -> list[dict[str, float]]:
    """For each distance (tokens): the measured mean distance and the share of exact answers."""
    table = []
    for distance in distances:
        questions = recall_questions(tokenizer, hay, distance, count=count, context=context, ratio=ratio, seed=seed)
        mean = sum(tokens for _, tokens in questions) / len(questions)
        table.append({"distance": round(mean, 1), "exact": recall_accuracy(model, questions), "questions": count})
    return table


def _chunks(rows: Sequence[list[int]], size: int) -> Iterator[Sequence[list[int]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
