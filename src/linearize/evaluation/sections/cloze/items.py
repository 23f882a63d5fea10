"""A last-word cloze: items cut from any text, and how a model answers them.

An item is the text before the last word of a sentence, and that word. A model scores it by full forward passes, and
writes it greedily through its own cache.

Letters: B rows, T tokens a row, V vocabulary.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.decoding.loading import pad_token
from linearize.evaluation.recall import matches
from linearize.metrics.token_scores import LOGITS_BYTES, View
from linearize.training.data.pseudo_labels import left_padded

SPARE_TOKENS = 2  # written beyond the word's own, so that a longer word shows
_APOSTROPHES, _CLOSING = "'\u2019", "\"'\u201d\u2019\u00bb)\\]"
_LAST_WORD = re.compile(rf"(?<=\S )[^\W\d_]{{2,}}(?:[{_APOSTROPHES}-][^\W\d_]+)*(?=[.!?][{_CLOSING}]*(?:\s|$))")
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class ClozeItem:
    """`context` ends without a space; `choices[0]` is the true word, the others are last words of other items.

    Token ids: `context_ids` begin with BOS where the tokenizer has one; `choice_ids` are those of each choice behind
    the context, the space between them included.
    """

    context: str
    choices: tuple[str, ...]
    context_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]

    @property
    def word(self) -> str:
        """The true word."""
        return self.choices[0]


def cut_items(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    items: int,
    choices: int,
    min_words: int,
    max_words: int,
    max_tokens: int,
    seed: int,
) -> list[ClozeItem]:
    """At most `items` items, drawn by the seed: one of every text before a second one of any.

    A context has at least `min_words` words and is cut on the left to `max_words`; with its word it has at most
    `max_tokens` tokens. Fewer items, perhaps none, where the text has no more.
    """
    rng = random.Random(seed)
    candidates = _candidates(texts, min_words, max_words, rng)
    words = sorted({word for _, word in candidates})
    chosen: list[ClozeItem] = []
    for context, word in candidates:
        if len(chosen) == items:
            break
        others = [other for other in words if other.casefold() != word.casefold()]
        if len({other.casefold() for other in others}) < choices - 1:
            continue
        item = _item(context, (word, *_draw(others, choices - 1, rng)), tokenizer)
        if item is not None and len(item.context_ids) + max(map(len, item.choice_ids)) <= max_tokens:
            chosen.append(item)
    return chosen


def _candidates(texts: Sequence[str], min_words: int, max_words: int, rng: random.Random) -> list[tuple[str, str]]:
    """(context, word) of every place, in rounds: each round takes one place of every text that has any left."""
    queues = []
    for text in texts:
        places = [m for m in _LAST_WORD.finditer(text) if len(text[: m.start()].split()) >= min_words]
        rng.shuffle(places)
        queues.append([(_last_words(text[: m.start()].rstrip(), max_words), m.group()) for m in places])
    rng.shuffle(queues)
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


def _last_words(text: str, count: int) -> str:
    starts = [m.start() for m in _WORD.finditer(text)]
    return text[starts[-count] :] if len(starts) > count else text


def _draw(words: list[str], count: int, rng: random.Random) -> list[str]:
    """Different words, also when case is ignored."""
    drawn: dict[str, str] = {}
    while len(drawn) < count:
        word = rng.choice(words)
        drawn.setdefault(word.casefold(), word)
    return list(drawn.values())


def _item(context: str, choices: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> ClozeItem | None:
    """The item as tokens; None where a tokenizer joins a choice to the text before it into one token."""
    context_ids = tuple(tokenizer(context, add_special_tokens=False)["input_ids"])
    choice_ids = []
    for choice in choices:
        ids = tuple(tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"])
        if ids[: len(context_ids)] != context_ids or len(ids) == len(context_ids):
            return None
        choice_ids.append(ids[len(context_ids) :])
    bos = (tokenizer.bos_token_id,) if isinstance(tokenizer.bos_token_id, int) else ()
    return ClozeItem(context=context, choices=choices, context_ids=(*bos, *context_ids), choice_ids=tuple(choice_ids))


def word_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ClozeItem],
    *,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Item by item what a model does, JSON-able: lists of equal length, and `tie`.

    `scored`: the true word has the highest log-likelihood; `choice`: which one has; `greedy`: each of its tokens is the
    argmax of the full forward pass; `margin`: by how many nats its closest token was the argmax (or its first wrong one
    was not); `same_tokens`: greedy generation wrote just the word's tokens; `generated`: it wrote the word and ended it
    there; `written`: its text. `tie`: margins below it may fall either way in the model's precision.
    """
    was_training = model.training
    model.eval()
    total = 2 * len(items)
    try:
        scored = score_words(
            model, items, batch=batch, pad=pad_token(tokenizer), progress=lambda done: progress(done, total)
        )
        written = write_words(
            model, tokenizer, items, batch=batch, progress=lambda done: progress(len(items) + done, total)
        )
    finally:
        model.train(was_training)
    progress(total, total)
    return {**scored, **written, "tie": max(1e-3, 64 * torch.finfo(model.dtype).eps)}


@torch.inference_mode()
def score_words(
    model: PreTrainedModel,
    items: Sequence[ClozeItem],
    *,
    batch: int,
    pad: int,
    progress: Callable[[int], None] = lambda done: None,
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
        progress(start * len(items) // len(texts))
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
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Greedy generation through the model's cache, in left-padded batches: `same_tokens`, `generated`, `written`."""
    pad = pad_token(tokenizer)
    order = sorted(range(len(items)), key=lambda i: len(items[i].context_ids))
    new_tokens: list[list[int]] = [[] for _ in items]
    generate: Any = model.generate
    for start in range(0, len(items), batch):
        progress(start)
        some = order[start : start + batch]
        ids_BT, mask_BT = left_padded([items[i].context_ids for i in some], pad, model.device)
        out_BT = generate(
            input_ids=ids_BT, attention_mask=mask_BT, do_sample=False, num_beams=1,
            repetition_penalty=1.0, no_repeat_ngram_size=0, pad_token_id=pad,
            max_new_tokens=max(len(items[i].choice_ids[0]) for i in some) + SPARE_TOKENS,
        )  # fmt: skip
        for i, row in zip(some, out_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
            new_tokens[i] = row
    texts = [_continuation(tokenizer, item, row) for item, row in zip(items, new_tokens, strict=True)]
    words = [item.choice_ids[0] for item in items]
    return {
        "same_tokens": [int(tuple(row[: len(word)]) == word) for row, word in zip(new_tokens, words, strict=True)],
        "generated": [int(matches(text, item.word)) for item, text in zip(items, texts, strict=True)],
        "written": texts,
    }


def _continuation(tokenizer: PreTrainedTokenizerBase, item: ClozeItem, row: list[int]) -> str:
    """The text behind the context; decoded with it, since what a token stands for depends on what is before it."""
    before = str(tokenizer.decode(list(item.context_ids), skip_special_tokens=True))
    return str(tokenizer.decode([*item.context_ids, *row], skip_special_tokens=True))[len(before) :]
