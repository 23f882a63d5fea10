"""The number of drafted tokens, the lookup of repetitions, and what cannot be speculated with."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from speculation_cases import Widths, near, target

from linearize.decoding import LookupDrafter, share_equal_weights, speculate
from linearize.decoding.speculative.draft_length import (
    ALLOWANCE,
    FIRST_DRAFT,
    MAX_DRAFT_TOKENS,
    PLAIN_STEPS,
    AcceptanceStats,
    AdaptiveDraftLength,
    FixedDraftLength,
    Round,
    acceptance_stats,
    best_length,
    expected_tokens,
    seconds_at,
)
from linearize.decoding.speculative.drafters import NgramIndex
from linearize.decoding.speculative.verify import GrowingTexts
from linearize.errors import InputError
from linearize.modeling.cache import MixerCacheLayer


def test_expected_tokens() -> None:
    for rate, count in [(0.0, 3), (0.8, 5), (0.3, 1), (0.9, 0)]:
        closed = (1 - rate ** (count + 1)) / (1 - rate)  # 2211.17192, equation 1
        assert expected_tokens([rate], count) == pytest.approx(closed)
    assert expected_tokens([0.9, 0.5, 0.2], 5) == pytest.approx(1 + 0.9 + 0.45 * (1 + 0.2 + 0.04 + 0.008))


def test_seconds_between_and_beyond_what_was_measured() -> None:
    seen = {1: 1.0, 5: 3.0, 8: 2.4}
    assert [seconds_at(seen, w) for w in (1, 3, 5, 6)] == pytest.approx([1.0, 2.0, 3.0, 2.8])
    assert seconds_at(seen, 11) == pytest.approx(3.0), "not below the highest before it"
    assert seconds_at({4: 2.0}, 9) == 2.0
    assert seconds_at({1: 1.0, 2: 1.5}, 4) == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("draft", "slope", "rate", "expected"),
    [(0.01, 0.0, 0.9, 8), (1.0, 0.0, 0.9, 0), (0.1, 0.0, 0.0, 0), (0.05, 0.1, 0.7, 4), (0.3, 0.3, 0.5, 0)],
)
def test_the_best_number_by_hand(draft: float, slope: float, rate: float, expected: int) -> None:
    target = {width: 1 + slope * (width - 1) for width in range(1, 10)}
    drafting = {count: draft * count for count in range(1, 9)}
    rates = [expected_tokens([rate], k) / (target[k + 1] + draft * k) for k in range(9)]
    assert best_length(target, drafting, [rate], 8) == rates.index(max(rates))
    assert abs(rates.index(max(rates)) - expected) <= 1
    sparse = {1: target[1], 5: target[5]}, {2: drafting[2], 4: drafting[4]}
    assert best_length(*sparse, [rate], 8) == best_length(target, drafting, [rate], 8)


COSTS = {  # seconds of a pass over 1 to 9 tokens, in steps
    "large": [1, 1.2, 1.3, 1.4, 1.45, 1.55, 1.65, 1.75, 1.85],
    "small": [1, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45, 1.5, 1.55],
    "steep": [1, 1.35, 1.7, 2.05, 2.4, 2.75, 3.1, 3.45, 3.8],
}


def simulate(
    draft_length: Any, tokens: int, *, costs: str, draft: float, rate: float, seed: int = 1
) -> tuple[float, list[int]]:
    """A simulated clock: a draft token is accepted with probability `rate` and costs `draft`; times jitter, sometimes a
    lot, and a plain step after a draft costs more. Seconds per token, and the numbers that were chosen."""
    draws, chosen, done, clock = random.Random(seed), [], 0, 0.0

    def jitter() -> float:
        return 1 + 0.05 * abs(draws.gauss(0, 1)) + (0.5 if draws.random() < 0.03 else 0)

    while done < tokens:
        count = min(draft_length.next(), tokens - done - 1)
        kept = 0
        while kept < count and draws.random() < rate:
            kept += 1
        target = COSTS[costs][count] * jitter() + (0.15 if count == 0 and chosen and chosen[-1] else 0)
        drafting = draft * count * jitter()
        draft_length.observe(Round(count, [kept], target, drafting))
        clock, done = clock + target + drafting, done + kept + 1
        chosen.append(count)
    return clock / done, chosen


def average(draft_length: Any, seeds: int = 12, **setting: Any) -> float:
    """Seconds per token over some texts of 200 tokens; `draft_length()` makes what chooses."""
    return sum(simulate(draft_length(), 200, seed=seed, **setting)[0] for seed in range(seeds)) / seeds


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize(
    ("draft", "rate"),
    [(0.3, 0.05), (0.3, 0.3), (0.3, 0.7), (0.15, 0.5), (0.1, 0.85), (0.0, 0.1), (0.0, 0.35), (0.0, 0.6), (0.05, 0.95)],
)
def test_auto_is_near_the_best_number_and_never_far_below_none(costs: str, draft: float, rate: float) -> None:
    setting: dict[str, Any] = {"costs": costs, "draft": draft, "rate": rate}
    plain = average(lambda: FixedDraftLength(0), **setting)
    best = min(average(lambda k=k: FixedDraftLength(k), **setting) for k in range(1, MAX_DRAFT_TOKENS + 1))
    known = AcceptanceStats()
    simulate(AdaptiveDraftLength(known), 200, seed=99, **setting)
    for draft_length in (AdaptiveDraftLength, lambda: AdaptiveDraftLength(copy.deepcopy(known))):
        seconds = average(draft_length, **setting)
        assert plain / seconds > 0.965, "it loses against plain decoding"
        assert best / seconds > 0.93, "it misses what a fixed number gives"


def test_auto_leaves_what_loses_tries_again_and_comes_back() -> None:
    known = AcceptanceStats()
    setting: dict[str, Any] = {"costs": "large", "draft": 0.05}
    _, good = simulate(AdaptiveDraftLength(known), 400, rate=0.9, **setting)
    assert good[:PLAIN_STEPS] == [0] * PLAIN_STEPS and good[PLAIN_STEPS] == FIRST_DRAFT
    assert sum(good[20:]) / len(good[20:]) > 4 and max(good) <= MAX_DRAFT_TOKENS
    _, bad = simulate(AdaptiveDraftLength(known), 1200, rate=0.05, **setting)
    assert sum(count > 0 for count in bad[400:]) < 30, "it goes on drafting at a loss"
    assert any(bad[400:]), "it never tries again"
    _, better = simulate(AdaptiveDraftLength(known), 1200, rate=0.9, **setting)
    assert sum(count > 0 for count in better[-60:]) > 50, "it does not come back"


def test_what_speculation_may_lose_is_bounded() -> None:
    for costs, draft in (("steep", 0.5), ("large", 0.3), ("small", 2.0)):
        seconds, chosen = simulate(AdaptiveDraftLength(), 2000, costs=costs, draft=draft, rate=0.02)
        plain, _ = simulate(FixedDraftLength(0), 2000, costs=costs, draft=draft, rate=0.02)
        assert seconds / plain < 1.025
        assert sum(count > 0 for count in chosen) >= 2


def test_what_is_known_of_one_pair_stays_with_it() -> None:
    model, draft, other = target("softmax"), near(target("softmax")), near(target("softmax"), 0)
    ids = text(1, 9)
    speculate(model, draft, ids, max_new_tokens=12)
    known = acceptance_stats(model, draft)
    seen = known.rounds
    assert seen > 0 and len(known.target[1]) >= PLAIN_STEPS
    speculate(model, draft, ids, max_new_tokens=12)
    assert acceptance_stats(model, draft) is known and known.rounds >= seen
    assert acceptance_stats(model, other).rounds == 0 == acceptance_stats(draft, model).rounds
    speculate(model, LookupDrafter(), ids, max_new_tokens=12)
    assert len(acceptance_stats(model, LookupDrafter().source).target[1]) >= PLAIN_STEPS
    mine, before = AcceptanceStats(), known.rounds
    speculate(model, draft, ids, max_new_tokens=12, stats=mine)
    assert mine.rounds > 0 and known.rounds == before
    speculate(model, draft, ids.expand(2, -1), max_new_tokens=12, stats=mine)
    assert mine.rows == 2


def test_acceptance_stats_by_hand() -> None:
    known = AcceptanceStats()
    known.count(3, [0, 2])
    known.count(3, [3, 1])
    assert known.tried == pytest.approx([0.95 * 2 + 2, 0.95 + 2, 0.95 + 1])
    assert known.kept == pytest.approx([0.95 + 2, 0.95 + 1, 1])
    first = (2.95 + 0.5) / 4.9
    assert known.acceptance()[:2] == pytest.approx([first, (1.95 + first) / 3.95])
    assert known.acceptance(optimistic=True)[0] == pytest.approx(3.95 / 4.9)
    known.allowance = -1.0
    known.begin(1)
    assert known.allowance == 1 and known.tried[0] == pytest.approx(3.9 / 2)
    known.time(known.target, 1, 2.0)
    known.begin(1)
    assert known.seconds() == ({1: 2.0}, {})
    known.begin(3)
    assert known.seconds() == ({}, {}) and known.allowance <= ALLOWANCE


def test_where_the_last_tokens_stood_before() -> None:
    index = NgramIndex(3)
    tokens = [7, 1, 2, 3, 9, 4, 2, 3, 5, 1, 2, 3]
    assert index.following(tokens[:3], 2) == []
    assert index.following(tokens, 3) == [9, 4, 2], "three tokens are better than the two that stood later"
    assert index.following([*tokens, 9, 4, 2], 4) == [3, 5, 1, 2]
    assert NgramIndex(3).following([5, 8, 6, 8, 6], 5) == [8, 6, 8, 6, 8], "it goes round at the end"
    assert NgramIndex(2).following([4], 3) == [] == NgramIndex(3).following([4, 5, 6], 1)
    grown = NgramIndex(3)
    text_ = torch.randint(3, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    for length in range(1, 200):
        fresh, again = NgramIndex(3), text_[:length]
        assert grown.following(again, 4) == fresh.following(again, 4)


def test_rows_keep_what_they_may() -> None:
    rows = GrowingTexts([[5], [6, 6], [7]], 4, frozenset({2}))
    new, kept = rows.extend([2, 0, 2], [9, 8, 9], [[3, 4, 4], [3, 4, 4], [3, 2, 4]], alike=False)
    assert (new, kept) == ([[3, 4, 9], [8], [3, 2]], [2, 0, 2])
    assert rows.drop_ended() == [0, 1] and rows.texts == [[5, 3, 4, 9], [6, 6, 8]] and rows.tokens_left == 3
    new, kept = rows.extend([1, 2], [9, 9], [[4, 4], [5, 5]], alike=False)
    assert (new, kept) == ([[4], [5, 5, 9]], [1, 2]), "only four tokens fit"
    assert rows.drop_ended() == [] and rows.new == [[3, 4, 9, 4], [8, 5, 5, 9], [3, 2]]


def test_rows_alike() -> None:
    rows = GrowingTexts([[5], [6], [7]], 9, frozenset({2}))
    new, kept = rows.extend([2, 1, 1], [9, 8, 2], [[3, 4], [3, 4], [2, 4]], alike=True)
    assert (new, kept) == ([[3, 4], [3, 8], [2]], [1, 1, 1])
    assert rows.drop_ended() == [0, 1]


def refused(
    match: str, model: Any = None, draft: Any = None, ids: Any = None, mask: Any = None, **settings: Any
) -> None:
    model = target("lolcats") if model is None else model
    widths = Widths(model)
    with pytest.raises(InputError, match=match) as error:
        speculate(
            model, draft or LookupDrafter(), text(1, 9) if ids is None else ids, mask,
            **{"max_new_tokens": 5, **settings},
        )  # fmt: skip
    assert not widths.seen, "something was read"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [0, -3, True, 2.5, "many"])
def test_bad_numbers(count: Any) -> None:
    refused("draft_tokens is", draft_tokens=count)


def test_bad_models_and_settings() -> None:
    refused("vocabulary of 50 tokens and the target one of 61", draft=tiny("llama", vocab_size=50))
    refused("max_new_tokens is 0", max_new_tokens=0)
    model = target("lolcats")
    model.generation_config.num_beams = 4
    refused("num_beams is 4", model=model)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, -1] = 0
    refused("pad prompts on the left", ids=text(2, 9), mask=mask)
    refused(r"shape \[2, 8\]", ids=text(2, 9), mask=mask[:, 1:])
    refused(r"input_ids has shape \[9\]", ids=text(1, 9)[0])
    refused("one text and 2 were given", ids=text(2, 9), streamer=object())


def test_caches_that_cannot_roll_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stateful = tiny("llama")
    stateful._is_stateful = True
    refused("the target .LlamaForCausalLM. keeps a recurrent state", model=stateful)
    refused("the draft .LlamaForCausalLM. keeps a recurrent state", draft=stateful)
    monkeypatch.setattr(MixerCacheLayer, "is_croppable", False)
    refused("layer 0 of the target's cache .MixerCacheLayer. cannot roll back")
    student = student_of(tiny("llama"), [None, mixer(), None])
    refused("layer 1 of the draft's cache .MixerCacheLayer. cannot roll back", model=tiny("llama"), draft=student)


def test_equal_weights_become_one() -> None:
    teacher = tiny("llama", tie_word_embeddings=True)
    student = student_of(copy.deepcopy(teacher), [mixer(), None, mixer("mamba2")])
    own = student.lm.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        own.view(-1)[3] += 1
    ids = text(1, 9)
    before = student(ids).logits
    equal = {name: p for name, p in student.named_parameters() if ".mixer." not in name and p is not own}
    freed = share_equal_weights(student, teacher)
    assert freed == sum(p.numel() * p.element_size() for p in equal.values())
    theirs = {p.data_ptr() for p in teacher.parameters()}
    assert all(p.data_ptr() in theirs for p in equal.values()) and own.data_ptr() not in theirs
    assert torch.equal(student(ids).logits, before)
    assert share_equal_weights(student, teacher) == 0
    assert share_equal_weights(near(student), teacher) == 0
    with torch.no_grad():
        one, two = torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(3, 1, bias=False)
        one.weight.zero_(), two.weight.zero_().neg_()
    assert share_equal_weights(one, two) == 0, "zeros of different sign are different bits"
