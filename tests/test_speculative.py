"""`speculate`, greedy: token for token what plain decoding gives, with guesses both accepted and rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import VOCABULARY, left_padded, mixer, student_of, text, tiny
from speculation_cases import NAMES, Widths, endless, near, plain, target
from torch import Tensor
from transformers import GenerationConfig

import linearize.decoding.speculative.reader as reader_module
from linearize.decoding import LookupDrafter, speculate
from linearize.decoding.speculative import ModelDrafter, SpeculationStats

NEW = 23
LENGTHS = [17, 3, 23, 9]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: target(name) for name in NAMES}


def both_ways(stats: SpeculationStats) -> None:
    """Guesses were accepted and rejected, and the counts agree with each other."""
    assert 0 < stats.accepted < stats.drafted
    assert sum(kept * times for kept, times in stats.lengths.items()) == stats.accepted
    assert stats.tokens_per_second > 0 and str(stats.accepted) in stats.line()
    assert stats.summary()["drafted"] == stats.drafted


@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_targets_own(models: dict, name: str) -> None:
    model, seen = models[name], SpeculationStats()
    draft = near(model)
    for tokens, count in [(1, 7), (3, 2), (23, 4), (9, 1)]:
        ids = text(1, tokens)
        result = speculate(model, draft, ids, max_new_tokens=NEW, draft_tokens=count)
        assert result.tokens == [plain(model, ids, NEW)], f"{tokens} tokens, {count} guesses"
        assert result.stats.target_passes == 1 + sum(result.stats.draft_tokens.values())
        seen.drafted, seen.accepted = seen.drafted + result.stats.drafted, seen.accepted + result.stats.accepted
    assert 0 < seen.accepted < seen.drafted


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_are_as_alone(models: dict, name: str) -> None:
    """Rows accept different numbers, end at different times, and stand behind padding."""
    model, (ids, mask) = models[name], left_padded(text(4, 23), LENGTHS)
    draft = near(model)
    expected = [plain(model, ids[i : i + 1, 23 - n :], NEW) for i, n in enumerate(LENGTHS)]
    stop = expected[1][7]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    assert len({len(row) for row in cut}) > 1
    for count in (1, 5):
        result = speculate(model, draft, ids, mask, max_new_tokens=NEW, draft_tokens=count, stop_tokens=[stop])
        assert result.tokens == cut
        both_ways(result.stats)


@pytest.mark.parametrize("name", ["softmax", "mixed"])
def test_dead_columns_are_taken_out(models: dict, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = models[name], left_padded(text(4, 23), LENGTHS)
    draft, expected = near(model, 0.03), [plain(model, ids[i : i + 1, 23 - n :], 40) for i, n in enumerate(LENGTHS)]
    widths = {}
    for most in (0, 2, 10**6):
        monkeypatch.setattr(reader_module, "MOST_DEAD", most)
        drafter, keep, widest = ModelDrafter(draft), reader_module.Reader.keep, [0]

        def watched(self: Any, counts: Any, keep: Any = keep, widest: list[int] = widest) -> None:
            keep(self, counts)
            widest[0] = max(widest[0], self.cache.get_seq_length() - max(self.lengths))

        with monkeypatch.context() as patch:
            patch.setattr(reader_module.Reader, "keep", watched)
            assert speculate(model, drafter, ids, mask, max_new_tokens=40, draft_tokens=4).tokens == expected
        widths[most] = widest[0]
    assert widths[0] == 0 and widths[2] <= 2 < widths[10**6], "columns of no row stay in the cache"


@pytest.mark.parametrize(("one", "other"), [("softmax", "mixed"), ("mixed", "softmax"), ("gla", "mamba")])
def test_any_model_drafts_for_any(models: dict, one: str, other: str) -> None:
    ids = text(1, 11)
    for draft in (models[other], LookupDrafter()):
        result = speculate(models[one], draft, ids, max_new_tokens=NEW, draft_tokens=3)
        assert result.tokens == [plain(models[one], ids, NEW)]
        assert result.stats.accepted < result.stats.drafted


def test_a_student_drafts_for_its_teacher() -> None:
    """The student is the teacher until its window is left, so guesses come true first and not for ever."""
    teacher = endless(tiny("llama", attention="sdpa"))
    student, ids = student_of(teacher, mixer(window=17, feature_dim=3)), text(1, 11)
    result = speculate(teacher, student, ids, max_new_tokens=60, draft_tokens=4)
    assert result.tokens == [plain(teacher, ids, 60)]
    both_ways(result.stats)
    assert result.stats.target_passes < 58


@pytest.mark.parametrize("name", ["mixed", "softmax"])
def test_lookup_finds_what_repeats(models: dict, name: str) -> None:
    """Four tokens are allowed, so that some guesses come true and some do not; rows of a batch differ."""
    model, (ids, mask) = models[name], left_padded(text(3, 26) % 4 + 3, [26, 5, 13])
    config = GenerationConfig(suppress_tokens=[*range(3), *range(7, VOCABULARY)])
    expected = [plain(model, ids[i : i + 1, 26 - n :], 40, suppress_tokens=config.suppress_tokens)
                for i, n in enumerate([26, 5, 13])]  # fmt: skip
    result = speculate(
        model, LookupDrafter(), ids, mask, max_new_tokens=40, draft_tokens=5, generation_config=config
    )  # fmt: skip
    assert result.tokens == expected
    both_ways(result.stats)
    assert result.stats.draft_passes == 0


@pytest.mark.parametrize("count", range(1, 8))
def test_a_twin_saves_passes_and_ends_in_time(models: dict, count: int) -> None:
    """A draft that is always right: the text ends inside a round, full or at a stop token."""
    model, ids = models["mixed"], text(1, 13)
    expected, widths = plain(model, ids, NEW), Widths(model)
    for new in (1, 2, count, count + 1, count + 2, NEW):
        before = len(widths.seen)
        result = speculate(model, near(model, 0), ids, max_new_tokens=new, draft_tokens=count)
        assert result.tokens == [expected[:new]]
        rounds = -(-(new - 1) // (count + 1))
        assert len(widths.seen) - before == result.stats.target_passes == 1 + rounds
        assert max(widths.seen[before + 1 :], default=0) <= count + 1, "a round reads the last token and the guesses"
    for stop in set(expected):
        result = speculate(model, near(model, 0), ids, max_new_tokens=NEW, draft_tokens=count, stop_tokens=[stop])
        assert result.tokens == [expected[: expected.index(stop) + 1]]


def test_the_models_own_stop_tokens_end_a_text(models: dict) -> None:
    model, ids = models["lolcats"], text(1, 13)
    expected = plain(model, ids, NEW)
    config = GenerationConfig(eos_token_id=[expected[9], expected[12]])
    result = speculate(model, near(model, 0), ids, max_new_tokens=NEW, draft_tokens=5, generation_config=config)
    assert result.tokens == [plain(model, ids, NEW, eos_token_id=config.eos_token_id)]
    assert len(result.tokens[0]) < NEW


def test_no_model_reads_a_prompt_twice(models: dict) -> None:
    model, ids = models["mamba2"], text(1, 50)
    draft = near(model)
    widths, its_widths = Widths(model), Widths(draft)
    result = speculate(model, draft, ids, max_new_tokens=NEW, draft_tokens=3)
    assert widths.seen[0] == its_widths.seen[0] == 50
    assert max(widths.seen[1:]) == 4 and max(its_widths.seen[1:]) == 2
    assert result.stats.draft_passes == len(its_widths.seen) == result.stats.drafted + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 8, "eos_token_id": list(range(3, 40))},
        {"bad_words_ids": [[5], [7, 9]], "begin_suppress_tokens": list(range(30))},
        {"forced_eos_token_id": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_look_at_the_text(models: dict, settings: dict) -> None:
    model, (ids, mask) = models["gla"], left_padded(text(3, 13), [13, 4, 8])
    prompts = [ids[i : i + 1, 13 - n :] for i, n in enumerate([13, 4, 8])]
    expected = [plain(model, prompt, NEW, **settings) for prompt in prompts]
    assert expected != [plain(model, prompt, NEW) for prompt in prompts], "the setting changes nothing here"
    config = GenerationConfig(**settings)
    result = speculate(
        model, near(model), ids, mask, max_new_tokens=NEW, draft_tokens=3, generation_config=config
    )  # fmt: skip
    assert result.tokens == expected
    assert result.stats.accepted < result.stats.drafted


def test_auto_gives_the_same_text(models: dict) -> None:
    model, (ids, mask) = models["mixed"], left_padded(text(2, 23), [23, 6])
    expected = [plain(model, ids[i : i + 1, 23 - n :], 60) for i, n in enumerate([23, 6])]
    for draft in (near(model), near(model, 0), LookupDrafter()):
        result = speculate(model, draft, ids, mask, max_new_tokens=60)
        assert result.tokens == expected
        assert 0 in result.stats.draft_tokens


def test_rounds_without_guesses_are_caught_up_with(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft reads at once what the target went on by itself."""

    class Now:
        plan = [0, 3, 0, 0, 0, 0, 0, 2, 0, 5, 1, 0, 0, 4]  # noqa: RUF012

        def next(self) -> int:
            return self.plan.pop(0) if self.plan else 3

        def observe(self, seen: Any) -> None:
            assert seen.target_seconds > 0 and (seen.draft_seconds > 0) == (seen.drafted > 0)

    model, (ids, mask) = models["lolcats"], left_padded(text(2, 23), [23, 6])
    expected = [plain(model, ids[i : i + 1, 23 - n :], 60) for i, n in enumerate([23, 6])]
    monkeypatch.setattr("linearize.decoding.speculative.loop.chooser", lambda _: Now())
    draft = near(model)
    widths = Widths(draft)
    result = speculate(model, draft, ids, mask, max_new_tokens=60)
    assert result.tokens == expected
    assert max(widths.seen[1:]) > 4
    both_ways(result.stats)


def test_a_streamer_sees_the_text(models: dict) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.seen += value.tolist()

        def end(self) -> None:
            self.ended = True

    model, ids, streamer = models["retention"], text(1, 9), Streamer()
    result = speculate(model, near(model), ids, max_new_tokens=NEW, draft_tokens=3, streamer=streamer)
    assert streamer.ended and streamer.seen[0] == ids[0].tolist()
    assert sum(streamer.seen[1:], []) == result.tokens[0]
    assert len(streamer.seen) == 1 + result.stats.target_passes


def test_a_draft_with_a_padded_vocabulary() -> None:
    """Guessing by `ModelDrafter` is for models whose tokenizers are equal, though their logits are not as wide."""
    model = target("softmax")
    ids = text(1, 9)
    for size in (VOCABULARY + 9, VOCABULARY - 2):
        draft = tiny("llama", attention="sdpa", vocab_size=size)
        result = speculate(model, ModelDrafter(draft), ids % 50, max_new_tokens=9, draft_tokens=3)
        assert result.tokens == [plain(model, ids % 50, 9)]
    assert torch.equal(torch.tensor(result.tokens).clamp(max=VOCABULARY - 3), torch.tensor(result.tokens))
