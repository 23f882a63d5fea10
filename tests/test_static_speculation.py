"""The loop with static steps, as on a GPU: the same text, batches and drafts as with growing caches."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from models import left_padded, text, tiny
from speculation_cases import NAMES, Widths, both_ways, endless, near, plain, target

import linearize.decoding.speculative.graphed_model as graphs
from linearize.decoding import LookupDrafter, speculate
from linearize.decoding.speculative.cached_model import CachedModel
from linearize.decoding.speculative.graphed_model import GraphedModel, cached_model_for, force_graphed
from linearize.errors import InputError
from linearize.modeling.static.step import StaticStep

NEW = 12
LENGTHS = [17, 3, 23, 9]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: target(name) for name in NAMES}


@pytest.fixture(autouse=True)
def static() -> Any:
    with force_graphed(True):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_are_as_alone(models: dict, name: str) -> None:
    """Rows accept different numbers, end at different times, and stand behind padding."""
    model, (ids, mask) = models[name], left_padded(text(4, 23), LENGTHS)
    expected = [plain(model, ids[i : i + 1, 23 - n :], NEW) for i, n in enumerate(LENGTHS)]
    stop = expected[1][6]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    assert len({len(row) for row in cut}) > 1
    result = speculate(model, near(model), ids, mask, max_new_tokens=NEW, draft_tokens=4, stop_tokens=[stop])
    assert result.tokens == cut
    assert result.stats.drafted > result.stats.accepted
    if name != "mamba":  # there this draft is right about nothing
        both_ways(result.stats)


def test_rounds_without_draft_tokens_are_caught_up_with(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft reads more than its tail holds, in parts; and drafts more than its tail held at first."""

    class Now:
        pays = True
        plan = [0, 3, *[0] * 25, 2, 0, 5, 1, 14, 4]  # noqa: RUF012

        def next(self) -> int:
            return self.plan.pop(0) if self.plan else 3

        def observe(self, seen: Any) -> None:
            """Nothing to learn."""

    model, (ids, mask) = models["mixed"], left_padded(text(2, 23), [23, 6])
    expected = [plain(model, ids[i : i + 1, 23 - n :], 60) for i, n in enumerate([23, 6])]
    monkeypatch.setattr("linearize.decoding.speculative.loop.draft_length_for", lambda *_: Now())
    draft = near(model)
    widths = Widths(draft.lm)
    result = speculate(model, draft, ids, mask, max_new_tokens=60)
    assert result.tokens == expected
    assert widths.seen.count(graphs.WIDTH) == 2 and max(widths.seen[1:]) == graphs.WIDTH
    both_ways(result.stats)


def test_capacity_grows_where_it_runs_out(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SPARE_CAPACITY", 3)
    model, ids = models["softmax"], text(1, 5)
    result = speculate(model, near(model), ids, max_new_tokens=40, draft_tokens=3)
    assert result.tokens == [plain(model, ids, 40)]


def test_what_was_made_for_a_model_is_used_again(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next call, unless the batch has another size, the weights lie elsewhere or another model still reads."""
    made: list[int] = []
    build = StaticStep.__init__

    def counted(self: StaticStep, model: Any, **options: Any) -> None:
        made.append(options["batch"])
        build(self, model, **options)

    monkeypatch.setattr(StaticStep, "__init__", counted)
    model = target("lolcats")
    for rows, sizes in [(2, [2]), (2, [2]), (1, [2, 1]), (1, [2, 1])]:
        ids = text(rows, 7, seed=len(made) + rows)
        result = speculate(model, LookupDrafter(), ids, max_new_tokens=6, draft_tokens=2)
        assert result.tokens == [plain(model, ids[i : i + 1], 6) for i in range(rows)]
        assert made == sizes
    model.lm.lm_head.weight.data = model.lm.lm_head.weight.data.clone()
    ids = text(1, 9)
    speculate(model, LookupDrafter(), ids, max_new_tokens=3, draft_tokens=2)
    assert made == [2, 1, 1]
    assert speculate(model, model, ids, max_new_tokens=9, draft_tokens=2).tokens == [plain(model, ids, 9)]
    assert made == [2, 1, 1, 1], "a model that drafts for itself has two caches"
    gc.collect()
    held = len(graphs._READY)
    del model, result
    gc.collect()
    assert len(graphs._READY) == held - 1, "what was made for a model outlives it"


def test_sampling_is_by_the_same_numbers(models: dict) -> None:
    """Same seed, same scores up to rounding, same text."""
    from transformers import GenerationConfig

    model, (ids, mask) = models["mamba2"], left_padded(text(2, 9), [9, 4])
    config = GenerationConfig(do_sample=True, temperature=0.7, top_k=20)
    results = []
    for expected in (True, False):
        with force_graphed(expected):
            result = speculate(
                model, near(model), ids, mask, max_new_tokens=20, draft_tokens=3, generation_config=config, seed=5
            )
        results.append(result.tokens)
    assert results[0] == results[1]


def test_which_models_are_read_so(models: dict) -> None:
    """None on a CPU by itself; those without a static form not at all, with a warning."""
    latent = endless(tiny("deepseek_v3"))
    with pytest.raises(InputError, match="keeps something else than its keys and values"):
        cached_model_for(latent, "target")
    assert type(cached_model_for(models["gla"], "draft")) is GraphedModel
    assert cached_model_for(models["local"], "draft").by_row and not CachedModel(models["local"], "draft").by_row
    with force_graphed(False):
        assert type(cached_model_for(models["gla"], "draft")) is CachedModel
    graphs._Forced.graphed = None
    assert type(cached_model_for(models["gla"], "draft")) is CachedModel
    with warnings.catch_warnings(record=True) as messages, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(type(latent), "device", torch.device("cuda"))
        patch.setattr(graphs, "static_layers", lambda *_: (_ for _ in ()).throw(InputError("it has latents")))
        assert type(cached_model_for(latent, "target")) is CachedModel
    assert [str(x.message) for x in messages] == ["no CUDA graphs for the target: it has latents"]


def test_a_round_that_is_too_wide_is_reported(models: dict) -> None:
    with pytest.raises(InputError, match="34 tokens wait for a decision, a static step holds 32: draft fewer tokens"):
        cached = cached_model_for(models["gla"], "target")
        cached.read_prompt(text(1, 4), None)
        cached.read(text(1, 34))
