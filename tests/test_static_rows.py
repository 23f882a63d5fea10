"""Texts that join and leave static rows decode as they do alone, and a row's state can be saved and gone on from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from speculation_cases import endless
from static_cases import VARIANTS, hybrid

from linearize.errors import InputError
from linearize.modeling.static.rows import StaticRows
from linearize.modeling.text_cache import SavedText, TextCaches, empty_cache

NEW = 9


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    families = {"llama": tiny("llama", attention="sdpa"), "gemma3_text": tiny("gemma3_text", attention="sdpa")}
    return {name: hybrid(name) for name in VARIANTS} | {name: endless(model) for name, model in families.items()}


NAMES = [*VARIANTS, "llama", "gemma3_text"]


def after(model: Any, tokens: torch.Tensor, cache: Any = None) -> tuple[torch.Tensor, Any]:
    """The logits after a text, or after its next tokens, and its cache."""
    cache = empty_cache(model) if cache is None else cache
    with torch.no_grad():
        return model(input_ids=tokens[None], past_key_values=cache, use_cache=True).logits[0, -1], cache


def alone(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    out = model.generate(prompt[None], max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_texts_that_join_and_leave_decode_as_alone(models: dict[str, Any], name: str) -> None:
    model = models[name]
    prompts = {key: text(1, length, seed=length)[0] for key, length in {"a": 11, "b": 1, "c": 7, "d": 23}.items()}
    due = {key: alone(model, prompt, NEW) for key, prompt in prompts.items()}
    joins, leaves = {0: "a", 2: "b", 3: "c", 6: "d"}, {5: "a", 8: "c"}
    rows, order, texts = StaticRows(model, most=3, capacity=40), [], {}
    for at in range(12):
        if at in leaves:
            row = order.index(leaves[at])
            rows.leave(row)
            order[row] = order[-1]
            order.pop()
        if at in joins:
            logits, cache = after(model, prompts[joins[at]])
            assert rows.join(cache) == len(order)
            order.append(joins[at])
            texts[joins[at]] = [int(logits.argmax())]
        if order:
            logits_BV = rows.read([texts[key][-1] for key in order])
            for key, token in zip(order, logits_BV.argmax(-1).tolist(), strict=True):
                texts[key].append(token)
    assert len({len(got) for got in texts.values()}) > 2
    for key, got in texts.items():
        assert got[:NEW] == due[key][: len(got)], key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("prompt", "steps"), [(1, 1), (3, 2), (13, 8)])
def test_a_row_that_is_saved_goes_on_as_if_it_had_stayed(
    models: dict[str, Any], name: str, prompt: int, steps: int
) -> None:
    model, whole, other = models[name], text(1, 60, seed=prompt)[0], text(1, 8, seed=4)[0]
    rows, caches = StaticRows(model, most=2, capacity=70), TextCaches(model)
    rows.join(after(model, other)[1])
    row = rows.join(after(model, whole[:prompt])[1])
    for at in range(prompt, prompt + steps):
        rows.read([5, int(whole[at])])
    saved = caches.save(rows.cache_of(row))
    rows.read([6, 7])
    assert saved.length == prompt + steps and caches.can_save
    for stop in (saved.length + 1, saved.length + 6, 60):
        logits, cache = after(model, whole[saved.length : stop], caches.restore(saved))
        assert cache.get_seq_length() == stop
        torch.testing.assert_close(logits, after(model, whole[:stop])[0], rtol=0, atol=2e-4)
        again, _ = after(model, whole[stop - 1 : stop], cache)
        due, _ = after(model, torch.cat([whole[:stop], whole[stop - 1 : stop]]))
        torch.testing.assert_close(again, due, rtol=0, atol=2e-4)


def test_saved_texts_of_retrieval_heads(models: dict[str, Any]) -> None:
    student = student_of(tiny("llama", attention="sdpa"), mixer("lolcats"))
    student.keep_heads({0: [0], 2: [1]})
    caches, whole = TextCaches(student), text(1, 40)[0]
    saved = caches.save(after(student, whole[:19])[1])
    logits, _ = after(student, whole[19:], caches.restore(saved))
    torch.testing.assert_close(logits, after(student, whole)[0], rtol=0, atol=2e-4)
    with pytest.raises(InputError, match="whole text"):
        StaticRows(student, most=2, capacity=40)


def test_a_saved_text_is_a_copy_and_its_size_is_that_of_its_tensors(models: dict[str, Any]) -> None:
    model, whole = models["lolcats"], text(1, 50)[0]
    caches = TextCaches(model)
    saved = caches.save(after(model, whole[:21])[1])
    before = {name: x.clone() for name, x in saved.tensors.items()}
    for _ in range(2):
        after(model, whole[21:], caches.restore(saved))
    assert all(torch.equal(x, saved.tensors[name]) for name, x in before.items())
    assert saved.num_bytes == sum(x.nbytes for x in before.values()) > 0
    broken = SavedText(saved.length, {k: v for k, v in before.items() if not k.endswith("memory_BHFV")}, saved.numbers)
    with pytest.raises(KeyError):
        caches.restore(broken)


def test_no_more_texts_than_rows(models: dict[str, Any]) -> None:
    model = models["mamba2"]
    rows = StaticRows(model, most=1, capacity=40)
    rows.join(after(model, text(1, 3)[0])[1])
    with pytest.raises(InputError, match="1 texts"):
        rows.join(after(model, text(1, 4)[0])[1])
    assert rows.num_rows == 1 and rows.num_bytes > 0
