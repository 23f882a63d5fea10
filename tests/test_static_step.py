"""Static steps give the text of plain greedy decoding, for every mixer, in memory that never moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from speculation_cases import endless
from static_cases import VARIANTS, greedy, hybrid, memory, prompts, verified
from torch import Tensor

from linearize.errors import InputError
from linearize.modeling.static.step import StaticStep

NEW = 14


@pytest.fixture(scope="module")
def students() -> dict[str, Any]:
    return {name: hybrid(name) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_that_keep_different_numbers_are_plain_decoding(students: dict, name: str) -> None:
    model, (ids, mask) = students[name], prompts()
    step = StaticStep(model, batch=3, width=4, capacity=40)
    seen = verified(step, ids, mask, greedy(model, ids, mask, NEW))
    assert any(len(set(kept)) > 1 for _, *kept in seen), "rows kept the same number throughout"
    assert any(max(kept) == width > 1 for width, *kept in seen) and any(min(kept) < width for width, *kept in seen)


STEPPED = ["lolcats", "lolcats-sliding-sinks", "lolcats-store", "sliding_window-terraced-sinks", "mamba2"]


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("tokens", [1, 9])
def test_prompts_without_padding_fill_less_than_the_window(students: dict, name: str, tokens: int) -> None:
    model, ids = students[name], text(3, tokens, seed=6)
    step, mask = StaticStep(model, batch=3, width=4, capacity=40), torch.ones_like(ids)
    verified(step, ids, mask, greedy(model, ids, mask, NEW))


@pytest.mark.parametrize("name", VARIANTS)
def test_one_token_at_a_time_without_rollback(students: dict, name: str) -> None:
    model, (ids, mask) = students[name], prompts()
    step = StaticStep(model, batch=3, capacity=40, rollback=False)
    logits, results = step.prefill(ids, mask), []
    before = [x.data_ptr() for x in memory(step)]
    for _ in range(NEW):
        results.append(logits.argmax(-1))
        logits = step.step(results[-1])
    assert torch.equal(torch.cat(results, dim=1), greedy(model, ids, mask, NEW))
    assert before == [x.data_ptr() for x in memory(step)]


def test_memory_stays_where_it_is(students: dict) -> None:
    """Also for the next prompts, which leave nothing of those before them."""
    (ids, mask), longer = prompts(), text(3, 17, seed=2)
    for name in ("gla", "gated_delta_net", "lolcats-sliding-sinks"):
        model = students[name]
        step, addresses = StaticStep(model, batch=3, width=3, capacity=40), set()
        for prompt, its_mask in ((longer, torch.ones_like(longer)), (ids, mask)):
            verified(step, prompt, its_mask, greedy(model, prompt, its_mask, 9), seed=len(addresses))
            addresses.add(tuple(x.data_ptr() for x in memory(step)))
        assert len(addresses) == 1


def test_decided_at_once_or_later_is_the_same(students: dict) -> None:
    """Tokens read one by one while none is decided on, as a draft does; then each row keeps some of them."""
    model, (ids, mask) = students["mamba2"], prompts()
    tokens, counts = text(3, 5, seed=4), [[3, 0, 5], [1, 4, 2]]
    together, apart = (StaticStep(model, batch=3, width=6, capacity=60) for _ in range(2))
    for step in (together, apart):
        step.prefill(ids, mask)
    kept: Any = [0, 0, 0]
    for count in counts:
        at_once = together.step(tokens, kept)
        one_by_one = [apart.step(tokens[:, t : t + 1], kept if t == 0 else None) for t in range(5)]
        torch.testing.assert_close(torch.cat(one_by_one, dim=1), at_once, rtol=1e-4, atol=1e-4)
        kept = torch.tensor(count)
    assert not torch.allclose(together.step(tokens, kept), at_once, atol=1e-2), "what rows keep makes no difference"


class Tape:
    """Records steps as a graph would: by running them, and again from the same memory at each replay."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], Tensor], restore: Callable[[], None]) -> tuple[Callable[[], Any], Tensor]:
        self.recorded += 1
        for _ in range(3):
            run()
            restore()
        output = torch.empty_like(run())  # a graph's capture computes nothing; here memory is put back afterwards

        def replay() -> None:
            self.replayed += 1
            output.copy_(run())

        return replay, output


@pytest.mark.parametrize("name", ["lolcats", "gated_delta_net", "gla"])
def test_recorded_steps_are_replayed(students: dict, name: str) -> None:
    """Warm-ups leave no trace, and a replay reads the tokens and counts that it is given."""
    model, (ids, mask) = students[name], prompts()
    expected, tape = greedy(model, ids, mask, NEW), Tape()
    step = StaticStep(model, batch=3, width=4, capacity=40, record=tape)
    widths = {width for seed in (0, 1) for width, *_ in verified(step, ids, mask, expected, seed)}
    assert tape.recorded == len(widths) > 2 and tape.replayed > 2 * len(widths) + 1


