"""Answers to chat questions: what is drawn, what is kept, and the official files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import CHAT, byte_tokenizer
from chat_stand_in import ALPACA, QUESTIONS, data_root, eval_context, eval_models, lines, read_lines

from linearize.errors import InputError
from linearize.evaluation.chat import answering, data
from linearize.evaluation.chat import answers as answers_module
from linearize.evaluation.chat.answering import Ask, Draws, Turn, answer_batch, hold, prompt_tokens
from linearize.evaluation.chat.journal import Journal, file_name
from linearize.evaluation.chat.texts import described, loops, repeated
from linearize.evaluation.context import EvalModel, Numbers
from linearize.evaluation.sections.chat import Chat

CHAT_ONLY = Chat(max_new_tokens=9, benchmarks=("mt_bench",))
ANSWERS = ("mt_bench/model_answer/teacher.jsonl", f"mt_bench/model_answer/{file_name('org/student')}.jsonl")


@pytest.fixture(scope="module")
def models() -> tuple[EvalModel, EvalModel]:
    return eval_models()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_root(tmp_path / "data")


def texts(out: Path, name: str = ANSWERS[1]) -> dict[Any, list[str]]:
    return {row["question_id"]: row["choices"][0]["turns"] for row in read_lines(out / name)}


def test_draws_follow_the_softmax() -> None:
    scores_BV = torch.tensor([[1.0, -0.5, 2.0, 0.3], [5.0, 1.0, 2.0, 4.0]])
    counts = torch.zeros(4)
    for draw in range(2000):
        picked_BV = Draws([(0.6, f"seed {draw}"), (0.0, "-")])(torch.zeros(2, 1), scores_BV)
        counts[picked_BV[0].argmax()] += 1
        assert torch.equal(picked_BV[1], scores_BV[1])  # greedy: left alone
    expected = 2000 * (scores_BV[0] / 0.6).softmax(-1)
    assert ((counts - expected).square() / expected).sum() < 16.3  # chi-square with 3 degrees: one in a thousand


def test_a_draw_depends_on_its_own_seed_alone(models: tuple[EvalModel, EvalModel]) -> None:
    model, tokenizer = models[1].model, models[1].tokenizer
    first, second = (Ask(turns=(f"word {i}",), temperature=1.0, seed=f"s{i}") for i in range(2))
    together = hold(model, tokenizer, [first, second], 11)
    assert together[::-1] == hold(model, tokenizer, [second, first], 11)
    assert together == [*hold(model, tokenizer, [first], 11), *hold(model, tokenizer, [second], 11)]
    other = Ask(turns=first.turns, temperature=1.0, seed="another")
    assert hold(model, tokenizer, [other], 11) != together[:1]


def test_each_turn_has_a_draw_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[float, str]]] = []

    def answered(model: Any, tokenizer: Any, prompts: Any, draws: Any, max_new_tokens: int) -> list[Turn]:
        seen.append(draws)
        return [Turn(text="a", tokens=1, ended=True, cut=0) for _ in prompts]

    monkeypatch.setattr(answering, "answer_batch", answered)
    asks = [Ask(turns=turns, temperature=0.5, seed=seed) for turns, seed in ((("x", "x"), "p"), (("x",), "q"))]
    model: Any = None
    assert list(map(len, hold(model, byte_tokenizer(), asks, 3))) == [2, 1]
    assert list(map(len, seen)) == [2, 1]
    assert len({name for draws in seen for _, name in draws}) == 3


def test_greedy_is_the_argmax_of_the_full_forward(models: tuple[EvalModel, EvalModel]) -> None:
    model, tokenizer = models[1].model, models[1].tokenizer
    prompts = [list(tokenizer(text)["input_ids"]) for text in ("a short one", "and one that is a good deal longer")]
    found = answer_batch(model, tokenizer, prompts, [(0.0, ""), (0.0, "")], 6)
    for prompt, turn in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(turn.tokens):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert turn.text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_prompts_with_and_without_a_template() -> None:
    own, plain = byte_tokenizer(chat=CHAT), byte_tokenizer()
    turns, answers = ("one", "two"), ["first"]
    assert own.decode(prompt_tokens(own, turns, answers)) == "<user> one\n<assistant> first\n<user> two\n<assistant> "
    tokens = prompt_tokens(plain, turns, answers)
    assert tokens[0] == plain.bos_token_id
    assert plain.decode(tokens[1:]) == "User: one\nAssistant: first</s>\nUser: two\nAssistant:"


def test_a_prompt_that_does_not_fit_loses_its_beginning(models: tuple[EvalModel, EvalModel]) -> None:
    model, tokenizer = models[0].model, models[0].tokenizer
    prompt = [5 + i % 200 for i in range(600)]
    long, short = answer_batch(model, tokenizer, [prompt, prompt[-256:]], [(0.0, ""), (0.0, "")], 900)
    assert (long.cut, short.cut) == (600 - 256, 0)  # half of the context of 512 is for the answer
    assert long.text == short.text and long.tokens <= 256
    assert answer_batch(model, tokenizer, [prompt], [(0.0, "")], 12)[0].cut == 600 - 500


def test_without_a_template_the_users_part_is_cut() -> None:
    plain, own = byte_tokenizer(), byte_tokenizer(chat=CHAT)
    row = [int(t) for t in plain("Yes.\nUser: more")["input_ids"]]
    assert answering._turn(plain, row, {1}, 0) == Turn(text="Yes.", tokens=len(row), ended=True, cut=0)
    assert answering._turn(own, row, {1}, 0) == Turn(text="Yes.\nUser: more", tokens=len(row), ended=False, cut=0)
    ended = [int(t) for t in own("Yes.")["input_ids"]] + [1, 1, 1]
    assert answering._turn(own, ended, {1}, 3) == Turn(text="Yes.", tokens=5, ended=True, cut=3)


def test_official_answers_and_numbers(tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    numbers = CHAT_ONLY.run(eval_context(root, tmp_path / "out", models))
    for name, file in zip(("teacher", "org/student"), ANSWERS, strict=True):
        rows = read_lines(tmp_path / "out" / file)
        assert [row["question_id"] for row in rows] == [q["question_id"] for q in QUESTIONS]
        for row in rows:
            assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
            assert row["model_id"] == name and len(row["answer_id"]) == 22
            assert [list(choice) for choice in row["choices"]] == [["index", "turns"]]
            assert len(row["choices"][0]["turns"]) == 2 and row["choices"][0]["index"] == 0
        own = numbers["models"][name]["mt_bench"]["answers"]
        answers = [text for turns in texts(tmp_path / "out", file).values() for text in turns]
        assert own["words"]["mean"] == pytest.approx(sum(len(text.split()) for text in answers) / 6)
        assert own["answers"] == 6
    assert numbers["judge"] is None
    assert "looping_more" in numbers["models"]["org/student"]["mt_bench"]["answers"]
    assert "looping_more" not in numbers["models"]["teacher"]["mt_bench"]["answers"]
    shown = Chat.present(json.loads(json.dumps(numbers)))
    assert "not judged" in shown.summary and shown.plots[0].name == "chat_repetition"


def test_a_model_alone(tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    numbers = CHAT_ONLY.run(eval_context(root, None, models[:1]))
    assert Chat.present(numbers).tables and Chat.headline(numbers) == {}


class Counting:
    """`hold`, which stops the run after so many calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.asked: list[str] = []
        self.stop, self.calls = stop, 0
        monkeypatch.setattr(answers_module, "hold", self)

    def __call__(self, model: Any, tokenizer: Any, asks: Any, max_new_tokens: int) -> Any:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        self.asked += [ask.turns[0] for ask in asks]
        return hold(model, tokenizer, asks, max_new_tokens)


