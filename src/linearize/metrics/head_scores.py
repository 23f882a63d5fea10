"""Which heads of a teacher look things up: the fall of an answer's log-probability where a group sees a window alone
(after 2602.11374 and HydraHead, 2606.20097, which set its output to 0), and which are worth keeping together.

Prompts are lists of names and numbers, one of which is asked for at the end, far behind it. Groups are ablated from the
question on, each choice in one row of a batch whose rows share what was computed of the list. Without their outputs the
first layers' heads come first, whose work is near and which a window does as well; with a window in their place, it
does not count. Ablation of one group at a time says little of groups that replace each other, so the ranking of the
best fifth is by backward elimination: all other groups see a window, and the group that is missed least goes first.

Letters: B rows, T tokens, G key/value heads, H query heads, S past and new tokens.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from linearize.errors import InputError
from linearize.modeling.cache_argument import with_cache
from linearize.modeling.forward_call import positions_to_keep
from linearize.modeling.probe import probe, routed
from linearize.ops.softmax import masked_softmax
from linearize.phases import phase

ABLATE = "linearize_ablate"
PROMPTS, LENGTH = 8, 768  # tokens of each list
ROWS = 16  # choices of groups ablated at a time
SMALLEST_POOL = 8  # groups that are ranked together, at least
DIGITS = 5
WINDOW = 128  # tokens that an ablated group sees, beside the first: the reach of a terraced window of 64
Ablation = Literal["far", "all"]
Place = tuple[int, int]
"""A layer and a key/value group of it."""
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


@dataclass(frozen=True, kw_only=True)
class HeadScore:
    """`fall`: nats that the log-probability of an answer falls by with the group ablated, mean over prompts; `rank`:
    its place among all groups, 0 for the one to keep where only one is kept."""

    layer: int
    group: int
    fall: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """`answer`: log-probability of an answer with all heads, nats, mean over `prompts` lists of about `tokens`; `heads`
    by rank."""

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

    Costs a pass over each list and one over its question per group; the ranking takes about three times as long.

    Args:
        prompts: number of lists. length: tokens of each, cut down to the teacher's context.
        without: what an ablated group lacks: `far`, all but a window and the first token; `all`, its whole output.

    Raises:
        InputError: a teacher that cannot be converted, or a context too short for a list.
    """
    most = getattr(teacher.config.get_text_config(), "max_position_embeddings", None) or length
    places = [(site.layer, group) for site in probe(teacher) for group in range(site.far_groups)]
    rng = random.Random(seed)
    with phase("reading the lists that heads are scored on", prompts, "lists") as advance:
        runs = []
        for _ in range(prompts):
            runs.append(_Asked(teacher, *_prompt(tokenizer, rng, min(length, most)), without))
            advance(1)
    whole = float(_answers(runs, [()])[0])
    with phase("scoring heads", len(places), "groups") as advance:
        answers = _answers(runs, [(place,) for place in places], advance)
    falls = dict(zip(places, (whole - answers).tolist(), strict=True))
    by_fall = sorted(places, key=lambda place: -falls[place])
    pool = by_fall[: max(SMALLEST_POOL, -(-len(places) // 5))]
    ranked = [*_eliminated(runs, places, pool), *by_fall[len(pool) :]]
    scores = tuple(
        HeadScore(layer=layer, group=group, fall=falls[layer, group], rank=rank)
        for rank, (layer, group) in enumerate(ranked)
    )
    return HeadScores(prompts=prompts, tokens=min(length, most), answer=whole, heads=scores)


def _eliminated(runs: Sequence[_Asked], places: Sequence[Place], pool: Sequence[Place]) -> list[Place]:
    """The groups of the pool, best first: of those left, while all others are ablated, the ones that are missed least
    leave together, an eighth at a time."""
    left, gone, sizes = list(pool), list[Place](), _sizes(len(pool))
    with phase("ranking heads together", len(sizes), "rounds") as advance:
        for size in sizes:
            rows = [[place for place in places if place not in left or place == absent] for absent in left]
            answers = dict(zip(left, _answers(runs, rows).tolist(), strict=True))
            leaving = sorted(left, key=lambda place: -answers[place])[: len(left) - size]
            gone += leaving
            left = [place for place in left if place not in leaving]
            advance(1)
    return left + gone[::-1]


def _sizes(count: int) -> list[int]:
    """How many groups are left after each round of elimination, down to one."""
    sizes = []
    while count > 1:
        count -= max(1, count // 8)
        sizes.append(count)
    return sizes


def _answers(
    runs: Sequence[_Asked], ablated: Sequence[Sequence[Place]], advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Log-probability of an answer, nats, mean over prompts, for each choice of ablated groups: `[choices]` fp64."""
    total = torch.zeros(len(ablated), dtype=torch.float64)
    for first in range(0, len(ablated), ROWS):
        some = ablated[first : first + ROWS]
        for run in runs:
            total[first : first + len(some)] += run(some).cpu()
        advance(len(some))
    return total / len(runs)


class _Asked:
    """The log-probability of an answer behind a list and a question, whose list is read once."""

    def __init__(
        self, teacher: Any, listed: list[int], question: list[int], answer: list[int], without: Ablation
    ) -> None:
        self.teacher, self.tail, self.answer, self.without = teacher, question + answer, answer, without
        self.ids = torch.tensor([listed], device=teacher.device)
        self.cache = DynamicCache(config=teacher.config)
        last = positions_to_keep(1, self.ids)
        teacher(input_ids=self.ids, use_cache=True, logits_to_keep=last, **with_cache(teacher, self.cache))

    def __call__(self, ablated: Sequence[Sequence[Place]]) -> Tensor:
        """One number, nats, for each row's ablated (layer, group) pairs, `[B]` fp64."""
        rows = len(ablated)
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        by_layer: dict[int, list[Place]] = {}
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
    linearize_ablated: tuple[Mapping[int, Sequence[Place]], Ablation] | None = None,
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
    if ablated:
        index = tuple(torch.tensor(ablated, device=key.device).unbind(1))
        own = y_BHTV.unflatten(1, (key.shape[1], -1))
        own[index] = left.unflatten(1, (key.shape[1], -1))[index] if without == "far" else 0.0
    return y_BHTV.transpose(1, 2), None


AttentionInterface.register(ABLATE, _ablate)
