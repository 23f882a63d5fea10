"""How `speculate` begins, ends and paces a text: stop tokens, limits, streaming, rounds without draft tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import VOCABULARY, left_padded, text, tiny
from speculation_cases import Widths, both_ways, near, plain, target
from torch import Tensor
from transformers import GenerationConfig

from linearize.decoding import LookupDrafter, speculate
from linearize.decoding.speculative import ModelDrafter

NEW = 15


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: target(name) for name in ("softmax", "mixed", "lolcats", "mamba2", "gla", "retention")}


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_a_twin_saves_passes_and_ends_in_time(models: dict, count: int) -> None:
    """A draft that is always right: the text ends inside a round, full or at a stop token."""
    model, ids = models["softmax"], text(1, 13)
    expected, widths = plain(model, ids, NEW), Widths(model)
    for new in (1, count + 1, count + 2, NEW):
        before = len(widths.seen)
        result = speculate(model, near(model, 0), ids, max_new_tokens=new, draft_tokens=count)
        assert result.tokens == [expected[:new]]
        rounds = -(-(new - 1) // (count + 1))
        assert len(widths.seen) - before == result.stats.target_passes == 1 + rounds
        assert max(widths.seen[before + 1 :], default=0) <= count + 1, "a round reads the last token and the draft"
    for stop in sorted(set(expected))[::3]:
        result = speculate(model, near(model, 0), ids, max_new_tokens=NEW, draft_tokens=count, stop_tokens=[stop])
        assert result.tokens == [expected[: expected.index(stop) + 1]]


def test_the_models_own_stop_tokens_end_a_text(models: dict) -> None:
    model, ids = models["lolcats"], text(1, 13)
    expected = plain(model, ids, NEW)
    config = GenerationConfig(eos_token_id=[expected[6], expected[9]])
    result = speculate(model, near(model, 0), ids, max_new_tokens=NEW, draft_tokens=5, generation_config=config)
    assert result.tokens == [plain(model, ids, NEW, eos_token_id=config.eos_token_id)]
    assert len(result.tokens[0]) < NEW


def test_no_model_reads_a_prompt_twice(models: dict) -> None:
    model, ids = models["mamba2"], text(1, 50)
    draft = near(model, 0.02)
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
    expected = [plain(model, ids[i : i + 1, 23 - n :], 40) for i, n in enumerate([23, 6])]
    for draft in (near(model), LookupDrafter()):
        result = speculate(model, draft, ids, mask, max_new_tokens=40)
        assert result.tokens == expected
        assert 0 in result.stats.draft_tokens


def test_rounds_without_draft_tokens_are_caught_up_with(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft reads at once what the target went on by itself."""

    class Now:
        pays = True
        plan = [0, 3, 0, 0, 0, 0, 0, 2, 0, 5, 1, 0, 0, 4]  # noqa: RUF012

        def next(self) -> int:
            return self.plan.pop(0) if self.plan else 3

        def observe(self, seen: Any) -> None:
            assert seen.target_seconds > 0 and (seen.draft_seconds > 0) == (seen.drafted > 0)

    model, (ids, mask) = models["lolcats"], left_padded(text(2, 23), [23, 6])
    expected = [plain(model, ids[i : i + 1, 23 - n :], 40) for i, n in enumerate([23, 6])]
    monkeypatch.setattr("linearize.decoding.speculative.loop.draft_length_for", lambda *_: Now())
    draft = near(model)
    widths = Widths(draft)
    result = speculate(model, draft, ids, mask, max_new_tokens=40)
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
    assert [token for part in streamer.seen[1:] for token in part] == result.tokens[0]
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