def test_an_interrupted_run_goes_on(
    tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = eval_context(root, tmp_path / "whole", models), eval_context(root, tmp_path / "broken", models)
    numbers = CHAT_ONLY.run(whole)
    Counting(monkeypatch, stop=3)
    with pytest.raises(KeyboardInterrupt):
        CHAT_ONLY.run(broken)
    kept = tmp_path / "broken" / ANSWERS[1]
    assert len(read_lines(kept)) == 2
    for path in (kept, tmp_path / "broken" / "chat" / f"mt_bench-{file_name('org/student')}.jsonl"):
        path.write_bytes(path.read_bytes()[:-30])  # a kill while the last line was written
    counting = Counting(monkeypatch)
    assert CHAT_ONLY.run(broken) == numbers
    assert counting.calls == 2  # the group that lost a line, and the one that never began; none of the teacher's
    assert texts(tmp_path / "broken") == texts(tmp_path / "whole")
    assert len(read_lines(kept)) == 3
    assert CHAT_ONLY.run(broken) == numbers and counting.calls == 2


def test_answers_of_another_model_or_seed_are_not_taken(
    tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    CHAT_ONLY.run(eval_context(root, tmp_path, models[:1]))
    before = texts(tmp_path, ANSWERS[0])
    counting = Counting(monkeypatch)
    CHAT_ONLY.run(eval_context(root, tmp_path, models[:1], seed=4))
    after = texts(tmp_path, ANSWERS[0])
    assert counting.calls == 2 and len(read_lines(tmp_path / ANSWERS[0])) == 3  # the old ones have left the file
    assert after[7] != before[7] and after[8] == before[8]  # writing is sampled, maths is greedy


def test_alpaca_outputs(tmp_path: Path, models: tuple[EvalModel, EvalModel]) -> None:
    root = data_root(tmp_path / "data", alpaca=True)
    section = Chat(max_new_tokens=6, benchmarks=("alpaca_eval",))
    numbers = section.run(eval_context(root, tmp_path / "out", models))
    path = tmp_path / "out" / "alpaca_eval" / file_name("org/student") / "model_outputs.json"
    found = json.loads(path.read_text("utf-8"))
    assert [set(row) for row in found] == [{"instruction", "output", "generator", "dataset"}] * 3
    assert [(row["instruction"], row["dataset"]) for row in found] == [(r["instruction"], r["dataset"]) for r in ALPACA]
    assert {row["generator"] for row in found} == {"org/student"}
    assert numbers["models"]["teacher"]["alpaca_eval"]["answers"]["answers"] == 3


def test_instructions_of_other_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines(path, [{"instruction": "Add.", "input": "1 2"}, {"turns": ["Go.", "On."]}, {"turns": ["Go."]}])
    assert [i.text for i in data.instructions(path, None)] == ["Add.\n\n1 2", "Go."]
    lines(path, [{"prompt": "x"}])
    with pytest.raises(InputError, match="no instruction"):
        data.instructions(path, None)


def test_a_limit_takes_all_groups_in_turn() -> None:
    assert data.in_turn("aaabbc", str, 4) == ["a", "a", "b", "c"]
    assert data.in_turn("aaabbc", str, None) == list("aaabbc")


def test_missing_files_are_told(tmp_path: Path, models: tuple[EvalModel, EvalModel]) -> None:
    with pytest.raises(InputError, match="--data-root DIR"):
        Chat().check(eval_context(tmp_path, None, models).__class__(models=models))
    with pytest.raises(InputError, match=r"question\.jsonl: no such file; get it from https://github"):
        Chat().check(eval_context(tmp_path, None, models))
    root = data_root(tmp_path / "data", reference=False)
    assert "alpaca_eval.json from" in Chat()._items(eval_context(root, None, models))[2][0]
    judged = {"judge_url": "http://127.0.0.1:1", "judge_model": "j"}
    with pytest.raises(InputError, match="no reference answers to questions 8"):
        Chat().check(eval_context(root, None, models, **judged))
    with pytest.raises(InputError, match="must begin with http"):
        Chat().check(eval_context(root, None, models, judge_url="file:///etc", judge_model="j"))
    with pytest.raises(InputError, match="both"):
        Chat().check(eval_context(root, None, models, judge_url="http://x"))


def test_the_journal_drops_a_cut_line_and_stale_ones(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": "ü', "utf-8")
    journal = Journal(path, stale=lambda record: record["a"] == 1)
    journal.append({"a": "\u2028ü"})
    assert journal.records == read_lines(path) == [{"a": 2}, {"a": "\u2028ü"}]
    assert file_name("a/b") != file_name("a_b") == "a_b" and "/" not in file_name("../a/b")


def test_repetition() -> None:
    assert repeated("a b c d e") == (0.0, 2)
    assert repeated("a b c d a b c d") == (pytest.approx(0.2), 5)  # abcd bcda cdab dabc abcd
    assert repeated("ooooooo") == (0.75, 4)  # no words: letters
    assert repeated("") == (0.0, 0)
    assert loops("she ran " * 10) and not loops("she ran she ran she ran") and not loops(" ".join(map(str, range(99))))


def test_errors_are_over_questions() -> None:
    answers = [
        {"question": q, "text": "w " * n, "tokens": n, "ended": True, "cut": 0}
        for q, n in ((1, 2), (1, 2), (2, 6), (2, 6))
    ]
    found = described(answers)["words"]
    assert (found["mean"], found["count"]) == (4.0, 4)
    assert found["error"] == pytest.approx(2.0)  # of two question means, 2 and 6; of four answers it would be 1.15


def numbers_of_loops(more: dict[str, float]) -> Numbers:
    share = {"value": 0.4, "low": 0.3, "high": 0.5}
    answers = {"looping": share, "empty": share, "looping_more": more, "empty_more": more}
    return {
        "models": {"teacher": {}, "s": {"alpaca_eval": {"answers": answers | {"cut": {"successes": 0}}}}},
        "students": ["s"], "judge": None, "notes": [], "template": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "levels"),
    [
        ({"value": 0.3, "low": 0.2, "high": 0.4}, {"bad"}),
        ({"value": 0.01, "low": -0.02, "high": 0.04}, {"good"}),
        ({"value": 0.1, "low": -0.1, "high": 0.3}, set()),
    ],
)
def test_loops_are_found(more: dict[str, float], levels: set[str]) -> None:
    from linearize.evaluation.sections.chat.present import _findings

    assert {finding.level for finding in _findings(numbers_of_loops(more))} == levels


def test_the_official_files_are_read(shared_dir: Path) -> None:
    root = shared_dir / "data" / "eval"
    questions = data.mt_bench_questions(root, None)
    assert len(questions) == 80 and sum(q.needs_reference for q in questions) == 30
    assert all(len(q.reference) == 2 for q in questions if q.needs_reference)
    assert len({q.category for q in data.mt_bench_questions(root, 8)}) == 8
    assert set(data.judge_prompts(root)) == set(data.PROMPTS)
    assert len(data.instructions(root / "spec_decoding" / "alpaca.jsonl", None)) == 80
