"""The cloze: items cut by hand, scores against plain forward passes, generation against the argmax, faulty caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import SIZE, byte_tokenizer
from models import mixer, student_of, tiny
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.numbers import ResultCache
from linearize.evaluation.sections.cloze import Cloze
from linearize.evaluation.sections.cloze.items import ClozeItem, cut_items, score_words, word_answers, write_words
from linearize.metrics.theme import styled

NOUNS = ("ball", "balloon", "cat", "hill", "well-being", "pond", "ice", "mother's", "tree", "sun", "bee", "fox")
TEXTS = tuple(f"One day {a} saw a {b} by the {c}. Then, {b} said, \"I like {a}!\" and ran to {c}." for a, b, c in zip(
    NOUNS, NOUNS[3:] + NOUNS[:3], NOUNS[5:] + NOUNS[:5], strict=True
))  # fmt: skip
TOKENIZER = byte_tokenizer()
DEMO = Path(__file__).parents[1] / "src/linearize/demo/teacher"


def cut(
    texts: tuple[str, ...] = TEXTS, tokenizer: PreTrainedTokenizerBase = TOKENIZER, **changes: Any
) -> list[ClozeItem]:
    sizes = {"items": 9, "choices": 3, "min_words": 5, "max_words": 11, "max_tokens": 200, "seed": 4}
    return cut_items(texts, tokenizer, **{**sizes, **changes})


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    teacher = tiny(vocab_size=SIZE, bos_token_id=0, eos_token_id=1)
    return {"teacher": teacher, "student": student_of(teacher, mixer("lolcats", window=4))}


def context_of(models: dict[str, PreTrainedModel], **changes: Any) -> EvalContext:
    eval_models = tuple(
        EvalModel(
            name=name, role="teacher" if name == "teacher" else "student", path=name, model=model,
            tokenizer=TOKENIZER, fingerprint=name,
        )
        for name, model in models.items()
    )  # fmt: skip
    return EvalContext(**{"models": eval_models, "texts": TEXTS, "length": 160, "batch": 4, "seed": 3, **changes})


def test_where_items_are_cut() -> None:
    text = 'a b c d e Mr. Fox, he saw 12. f g h the red-hot iron. He said "come to mother\'s!" x y z, so it is (big).'
    items = cut((text,), choices=2, max_words=99)
    assert {(item.context.split()[-1], item.word) for item in items} == {
        ("e", "Mr"),
        ("red-hot", "iron"),
        ("to", "mother's"),
    }
    assert all(text.startswith(item.context) for item in items)
    assert not cut((text,), min_words=30)
    assert not cut(("one word here is all the text that there is and it has no end",))
    assert not cut(("a b c d e f same. a b c d e f Same.",), choices=2)  # no other word to choose


def test_contexts_are_cut_on_the_left_and_drawn_by_the_seed() -> None:
    items = cut()
    assert len(items) == 9 and all(5 <= len(item.context.split()) <= 11 for item in items)
    assert items == cut() and items != cut(seed=5)
    assert len(cut(items=100)) == 3 * len(TEXTS)
    rounds = cut(items=100, max_words=99)
    assert len({item.context[:16] for item in rounds[: len(TEXTS)]}) == len(TEXTS)  # one of every text comes first
    for item in items:
        assert item.choices[0] == item.word and len({c.casefold() for c in item.choices}) == 3
        assert not item.context.endswith(" ")
    assert all(len(i.context_ids) + max(map(len, i.choice_ids)) <= 60 for i in cut(max_tokens=60))
    assert len(cut(max_tokens=60, items=100)) < len(cut(items=100))


@pytest.mark.parametrize("name", ["bytes", "demo", "stories260k"])
def test_tokens_of_a_word(name: str, request: pytest.FixtureRequest) -> None:
    """Context and word together are the tokens of the text itself; a word may be one token or several."""
    if name == "bytes":
        tokenizer: Any = TOKENIZER
    else:
        folder = DEMO if name == "demo" else request.getfixturevalue("shared_dir") / "teachers" / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
    items = cut(tokenizer=tokenizer, items=100)
    assert len(items) == 3 * len(TEXTS)
    for item in items:
        assert item.context_ids[0] == tokenizer.bos_token_id != item.context_ids[1]
        for choice, ids in zip(item.choices, item.choice_ids, strict=True):
            whole = tokenizer(f"{item.context} {choice}", add_special_tokens=False)["input_ids"]
            assert [tokenizer.bos_token_id, *whole] == [*item.context_ids, *ids]
            before = tokenizer.decode(item.context_ids, skip_special_tokens=True)
            assert tokenizer.decode([*item.context_ids, *ids], skip_special_tokens=True) == f"{before} {choice}"
    assert len({len(ids) for item in items for ids in item.choice_ids}) > 2


def plain(model: PreTrainedModel, item: ClozeItem) -> tuple[list[float], list[int], float]:
    """Log-likelihood of every choice, the true word's teacher-forced argmax tokens, and the closest call of those."""
    totals, tokens, margin = [], [], 0.0
    for c, word in enumerate(item.choice_ids):
        with torch.no_grad():
            log_p = (
                model(torch.tensor([[*item.context_ids, *word]]), use_cache=False).logits[0].double().log_softmax(-1)
            )
        steps = log_p[len(item.context_ids) - 1 : -1]
        totals.append(sum(step[t].item() for step, t in zip(steps, word, strict=True)))
        if c == 0:
            tokens = steps.argmax(-1).tolist()
            best = steps.topk(2).values
            gaps = [
                (b[0] - b[1]).item() if t == a else (b[0] - step[t]).item()
                for step, t, a, b in zip(steps, word, tokens, best, strict=True)
            ]
            wrong = [gap for gap, t, a in zip(gaps, word, tokens, strict=True) if t != a]
            margin = wrong[0] if wrong else min(gaps)
    return totals, tokens, margin


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_scores_against_plain_passes(models: dict[str, PreTrainedModel], who: str) -> None:
    items = cut()
    scores = score_words(models[who], items, batch=5, pad=1)
    assert len(set(scores["choice"])) > 1, "all choices are equal: the test is blind"
    for i, item in enumerate(items):
        totals, tokens, margin = plain(models[who], item)
        assert scores["choice"][i] == max(range(3), key=totals.__getitem__)
        assert scores["scored"][i] == (scores["choice"][i] == 0)
        assert scores["greedy"][i] == (tuple(tokens) == item.choice_ids[0])
        assert scores["margin"][i] == pytest.approx(margin, abs=1e-4)


