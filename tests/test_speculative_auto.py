"""How many tokens are guessed, where repetitions are found, and what cannot be speculated with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from speculation_cases import Widths, near, target

from linearize.decoding import LookupDrafter, share_equal_weights, speculate
from linearize.decoding.speculative.chooser import MOST, PROBE, Auto, Round, choose, expected_tokens, seconds_at
from linearize.decoding.speculative.ngrams import NgramIndex
from linearize.decoding.speculative.rows import Rows
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
    assert choose(target, drafting, [rate], 8) == rates.index(max(rates))
    assert abs(rates.index(max(rates)) - expected) <= 1
    sparse = {1: target[1], 5: target[5]}, {2: drafting[2], 4: drafting[4]}
    assert choose(*sparse, [rate], 8) == choose(target, drafting, [rate], 8)


def simulate(auto: Auto, rounds: int, *, draft: float, slope: float, rate: float, seed: int = 1) -> list[int]:
    """Rounds with costs and acceptance as said; the numbers it chose."""
    generator, chosen = torch.Generator().manual_seed(seed), []
    for _ in range(rounds):
        count = auto.next()
        draws = torch.rand(count, generator=generator) < rate
        kept = int(draws.long().cumprod(0).sum())
        auto.observe(Round(count, [kept], 1 + slope * count, draft * count))
        chosen.append(count)
    return chosen


def test_auto_finds_what_pays_and_leaves_what_does_not() -> None:
    auto = Auto()
    good = simulate(auto, 150, draft=0.02, slope=0.02, rate=0.9)
    assert sum(good[20:]) / len(good[20:]) > 5 and max(good) <= MOST and 0 in good[20:]
    bad = simulate(auto, 400, draft=0.6, slope=0.5, rate=0.3)
    assert sum(count > 0 for count in bad[100:]) < 20, "it goes on guessing at a loss"
    assert any(bad[100:]), "it never tries again"
    better = simulate(auto, 600, draft=0.02, slope=0.02, rate=0.9)
    assert sum(count > 0 for count in better[-100:]) > 80, "it does not come back"
    alone = simulate(Auto(), 3 * PROBE, draft=1.5, slope=1.0, rate=0.9)
    assert alone[5 : 2 * PROBE].count(0) >= PROBE


def test_where_the_last_tokens_stood_before() -> None:
    index = NgramIndex(3)
    said = [7, 1, 2, 3, 9, 4, 2, 3, 5, 1, 2, 3]
    assert index.following(said[:3], 2) == []
    assert index.following(said, 3) == [9, 4, 2], "three tokens are better than the two that stood later"
    assert index.following([*said, 9, 4, 2], 4) == [3, 5, 1, 2]
    assert NgramIndex(3).following([5, 8, 6, 8, 6], 5) == [8, 6, 8, 6, 8], "it goes round at the end"
    assert NgramIndex(2).following([4], 3) == [] == NgramIndex(3).following([4, 5, 6], 1)
    grown = NgramIndex(3)
    text_ = torch.randint(3, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    for length in range(1, 200):
        fresh, again = NgramIndex(3), text_[:length]
        assert grown.following(again, 4) == fresh.following(again, 4)


def test_rows_keep_what_they_may() -> None:
    rows = Rows([[5], [6, 6], [7]], 4, frozenset({2}))
    new, kept = rows.extend([2, 0, 2], [9, 8, 9], [[3, 4, 4], [3, 4, 4], [3, 2, 4]], alike=False)
    assert (new, kept) == ([[3, 4, 9], [8], [3, 2]], [2, 0, 2])
    assert rows.drop_ended() == [0, 1] and rows.texts == [[5, 3, 4, 9], [6, 6, 8]] and rows.room == 3
    new, kept = rows.extend([1, 2], [9, 9], [[4, 4], [5, 5]], alike=False)
    assert (new, kept) == ([[4], [5, 5, 9]], [1, 2]), "four tokens are all there is room for"
    assert rows.drop_ended() == [] and rows.new == [[3, 4, 9, 4], [8, 5, 5, 9], [3, 2]]


def test_rows_alike() -> None:
    rows = Rows([[5], [6], [7]], 9, frozenset({2}))
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
