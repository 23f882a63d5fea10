"""Which heads of a teacher look things up: the fall of an answer's log-probability where a group sees a window alone
(after 2602.11374 and HydraHead, 2606.20097, which set its output to 0).

Prompts are lists of names and numbers, one of which is asked for at the end, far behind it. A group is ablated from the
question on, in one row of a batch whose rows share what was computed of the list. Without their outputs the first
layers' heads come first, whose work is near and which a window does as well; with a window in their place, it does not
count.

Letters: B rows, T tokens, G key/value heads, H query heads, S past and new tokens.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from linearize.errors import InputError
from linearize.modeling.cache_argument import with_cache
from linearize.modeling.probe import probe, routed
from linearize.ops.softmax import masked_softmax
from linearize.phases import phase

ABLATE = "linearize_ablate"
PROMPTS, LENGTH = 8, 768  # tokens of each list
ROWS = 16  # groups ablated at a time
DIGITS = 5
WINDOW = 128  # tokens that an ablated group sees, beside the first: the reach of a terraced window of 64
Ablation = Literal["far", "all"]
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


@dataclass(frozen=True, kw_only=True)
class HeadScore:
    """`fall`: nats that the log-probability of an answer falls by with the group ablated, mean over prompts."""

    layer: int
    group: int
    fall: float


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """`answer`: log-probability of an answer with all heads, nats, mean over `prompts` lists of about `tokens`."""

    prompts: int
    tokens: int
    answer: float
    heads: tuple[HeadScore, ...]


@torch.no_grad()
def head_scores(
    teacher: PreTrainedModel,
    tokenizer: Any,
    *,
    prompts: int = PROMPTS,
    length: int = LENGTH,
    seed: int = 0,
    without: Ablation = "far",
) -> HeadScores:
    """Score each key/value group, with all its query heads, of each layer whose attention is not limited to a window.

    Costs a pass over each list and one over its question per group.

    Args:
        prompts: number of lists. length: tokens of each, cut down to the teacher's context.
        without: what an ablated group lacks: `far`, all but a window and the first token; `all`, its whole output.

    Raises:
        InputError: a teacher that cannot be converted, or a context too short for a list.
    """
    most = getattr(teacher.config.get_text_config(), "max_position_embeddings", None) or length
    places = [(site.layer, group) for site in probe(teacher) for group in range(site.far_groups)]
    rng = random.Random(seed)
    falls, total = torch.zeros(len(places), dtype=torch.float64), 0.0
    with phase("scoring heads", prompts * len(places), "groups") as advance:
        for _ in range(prompts):
            listed, question, answer = _prompt(tokenizer, rng, min(length, most))
            run = _Asked(teacher, listed, question, answer, without)
            whole = float(run([()])[0])
            total += whole
            for first in range(0, len(places), ROWS):
                some = places[first : first + ROWS]
                falls[first : first + len(some)] += whole - run([(place,) for place in some]).cpu()
                advance(len(some))
    scores = tuple(
        HeadScore(layer=layer, group=group, fall=float(fall) / prompts)
        for (layer, group), fall in zip(places, falls, strict=True)
    )
    return HeadScores(prompts=prompts, tokens=min(length, most), answer=total / prompts, heads=scores)


class _Asked:
    """The log-probability of an answer behind a list and a question, whose list is read once."""

    def __init__(
        self, teacher: Any, listed: list[int], question: list[int], answer: list[int], without: Ablation
    ) -> None:
        self.teacher, self.tail, self.answer, self.without = teacher, question + answer, answer, without
        self.ids = torch.tensor([listed], device=teacher.device)
        self.cache = DynamicCache(config=teacher.config)
        teacher(input_ids=self.ids, use_cache=True, logits_to_keep=1, **with_cache(teacher, self.cache))

    def __call__(self, ablated: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
        """One number, nats, for each row's ablated (layer, group) pairs, `[B]` fp64."""
        rows = len(ablated)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        by_layer: dict[int, list[tuple[int, int]]] = {}
        for row, places in enumerate(ablated):
            for layer, group in places:
                by_layer.setdefault(layer, []).append((row, group))
        tail = torch.tensor([self.tail], device=self.ids.device).expand(rows, -1)
        with routed(self.teacher, ABLATE):
            logits = self.teacher(
                input_ids=tail, use_cache=True, linearize_ablated=(by_layer, self.without),
                **with_cache(self.teacher, cache),
            ).logits  # fmt: skip
        scores = logits[:, -len(self.answer) - 1 : -1].double().log_softmax(-1)
        return scores.gather(-1, tail[:, -len(self.answer) :, None])[..., 0].sum(-1)


def _prompt(tokenizer: Any, rng: random.Random, length: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a list, of a question about a line of its first half, and of the answer."""
    lines, counted = [], 0
    names = _names(rng)
    question_tokens = 24
    while counted < length - question_tokens:
        name = next(names)
        lines.append((name, f"{rng.randrange(10**DIGITS):0{DIGITS}d}"))
        counted += len(_ids(tokenizer, f"The code of {name} is {lines[-1][1]}.\n"))
    lines = lines[:-1]
    if len(lines) < 4:
        raise InputError(f"scoring heads needs a context of at least 128 tokens, the teacher has {length}")
    name, code = lines[rng.randrange(len(lines) // 2)]
    text = "".join(f"The code of {name} is {code}.\n" for name, code in lines)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return start + _ids(tokenizer, text), _ids(tokenizer, f"\nThe code of {name} is"), _ids(tokenizer, f" {code}")


def _names(rng: random.Random) -> Iterator[str]:
    """Invented names, none twice."""
    used: set[str] = set()
    while True:
        name = "".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()
        if name not in used:
            used.add(name)
            yield name


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _ablate(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    linearize_ablated: tuple[Mapping[int, Sequence[tuple[int, int]]], Ablation] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Softmax attention, past tokens included, in which some (row, group) pairs see a window, or nothing."""
    assert linearize_ablated is not None
    by_layer, without = linearize_ablated
    slot, end = torch.arange(key.shape[2], device=key.device), key.shape[2]
    distance = slot[end - query.shape[2] :, None] - slot
    seen = distance >= 0
    if sliding_window is not None:
        seen = seen & (distance < sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    y_BHTV = masked_softmax(query, key, value, seen[None, None], scaling=scale, softcap=softcap)
    layer: Any = module.layer_idx
    ablated = by_layer.get(layer, ())
    if ablated and without == "far":
        near = seen & ((distance < WINDOW) | (slot == 0))
        left = masked_softmax(query, key, value, near[None, None], scaling=scale, softcap=softcap)
    for row, group in ablated:
        own = y_BHTV.unflatten(1, (key.shape[1], -1))
        own[row, group] = left.unflatten(1, (key.shape[1], -1))[row, group] if without == "far" else 0
    return y_BHTV.transpose(1, 2), None


AttentionInterface.register(ABLATE, _ablate)