def greedy_items(model: PreTrainedModel, items: list[ClozeItem], own: int = 2) -> list[ClozeItem]:
    """The same items, every other one with the model's own continuation (`own` tokens) as its word."""
    made = []
    for i, item in enumerate(items):
        ids = list(item.context_ids)
        for _ in range(own):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        word = tuple(ids[-own:]) if i % 2 else item.choice_ids[0]
        made.append(
            ClozeItem(
                context=item.context, choices=item.choices, context_ids=item.context_ids,
                choice_ids=(word, *item.choice_ids[1:]),
            )
        )  # fmt: skip
    return made


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_generation_through_the_cache_is_the_argmax(models: dict[str, PreTrainedModel], who: str) -> None:
    items = greedy_items(models[who], cut(items=7, max_words=6))
    for batch in (1, 4):
        answers = word_answers(models[who], TOKENIZER, items, batch=batch)
        assert answers["same_tokens"] == answers["greedy"] == [i % 2 for i in range(len(items))]
        assert min(answers["margin"]) > answers["tie"] == 1e-3


def test_settings_of_a_model_do_not_change_what_greedy_means(models: dict[str, PreTrainedModel]) -> None:
    items = greedy_items(models["teacher"], cut(items=5, max_words=6))
    expected = write_words(models["teacher"], TOKENIZER, items, batch=3)
    own = models["teacher"].generation_config
    try:
        own.repetition_penalty, own.do_sample, own.temperature, own.no_repeat_ngram_size = 3.0, True, 2.0, 1
        assert write_words(models["teacher"], TOKENIZER, items, batch=3) == expected
    finally:
        own.repetition_penalty, own.do_sample, own.temperature, own.no_repeat_ngram_size = None, None, None, None


