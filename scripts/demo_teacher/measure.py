"""What a teacher is judged by: loss on stories it never saw, and exact answers by distance."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_teacher.batches import FACT_TOKENS, LENGTH_MARGIN, QUESTION_TOKENS, pad
from demo_teacher.text import EOS_ID
from linearize.evaluation.needles import CODE_DIGITS, recall_document

DISTANCES = (50, 100, 200, 400, 600, 800, 900)
"""Tokens between a fact and its answer, roughly; the measured mean is reported beside each."""

Question = tuple[list[int], int]
"""Token ids of a prompt and its answer, and the distance in tokens from the fact's last digit to the answer's first."""


def predictions(model: LlamaForCausalLM, ids_BT: Tensor, counted_BT: Tensor) -> Tensor:
    """Logits `[N, V]` that predict the N tokens marked in `counted_BT` (bool, never a row's first token)."""
    hidden = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
    return model.lm_head(hidden[counted_BT[:, 1:]])


def weighted_loss(model: LlamaForCausalLM, ids_BT: Tensor, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens of weight times next-token loss (nats), and the sum of the weights."""
    counted = weight_BT > 0
    weight = weight_BT[counted]
    losses = F.cross_entropy(predictions(model, ids_BT, counted).float(), ids_BT[counted], reduction="none")
    return (losses * weight).sum(), weight.sum()


@torch.no_grad()
def digit_accuracy(model: LlamaForCausalLM, rows: tuple[Tensor, Tensor], answer_weight: float) -> float:
    """Share of the answers' digits (known by their weight) that are the most likely token."""
    digits = rows[1] == answer_weight
    best = predictions(model, rows[0], digits).argmax(-1)
    return float((best == rows[0][digits]).float().mean())


@torch.no_grad()
def heldout_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stories: Sequence[str], longest: int, batch: int = 16
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
    most_facts: int = 4,
) -> list[Question]:
    """`count` documents of at most `context` tokens with one to `most_facts` facts, one asked `distance` tokens on."""
    rng = random.Random(seed * 7919 + distance)
    questions: list[Question] = []
    while len(questions) < count:
        num_facts = rng.randint(1, most_facts)
        max_words = int(LENGTH_MARGIN * (context - QUESTION_TOKENS - FACT_TOKENS * num_facts) / ratio)
        words = min(max_words, int(max(1, distance - QUESTION_TOKENS) / ratio))
        item = recall_document(rng, hay, num_words=rng.randint(words, max_words), num_facts=num_facts, distance=words)
        ids = tokenizer(item.prompt + item.answer)["input_ids"]
        fact_end = item.text.index(item.answer) + len(item.answer)
        tokens = len(ids) - CODE_DIGITS - len(tokenizer(item.text[:fact_end])["input_ids"])
        if len(ids) <= context:
            questions.append((ids, tokens))
    return questions


@torch.no_grad()
def recall_accuracy(model: LlamaForCausalLM, questions: Sequence[Question], batch: int = 16) -> float:
    """Share of questions whose digits are all the most likely token (the same as exact greedy generation)."""
    device = next(model.parameters()).device
    right = 0
    for chunk in _chunks(sorted((ids for ids, _ in questions), key=len), batch):
        ids, answers = pad(chunk, [np.arange(len(row)) >= len(row) - CODE_DIGITS for row in chunk])
        best = predictions(model, ids.to(device), answers.to(device) > 0).argmax(-1).cpu()
        right += int((best == ids[answers > 0]).view(-1, CODE_DIGITS).all(-1).sum())
    return right / len(questions)


def recall_table(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    hay: Sequence[str],
    *,
    count: int,
    context: int,
    ratio: float,
    seed: int,
    most_facts: int,
) -> list[dict[str, float]]:
    """For each of DISTANCES: the measured mean distance (tokens) and the share of exact answers."""
    table = []
    for distance in DISTANCES:
        questions = recall_questions(
            tokenizer, hay, distance, count=count, context=context, ratio=ratio, seed=seed, most_facts=most_facts
        )
        mean = sum(tokens for _, tokens in questions) / len(questions)
        table.append({"distance": round(mean, 1), "exact": recall_accuracy(model, questions), "questions": count})
    return table


def _chunks(rows: Sequence[list[int]], size: int) -> Iterator[Sequence[list[int]]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
