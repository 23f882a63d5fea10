"""Last words as a model answers them: scored by full forward passes, and written greedily through its own cache.

Letters: B rows, T tokens a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.decoding.loading import pad_token
from linearize.evaluation.recall import matches
from linearize.evaluation.sections.cloze.items import ClozeItem
from linearize.metrics.token_scores import LOGITS_BYTES, View
from linearize.training.data.pseudo_labels import left_padded

SPARE_TOKENS = 2  # written beyond the word's own, so that a longer word shows


def word_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ClozeItem],
    *,
    batch: int,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Item by item what a model does, JSON-able: lists of equal length, and `tie`.

    `scored`: the true word has the highest log-likelihood; `choice`: which one has; `greedy`: each of its tokens is the
    argmax of the full forward pass; `margin`: by how many nats its closest token was the argmax (or its first wrong one
    was not); `same_tokens`: greedy generation wrote just the word's tokens; `generated`: it wrote the word and ended it
    there; `given`: what it wrote. `tie`: margins below it may fall either way in the model's precision.
    """
    was_training = model.training
    model.eval()
    total = 2 * len(items)
    try:
        scored = score_words(model, items, batch=batch, pad=pad_token(tokenizer), told=lambda done: told(done, total))
        written = write_words(model, tokenizer, items, batch=batch, told=lambda done: told(len(items) + done, total))
    finally:
        model.train(was_training)
    told(total, total)
    return {**scored, **written, "tie": max(1e-3, 64 * torch.finfo(model.dtype).eps)}


@torch.inference_mode()
def score_words(
    model: PreTrainedModel,
    items: Sequence[ClozeItem],
    *,
    batch: int,
    pad: int,
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Full forward passes over every context with every choice: `scored`, `greedy`, `margin` and `choice` by item."""
    rows: dict[tuple[int, tuple[int, ...]], list[int]] = {}  # the last token of a word is predicted, not read
    for i, item in enumerate(items):
        for c, word in enumerate(item.choice_ids):
            rows.setdefault((i, word[:-1]), []).append(c)
    texts = sorted(rows, key=lambda row: -len(items[row[0]].context_ids) - len(row[1]))
    view = View(model=model)
    longest = len(items[texts[0][0]].context_ids) + len(texts[0][1])
    step = max(1, min(batch, LOGITS_BYTES // (4 * longest * view.vocabulary)))
    totals = [[0.0] * len(item.choices) for item in items]
    margins = [0.0] * len(items)
    for start in range(0, len(texts), step):
        told(start * len(items) // len(texts))
        some = texts[start : start + step]
        logits_BTV = view.logits(_right_padded([(*items[i].context_ids, *begin) for i, begin in some], pad))
        for (i, begin), logits_TV in zip(some, logits_BTV, strict=True):
            first = len(items[i].context_ids) - 1
            for c in rows[i, begin]:
                totals[i][c], margin = _of_word(logits_TV[first : first + len(begin) + 1], items[i].choice_ids[c])
                margins[i] = margin if c == 0 else margins[i]
    choice = [max(range(len(total)), key=total.__getitem__) for total in totals]
    return {
        "scored": [int(c == 0) for c in choice],
        "choice": choice,
        "greedy": [int(margin > 0) for margin in margins],
        "margin": [abs(margin) for margin in margins],
    }


def _of_word(logits_TV: Tensor, word: Sequence[int]) -> tuple[float, float]:
    """Log-likelihood of the word's tokens, and how far its closest token is above (or the first wrong one below) the
    best other one, in nats: positive exactly where all are the argmax."""
    log_p_TV = logits_TV.double().log_softmax(-1)
    word_T1 = torch.tensor(word, device=log_p_TV.device)[:, None]
    own_T = log_p_TV.gather(-1, word_T1)[:, 0]
    above_T = own_T - log_p_TV.scatter(-1, word_T1, -torch.inf).amax(-1)
    wrong_N = (above_T <= 0).nonzero()[:, 0]
    margin = above_T[wrong_N[0]] if len(wrong_N) else above_T.min()
    return float(own_T.sum()), float(margin)


def _right_padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Rows of one document each, padding behind them: what comes later changes nothing before it."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *([pad] * (longest - len(row)))] for row in rows])
    return {"input_ids": ids, "position_ids": torch.arange(longest).expand_as(ids)}


@torch.inference_mode()
def write_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ClozeItem],
    *,
    batch: int,
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Greedy generation through the model's own cache, in left-padded batches: `same_tokens`, `generated`, `given`."""
    pad = pad_token(tokenizer)
    order = sorted(range(len(items)), key=lambda i: len(items[i].context_ids))
    given: list[list[int]] = [[] for _ in items]
    generate: Any = model.generate
    for start in range(0, len(items), batch):
        told(start)
        some = order[start : start + batch]
        ids_BT, mask_BT = left_padded([items[i].context_ids for i in some], pad, model.device)
        out_BT = generate(
            input_ids=ids_BT, attention_mask=mask_BT, do_sample=False, num_beams=1,
            repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=pad,
            max_new_tokens=max(len(items[i].choice_ids[0]) for i in some) + SPARE_TOKENS,
        )  # fmt: skip
        for i, row in zip(some, out_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
            given[i] = row
    texts = [_continuation(tokenizer, item, row) for item, row in zip(items, given, strict=True)]
    words = [item.choice_ids[0] for item in items]
    return {
        "same_tokens": [int(tuple(row[: len(word)]) == word) for row, word in zip(given, words, strict=True)],
        "generated": [int(matches(text, item.word)) for item, text in zip(items, texts, strict=True)],
        "given": texts,
    }


def _continuation(tokenizer: PreTrainedTokenizerBase, item: ClozeItem, row: list[int]) -> str:
    """The text behind the context; decoded with it, since what a token stands for depends on what is before it."""
    before = str(tokenizer.decode(list(item.context_ids), skip_special_tokens=True))
    return str(tokenizer.decode([*item.context_ids, *row], skip_special_tokens=True))[len(before) :]