def test_a_word_must_end_where_it_ends(models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """` balloon` begins with the tokens of ` ball` and is not the word; ` ball.` and ` ball-room` are."""
    text = "they went up the long hill to see the ball. then the tall one said to buy a bee."
    (item,) = cut((text,), items=1, choices=2)
    word = item.word
    for continuation, right in ((f" {word}. A", 1), (f" {word}oon", 0), (f" {word}-r", 1), (" x", 0), ("", 0)):
        ids = TOKENIZER(continuation, add_special_tokens=False)["input_ids"]
        row = [*item.context_ids, *(ids + [1] * 12)[:12]]
        monkeypatch.setattr(models["teacher"], "generate", lambda row=row, **kwargs: torch.tensor([row]))
        answers = write_words(models["teacher"], TOKENIZER, [item], batch=2)
        assert answers["generated"] == [right], continuation
        assert answers["same_tokens"] == [int(continuation.startswith(f" {word}"))]


class Forgetful:
    """A student whose cache is emptied before every step: only full passes see the text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
        inner = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("past_key_values") is not None and kwargs["input_ids"].shape[1] == 1:
                kwargs = {
                    **kwargs,
                    "past_key_values": None,
                    "attention_mask": None,
                    "position_ids": None,
                    "use_cache": False,
                }
            return inner(*args, **kwargs)

        monkeypatch.setattr(model, "forward", forward)


def test_a_faulty_cache_is_found(models: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    items = greedy_items(models["student"], cut(items=7, max_words=6), own=3)
    monkeypatch.setattr(Cloze, "_cut", lambda self, ctx: items)
    healthy = Cloze().run(context_of(models))
    levels = {f.student: f.level for f in Cloze.present(healthy).findings if "cache" in f.text}
    assert healthy["models"]["student"]["cache_differs"] == 0 and levels == {"student": "good"}
    Forgetful(monkeypatch, models["student"])
    faulty = Cloze().run(context_of(models))
    assert faulty["models"]["student"]["cache_differs"] > 1
    assert faulty["models"]["student"]["greedy"] == healthy["models"]["student"]["greedy"]
    findings = [f for f in Cloze.present(faulty).findings if "cache" in f.text]
    assert [f.level for f in findings] == ["bad"] and "does not do what the full forward does" in findings[0].text


def test_numbers_of_the_section(models: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    section = Cloze(items=8, choices=3, min_words=5, max_words=7)
    ctx = context_of(models, results=ResultCache(tmp_path))
    section.check(ctx)
    numbers = section.run(ctx)
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers == section.run(context_of(models))
    items = section._cut(ctx)
    t, s = (word_answers(models[who], TOKENIZER, items, batch=4) for who in ("teacher", "student"))
    own = numbers["models"]["student"]
    assert numbers["items"] == 8 and own["scored"]["value"] == pytest.approx(sum(s["scored"]) / 8)
    drops = {way: (sum(t[way]) - sum(s[way])) / 8 for way in ("scored", "generated")}
    assert own["scored_drop"]["value"] == pytest.approx(drops["scored"])
    assert own["gap"]["value"] == pytest.approx(drops["generated"] - drops["scored"])
    assert own["gap"]["low"] < own["gap"]["value"] < own["gap"]["high"]
    assert len(list(tmp_path.iterdir())) == 2 and section.run(ctx) == numbers


def shown_with(drops: dict[str, tuple[float, float, float]]) -> list[str]:
    """Levels of the student's findings for drops given as (value, low, high)."""
    share = {"value": 0.5, "low": 0.4, "high": 0.6, "successes": 50, "n": 100}
    model = {"role": "student", "scored": share, "greedy": share, "generated": share, "cache_differs": 0, "ties": 1}
    keys = ("value", "low", "high")
    model |= {name: {**dict(zip(keys, drop, strict=True)), "n": 100} for name, drop in drops.items()}
    numbers = {"items": 100, "choices": 4, "tokens": 1.5, "models": {"s": model}, "examples": []}
    return [finding.level for finding in Cloze.present(numbers).findings]


def test_findings() -> None:
    near, far, none = (0.02, -0.03, 0.07), (0.2, 0.1, 0.3), (0.0, -0.05, 0.05)
    assert shown_with({"scored_drop": near, "generated_drop": far, "gap": far}) == ["bad", "good"]
    assert shown_with({"scored_drop": far, "generated_drop": far, "gap": none}) == ["note", "good"]
    assert shown_with({"scored_drop": near, "generated_drop": near, "gap": none}) == ["good", "good"]


def test_shown_for_any_number_of_models(models: dict[str, PreTrainedModel]) -> None:
    from matplotlib.figure import Figure

    section = Cloze(items=8, choices=2, min_words=5, max_words=6)
    for names in (["teacher"], ["student"], ["teacher", "student"]):
        numbers = section.run(context_of({name: models[name] for name in names}))
        shown = section.present(json.loads(json.dumps(numbers)))
        assert shown.tables and all(len({tuple(row) for row in table.rows}) == 1 for table in shown.tables)
        assert list(section.headline(numbers)) == [name for name in names if name == "student"]
        with styled():
            figure = Figure(figsize=(4.8, 3.6), layout="constrained")
            shown.plots[0].draw(figure)
            figure.canvas.draw()


def test_text_without_items(models: dict[str, PreTrainedModel]) -> None:
    with pytest.raises(InputError, match=r"0 items in the text, at least 8.*after 24 words"):
        Cloze().check(context_of(models))
    with pytest.raises(InputError, match="max_words 3 is below min_words 4"):
        Cloze(min_words=4, max_words=3).check(context_of(models))