def test_a_step_that_cannot_be_recorded_runs_as_it_is(students: dict) -> None:
    def fails(run: Callable[[], Tensor], restore: Callable[[], None]) -> Any:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, (ids, mask) = students["retention"], prompts()
    step = StaticStep(model, batch=3, width=3, capacity=40, record=fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verified(step, ids, mask, greedy(model, ids, mask, 9))
    assert [str(x.message) for x in caught if "graph" in str(x.message)] == [
        "no graph could be recorded, decoding goes on without: operation not permitted when stream is capturing"
    ]


def test_capacity_and_width_grow(students: dict) -> None:
    model, (ids, mask) = students["mamba"], prompts()
    expected = greedy(model, ids, mask, NEW)
    small, large = StaticStep(model, batch=3, width=2, capacity=15), StaticStep(model, batch=3, width=5, capacity=40)
    for step in (small, large):
        step.prefill(ids, mask)
        step.step(expected[:, :2], [0, 0, 0])
    with pytest.raises(InputError, match="17 tokens do not fit into a static cache of 15: give more capacity"):
        for _ in range(3):
            small.step(expected[:, 2:4], [2, 1, 2])
            large.step(expected[:, 2:4], [2, 1, 2])
    small.grow(width=5, capacity=40)
    got, due = (step.step(expected[:, 4:9], [2, 0, 1]) for step in (small, large))
    torch.testing.assert_close(got, due, rtol=1e-4, atol=1e-4)


def test_counts_on_the_device_are_read_only_where_capacity_runs_out(students: dict) -> None:
    model, (ids, mask) = students["mamba"], prompts()
    step = StaticStep(model, batch=3, width=4, capacity=20)
    step.prefill(ids, mask)
    kept = torch.tensor([0, 0, 0])
    for _ in range(5):
        step.step(text(3, 4), kept)
        kept = torch.tensor([1, 2, 1])
    assert step.lengths == [15, 10, 11]
    with pytest.raises(InputError, match="21 tokens do not fit"):
        for _ in range(3):
            step.step(text(3, 4), kept)


def test_windows_of_kept_layers_need_no_capacity() -> None:
    """The whole model is a window, and the text is longer than all memory that it has."""
    model = endless(tiny("mistral", attention="sdpa"))
    ids, mask = text(2, 90, seed=8), torch.ones(2, 90, dtype=torch.long)
    step = StaticStep(model, batch=2, width=3)
    assert step.cache.layers[0].columns < 90
    verified(step, ids, mask, greedy(model, ids, mask, 40))


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt", "phi3", "glm4", "deepseek_v3"])
def test_families(family: str) -> None:
    """Softcaps, learned positions, partial rotations, windows in some layers; latents in the cache are refused."""
    teacher = endless(tiny(family, attention="eager"))
    ids, mask = prompts()
    for model in (teacher, endless(student_of(teacher, [None, mixer("lolcats"), None]))):
        if family == "deepseek_v3":
            with pytest.raises(InputError, match="layer 0 keeps something else than its keys and values"):
                StaticStep(model, batch=3, width=3, capacity=40)
            continue
        step = StaticStep(model, batch=3, width=3, capacity=40)
        before = {config._attn_implementation for config in (model.config, teacher.config)}
        verified(step, ids, mask, greedy(model, ids, mask, 8))
        assert before == {config._attn_implementation for config in (model.config, teacher.config)}


def test_what_cannot_run_is_an_error(students: dict) -> None:
    model, (ids, mask) = students["lolcats"], prompts()
    step = StaticStep(model, batch=3, width=3, capacity=20)
    token = ids[:, -1:]
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("give at least 1 row, 1 to 32 tokens", lambda: StaticStep(model, batch=3, width=33, capacity=20)),
        ("layer 1 holds the whole text", lambda: StaticStep(model, batch=3)),
        ("read 3 prompts with prefill first", lambda: step.step(token)),
        ("2 prompts were given to a static step of 3 rows", lambda: step.prefill(ids[:2])),
        ("21 tokens do not fit into a static cache of 20", lambda: step.prefill(text(3, 21))),
        ("together 1 to 3, the width", lambda: (step.prefill(ids, mask), step.step(text(3, 4), [0, 0, 0]))),
        ("give 3 counts, each from 0 to the 1", lambda: (step.step(token, [0, 0, 0]), step.step(token, [1, 2, 1]))),
        ("together 1 to 3", lambda: [step.step(token) for _ in range(3)]),
    ]
    for message, call in cases:
        with pytest.raises(InputError, match=message):
            call()
    straight = StaticStep(model, batch=3, capacity=20, rollback=False)
    straight.prefill(ids, mask)
    with pytest.raises(InputError, match="keeps every token"):
        straight.step(token, [1, 1, 1])
    with pytest.raises(InputError, match="eval mode"):
        StaticStep(student_of(tiny(), mixer("lolcats")).train(), batch=1)
