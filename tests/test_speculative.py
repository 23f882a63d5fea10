"""`speculate`, greedy: token for token what plain decoding gives, with draft tokens both accepted and rejected."""

from __future__ import annotations

from typing import Any

import pytest
from models import VOCABULARY, left_padded, mixer, student_of, text, tiny
from speculation_cases import NAMES, both_ways, endless, near, plain, target
from transformers import GenerationConfig

import linearize.decoding.speculative.cached_model as cached_model
from linearize.decoding import LookupDrafter, speculate
from linearize.decoding.speculative import ModelDrafter, SpeculationStats

NEW = 12
LENGTHS = [17, 3, 23, 9]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: target(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_targets_own(models: dict, name: str) -> None:
    model, seen = models[name], SpeculationStats()
    draft = near(model)
    for tokens, count in [(1, 7), (13, 2)]:
        ids = text(1, tokens)
        result = speculate(model, draft, ids, max_new_tokens=NEW, draft_tokens=count)
        assert result.tokens == [plain(model, ids, NEW)], f"{tokens} tokens, draft length {count}"
        assert result.stats.target_passes == 1 + sum(result.stats.draft_tokens.values())
        seen.drafted, seen.accepted = seen.drafted + result.stats.drafted, seen.accepted + result.stats.accepted
    assert 0 < seen.accepted < seen.drafted


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_are_as_alone(models: dict, name: str) -> None:
    """Rows accept different numbers, end at different times, and stand behind padding."""
    model, (ids, mask) = models[name], left_padded(text(4, 23), LENGTHS)
    draft = near(model)
    expected = [plain(model, ids[i : i + 1, 23 - n :], NEW) for i, n in enumerate(LENGTHS)]
    stop = expected[1][6]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    assert len({len(row) for row in cut}) > 1
    result = speculate(model, draft, ids, mask, max_new_tokens=NEW, draft_tokens=4, stop_tokens=[stop])
    assert result.tokens == cut
    both_ways(result.stats)


@pytest.mark.parametrize("name", ["softmax", "mixed"])
def test_dead_columns_are_taken_out(models: dict, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = models[name], left_padded(text(4, 23), LENGTHS)
    draft, expected = near(model, 0.05), [plain(model, ids[i : i + 1, 23 - n :], 30) for i, n in enumerate(LENGTHS)]
    widths = {}
    for most in (1, 10**6):
        monkeypatch.setattr(cached_model, "MAX_DEAD_COLUMNS", most)
        drafter, keep, widest = ModelDrafter(draft), cached_model.CachedModel.keep, [0]

        def watched(self: Any, counts: Any, keep: Any = keep, widest: list[int] = widest) -> None:
            keep(self, counts)
            widest[0] = max(widest[0], self.cache.get_seq_length() - max(self.lengths))

        with monkeypatch.context() as patch:
            patch.setattr(cached_model.CachedModel, "keep", watched)
            assert speculate(model, drafter, ids, mask, max_new_tokens=30, draft_tokens=3).tokens == expected
        widths[most] = widest[0]
    assert widths[1] <= 1 and widths[10**6] > 3, "columns of no row stay in the cache"


@pytest.mark.parametrize(("one", "other"), [("softmax", "mixed"), ("mixed", "softmax"), ("gla", "mamba")])
def test_any_model_drafts_for_any(models: dict, one: str, other: str) -> None:
    ids = text(1, 11)
    for draft in (models[other], LookupDrafter()):
        result = speculate(models[one], draft, ids, max_new_tokens=NEW, draft_tokens=3)
        assert result.tokens == [plain(models[one], ids, NEW)]
        assert result.stats.accepted < result.stats.drafted


def test_a_student_drafts_for_its_teacher() -> None:
    """The student is the teacher until its window is left, so the first draft tokens are accepted."""
    teacher = endless(tiny("llama", attention="sdpa"))
    student, ids = student_of(teacher, mixer(window=17, feature_dim=3)), text(1, 11)
    result = speculate(teacher, student, ids, max_new_tokens=45, draft_tokens=4)
    assert result.tokens == [plain(teacher, ids, 45)]
    both_ways(result.stats)
    assert result.stats.target_passes < 43


@pytest.mark.parametrize("name", ["mixed", "softmax"])
def test_lookup_finds_what_repeats(models: dict, name: str) -> None:
    """Four tokens are allowed, so that some draft tokens are accepted and some are not; rows of a batch differ."""
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
