"""Answers to chat questions: what is written, what is kept, how answers look, and the official files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import CHAT, byte_tokenizer
from chat_stand_in import ALPACA, QUESTIONS, alpaca_root, data_root, eval_context, eval_models, lines, read_lines

from linearize.errors import InputError
from linearize.evaluation.context import EvalModel
from linearize.evaluation.numbers import DifferenceNumbers, MeanNumbers
from linearize.evaluation.sections.chat import Chat, answering, data
from linearize.evaluation.sections.chat.answering import Turn, converse, prompt_tokens
from linearize.evaluation.sections.chat.data import Question, file_name
from linearize.evaluation.sections.chat.present import BenchmarkNumbers, ChatNumbers, benchmark_numbers, loops, repeated

CHAT_ONLY = Chat(max_new_tokens=9)
ANSWERS = ("mt_bench/model_answer/teacher.jsonl", f"mt_bench/model_answer/{file_name('org/student')}.jsonl")


@pytest.fixture(scope="module")
def models() -> tuple[EvalModel, EvalModel]:
    return eval_models()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_root(tmp_path / "data")


def texts(out: Path, name: str = ANSWERS[1]) -> dict[Any, list[str]]:
    return {row["question_id"]: row["choices"][0]["turns"] for row in read_lines(out / name)}


def question(*turns: str, temperature: float = 0.0) -> Question:
    return Question(id=turns[0], category="c", turns=turns, temperature=temperature)


def test_a_draw_depends_on_its_seed_and_questions(models: tuple[EvalModel, EvalModel]) -> None:
    asked = [question("one", "two", temperature=1.0), question("three", temperature=1.0)]
    state = torch.random.get_rng_state()
    first = converse(models[1], asked, 3, 11)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(map(len, first)) == [2, 1] and converse(models[1], asked, 3, 11) == first
    assert converse(models[1], asked, 4, 11) != first
    assert converse(models[1], asked[:1], 3, 11)[0] != first[0]


def test_greedy_is_the_argmax_of_the_full_forward(models: tuple[EvalModel, EvalModel]) -> None:
    model, tokenizer = models[1].model, models[1].tokenizer
    asked = [question("a short one"), question("and one that is a good deal longer", "and more")]
    for own, answers in zip(asked, converse(models[1], asked, 0, 6), strict=True):
        ids = prompt_tokens(tokenizer, own.turns, [])
        start = len(ids)
        for _ in range(Turn.model_validate(answers[0]).tokens):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answers[0]["text"] == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_prompts_with_and_without_a_template() -> None:
    own, plain = byte_tokenizer(chat=CHAT), byte_tokenizer()
    turns, answers = ("one", "two"), ["first"]
    assert own.decode(prompt_tokens(own, turns, answers)) == "<user> one\n<assistant> first\n<user> two\n<assistant> "
    tokens = prompt_tokens(plain, turns, answers)
    assert tokens[0] == plain.bos_token_id
    assert plain.decode(tokens[1:]) == "User: one\nAssistant: first</s>\nUser: two\nAssistant:"


def test_a_prompt_that_does_not_fit_loses_its_beginning(models: tuple[EvalModel, EvalModel]) -> None:
    end = "x" * 400
    (long,), (short,) = converse(models[0], [question("y" * 200 + end), question("z" * 300 + end)], 0, 900)
    tokens = len(prompt_tokens(models[0].tokenizer, ("y" * 200 + end,), []))
    assert (long["cut"], short["cut"]) == (tokens - 256, tokens - 156)  # half of the context of 512 is for the answer
    assert long["text"] == short["text"]
    assert converse(models[0], [question("y" * 200 + end)], 0, 12)[0][0]["cut"] == tokens - 500


@pytest.mark.parametrize(
    ("chat", "written", "turn"),
    [
        (None, "Yes.\nUser: more", Turn(text="Yes.", tokens=15, ended=True, cut=0)),
        (CHAT, "Yes.\nUser: more", Turn(text="Yes.\nUser: more", tokens=15, ended=False, cut=0)),
        (CHAT, "Yes.</s>", Turn(text="Yes.", tokens=5, ended=True, cut=0)),
    ],
)
def test_what_an_answer_is(chat: str | None, written: str, turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    model = eval_models(chat)[0]
    row = [int(t) for t in model.tokenizer(written.removesuffix("</s>"))["input_ids"]]
    row += [1] * written.endswith("</s>")
    monkeypatch.setattr(answering, "write", lambda *arguments: [row])
    assert converse(model, [question("Well?")], 0, 20) == [[turn.to_json()]]


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
        answers = [text for turns in texts(tmp_path / "out", file).values() for text in turns]
        words = numbers["models"][name]["mt_bench"]["means"]["words"]["value"]
        assert words == pytest.approx(sum(len(text.split()) for text in answers) / 6)
    assert numbers["judge"] is None and numbers["questions"] == {"mt_bench": 3}
    assert "looping" in numbers["models"]["org/student"]["mt_bench"]["above_teacher"]
    assert not numbers["models"]["teacher"]["mt_bench"]["above_teacher"]
    shown = Chat.present(json.loads(json.dumps(numbers)))
    assert [table.title for table in shown.tables] == ["MT-Bench"]
    assert [stat.label for stat in Chat.headline(numbers)["org/student"]] == ["MT-Bench: looping"]


def test_a_model_alone(root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    numbers = CHAT_ONLY.run(eval_context(root, None, models[:1]))
    assert Chat.present(numbers).tables and Chat.headline(numbers) == {}


class Counting:
    """`converse`, which stops the run after so many calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> None:
        self.stop, self.calls = stop, 0
        monkeypatch.setattr(answering, "converse", self)

    def __call__(self, *arguments: Any) -> Any:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return converse(*arguments)


def test_an_interrupted_run_goes_on(
    tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = eval_context(root, tmp_path / "whole", models), eval_context(root, tmp_path / "broken", models)
    numbers = CHAT_ONLY.run(whole)
    Counting(monkeypatch, stop=4)  # three temperatures, so three batches for each model
    with pytest.raises(KeyboardInterrupt):
        CHAT_ONLY.run(broken)
    counting = Counting(monkeypatch)
    assert CHAT_ONLY.run(broken) == numbers and counting.calls == 2
    assert texts(tmp_path / "broken") == texts(tmp_path / "whole")
    assert CHAT_ONLY.run(broken) == numbers and counting.calls == 2


def test_answers_of_another_seed_are_not_taken(
    tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    CHAT_ONLY.run(eval_context(root, tmp_path, models[:1]))
    before = texts(tmp_path, ANSWERS[0])
    counting = Counting(monkeypatch)
    CHAT_ONLY.run(eval_context(root, tmp_path, models[:1], seed=4))
    after = texts(tmp_path, ANSWERS[0])
    assert counting.calls == 3
    assert after[7] != before[7] and after[8] == before[8]  # writing is sampled, maths is greedy


def test_alpaca_outputs(tmp_path: Path, models: tuple[EvalModel, EvalModel]) -> None:
    numbers = Chat(max_new_tokens=6).run(eval_context(alpaca_root(tmp_path / "data"), tmp_path / "out", models))
    path = tmp_path / "out" / "alpaca_eval" / file_name("org/student") / "model_outputs.json"
    rows = json.loads(path.read_text("utf-8"))
    assert [set(row) for row in rows] == [{"instruction", "output", "generator", "dataset"}] * 3
    assert [(row["instruction"], row["dataset"]) for row in rows] == [(r["instruction"], r["dataset"]) for r in ALPACA]
    assert {row["generator"] for row in rows} == {"org/student"}
    assert numbers["questions"] == {"alpaca_eval": 3}


def test_a_limit_takes_questions_from_the_whole_file(root: Path) -> None:
    assert [q.id for q in data.read_questions(root / "chat", 2)["mt_bench"]] == [7, 8]
    assert [q.id for q in data.read_questions(root / "chat", 9)["mt_bench"]] == [7, 8, 11]


def test_missing_files_are_reported(tmp_path: Path, models: tuple[EvalModel, EvalModel]) -> None:
    no_root = eval_context(tmp_path, None, models).__class__(models=models)
    for ctx, hint in ((no_root, "--data-root"), (eval_context(tmp_path, None, models), "FastChat")):
        with pytest.raises(InputError, match=hint):
            Chat().check(ctx)
    root = data_root(tmp_path / "data")
    Chat().check(eval_context(root, None, models))
    (root / "chat" / "mt_bench" / "reference_answer" / "gpt-4.jsonl").unlink()
    with pytest.raises(InputError, match=r"gpt-4\.jsonl.*FastChat"):
        Chat().check(eval_context(root, None, models))
    lines(root / "chat" / "mt_bench" / "question.jsonl", [{"question_id": 1}])
    with pytest.raises(InputError, match=r"turns"):
        Chat().check(eval_context(root, None, models))


def test_repetition() -> None:
    assert repeated("a b c d e") == (0.0, 2)
    assert repeated("a b c d a b c d") == (pytest.approx(0.2), 5)  # abcd bcda cdab dabc abcd
    assert repeated("ooooooo") == (0.75, 4)  # no words: letters
    assert repeated("") == (0.0, 0)
    assert loops("she ran " * 10) and not loops("she ran she ran she ran") and not loops(" ".join(map(str, range(99))))


def test_errors_are_over_questions() -> None:
    turns = {words: Turn(text="w " * words, tokens=words, ended=True, cut=0) for words in (2, 6)}
    means = benchmark_numbers({"m": {1: [turns[2], turns[2]], 2: [turns[6], turns[6]]}}, [], None)["m"].means
    assert means["words"] == MeanNumbers(value=4.0, error=2.0)  # of four answers it would be 1.15
    assert means["empty"] == MeanNumbers(value=0.0, error=0.0)


@pytest.mark.parametrize(
    ("value", "low", "high", "levels"),
    [(0.3, 0.2, 0.4, ["bad", "good"]), (0.01, -0.02, 0.04, ["good", "good"]), (0.1, -0.1, 0.3, ["good"])],
)
def test_loops_are_reported(value: float, low: float, high: float, levels: list[str]) -> None:
    means = {"looping": MeanNumbers(value=0.4, error=0.1), "cut": MeanNumbers(value=0.0, error=0.0)}
    above = {
        "looping": DifferenceNumbers(value=value, low=low, high=high, n=80),
        "empty": DifferenceNumbers(value=0.0, low=-0.03, high=0.03, n=80),
    }
    own = BenchmarkNumbers(means=means, above_teacher=above, against="", win_rate=None, unrated=0)
    numbers = ChatNumbers(
        models={"s": {"mt_bench": own}}, students=["s"], questions={"mt_bench": 80}, judge=None, max_new_tokens=9,
        template=True,
    )  # fmt: skip
    assert [finding.level for finding in Chat.present(numbers.to_json()).findings] == levels


def test_file_names_stay_apart() -> None:
    assert file_name("a/b") != file_name("a_b") == "a_b" and "/" not in file_name("../a/b")


def test_the_official_files_are_read(shared_dir: Path) -> None:
    chat = shared_dir / "data" / "eval" / "chat"
    questions = data.read_questions(chat, None)["mt_bench"]
    assert len(questions) == 80 and sum(len(q.reference) == 2 for q in questions) == 30
    assert len({q.category for q in data.read_questions(chat, 8)["mt_bench"]}) == 8
    assert len(data.mt_bench_prompts(chat)) == 8
