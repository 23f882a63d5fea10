"""What a judge is asked, how its replies are read, the official files of judgments, and the numbers from them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_judge import good
from chat_judge import no_other_address as no_other_address
from chat_stand_in import (
    ALPACA,
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    QUESTIONS,
    Reply,
    Request,
    StandIn,
    alpaca_root,
    data_root,
    eval_context,
    eval_models,
    read_lines,
    serving,
)  # fmt: skip

from linearize.errors import InputError
from linearize.evaluation.context import EvalModel
from linearize.evaluation.sections.chat import Chat, answering, data
from linearize.evaluation.sections.chat import judge as judge_module
from linearize.evaluation.sections.chat.data import Question, file_name
from linearize.evaluation.sections.chat.judge import Judge
from linearize.storage.journal import Journal

pytest.importorskip("openai")

STUDENT = "org/student"
CHAT = Chat(max_new_tokens=5, judge_parallel=3)
SINGLES, PAIRS = 2 * 2 * 3, 2 * 3  # models x turns x questions; a pair is asked twice
JUDGMENTS = f"mt_bench/model_judgment/{file_name('j/udge')}"


@pytest.fixture(scope="module")
def models() -> tuple[EvalModel, EvalModel]:
    return eval_models()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_root(tmp_path / "data")


def judged(server: StandIn, **changes: Any) -> dict[str, Any]:
    return {"judge_url": server.url, "judge_model": "j/udge", **changes}


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Rating: [[5]]", 5.0),
        ("[[7.5]] then [[2]]", 7.5),
        ("only [4] here", 4.0),
        ("[3] before [[9]]", 9.0),
        ("[[0]]", 0.0),
        ("[[95]]", None),
        ("ten of ten", None),
        ("[[A]]", None),
    ],
)
def test_ratings_are_read_as_officially(reply: str, value: float | None) -> None:
    assert judge_module.rating(reply) == value


def test_verdicts_are_read_as_officially() -> None:
    replies = {"so [[A]]": "A", "[[B]]": "B", "[[C]]": "C", "A": "", "[[B]] no, [[A]]": "A"}
    assert {reply: judge_module.winner(reply) for reply in replies} == replies


def test_what_is_asked(tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    with serving(good) as server:
        CHAT.run(eval_context(root, tmp_path, models, **judged(server)))
    for request in server.requests:
        assert {name: request[name] for name in ("model", "temperature", "max_tokens", "n")} == {
            "model": "j/udge", "temperature": 0, "max_tokens": 2048, "n": 1,
        }  # fmt: skip
        assert [message["role"] for message in request["messages"]] == ["system", "user"]
    answers = {
        name: {row["question_id"]: row["choices"][0]["turns"] for row in read_lines(path)}
        for name in ("teacher", STUDENT)
        for path in [tmp_path / "mt_bench" / "model_answer" / f"{file_name(name)}.jsonl"]
    }
    expected: Counter[str] = Counter()
    for question in QUESTIONS:
        (q1, q2), maths = question["turns"], question["category"] == "math"
        (s1, s2), (t1, t2) = answers[STUDENT][question["question_id"]], answers["teacher"][question["question_id"]]
        for a1, a2 in ((s1, s2), (t1, t2)):
            expected[f"Q:{q1}|A:{a1}" + "|R:seven" * maths] += 1
            expected[f"Q:{q1}|A:{a1}|Q:{q2}|A:{a2}" + "|R:seven|14" * maths] += 1
        for (a1, a2), (b1, b2) in (((s1, s2), (t1, t2)), ((t1, t2), (s1, s2))):
            expected[f"Q:{q1}|A:{a1}|B:{b1}" + "|R:seven" * maths] += 1
            expected[f"Q:{q1}|{q2}|A:{a1}|{a2}|B:{b1}|{b2}" + "|R:seven|14" * maths] += 1
    assert Counter(server.prompts()) == expected and expected.total() == SINGLES + 2 * PAIRS


def test_official_judgments(tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    with serving(good) as server:
        numbers = CHAT.run(eval_context(root, tmp_path, models, **judged(server)))
    single = read_lines(tmp_path / f"{JUDGMENTS}_single.jsonl")
    fields = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert len(single) == SINGLES and all(set(row) == fields for row in single)
    names = {(row["question_id"], row["turn"]): row["judge"] for row in single if row["model"] == STUDENT}
    assert names[7, 1] == ["j/udge", "single-v1"] and names[7, 2] == ["j/udge", "single-v1-multi-turn"]
    assert names[8, 1] == ["j/udge", "single-math-v1"] and names[8, 2] == ["j/udge", "single-math-v1-multi-turn"]
    assert {row["score"] for row in single if row["question_id"] == 8} == {8.0}
    pair = read_lines(tmp_path / f"{JUDGMENTS}_pair.jsonl")
    assert len(pair) == PAIRS
    for row in pair:
        assert set(row) == {
            "question_id", "model_1", "model_2", "g1_winner", "g2_winner", "judge", "g1_user_prompt", "g1_judgment",
            "g2_user_prompt", "g2_judgment", "turn", "tstamp",
        }  # fmt: skip
        assert (row["model_1"], row["model_2"]) == (STUDENT, "teacher")
        tie = row["question_id"] == 8
        assert (row["g1_winner"], row["g2_winner"]) == (("tie", "tie") if tie else ("model_1", "model_2"))
        assert row["judge"][1] == ("pair-math-v1" if tie else "pair-v2") + ("-multi-turn" if row["turn"] == 2 else "")
    own = numbers["models"][STUDENT]["mt_bench"]
    assert own["means"]["rating"] == {"value": 7.0, "error": pytest.approx(0.5)}
    assert own["means"]["rating, math"]["value"] == 8 and own["means"]["rating, turn 1"]["value"] == 7
    assert own["above_teacher"]["rating"]["value"] == 0 and own["above_teacher"]["rating"]["n"] == 3
    assert (own["against"], own["win_rate"]["value"], own["unrated"]) == ("teacher", 0.5, 0)
    assert numbers["models"]["teacher"]["mt_bench"]["win_rate"] is None
    replies = SINGLES + 2 * PAIRS
    judge = {"model": "j/udge", "replies": replies, "cost": None}
    tokens = {"prompt_tokens": replies * PROMPT_TOKENS, "completion_tokens": replies * COMPLETION_TOKENS}
    assert numbers["judge"] == judge | tokens
    shown = Chat.present(json.loads(json.dumps(numbers)))
    assert [len(table.rows) for table in shown.tables] == [
        6 + 3 + 3 + 2,
        1,
    ]  # looks, ratings, by category, wins and unrated; the judge
    assert len(Chat.headline(numbers)[STUDENT]) == 2


def test_a_better_student_wins(
    tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that prefers the student's answers in either place."""
    chat = CHAT.model_copy(update={"price_in": 2.0, "price_out": 10.0})

    def written(model: EvalModel, questions: list[Question], *rest: Any) -> list[list[dict[str, Any]]]:
        name = "mine" if model is models[1] else "theirs"
        turns = [[f"{name} {q.id} {turn}" for turn in range(2)] for q in questions]
        return [[{"text": text, "tokens": 2, "ended": True, "cut": 0} for text in own] for own in turns]

    monkeypatch.setattr(answering, "converse", written)

    def fan(request: Request, number: int) -> Reply:
        own = "|A:mine" in request["messages"][-1]["content"]
        single = request["messages"][0]["content"] == "single judge"
        return ("[[9]]" if own else "[[3]]") if single else ("[[A]]" if own else "[[B]]")

    with serving(fan) as server:
        numbers = chat.run(eval_context(root, tmp_path, models, **judged(server)))
    own = numbers["models"][STUDENT]["mt_bench"]
    assert own["win_rate"]["value"] == 1.0 and 0.4 < own["win_rate"]["low"] < 1.0  # three questions are no certainty
    assert own["above_teacher"]["rating"]["value"] == 6.0
    replies = SINGLES + 2 * PAIRS
    assert numbers["judge"]["cost"] == pytest.approx(replies * (PROMPT_TOKENS * 2 + COMPLETION_TOKENS * 10) / 1e6)


@pytest.mark.parametrize("nonsense", ["I like turtles", (400, "filtered")])
def test_what_cannot_be_read_is_counted(
    nonsense: Reply, tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]
) -> None:
    def script(request: Request, number: int) -> Reply:
        return nonsense if "{ice}" in request["messages"][-1]["content"] else good(request, number)

    alone = CHAT.model_copy(update={"judge_parallel": 1})  # the first question is answered before one is refused
    with serving(script) as server:
        numbers = alone.run(eval_context(root, tmp_path, models, **judged(server)))
        first = len(server.requests)
        again = alone.run(eval_context(root, tmp_path, models, **judged(server)))
    own = numbers["models"][STUDENT]["mt_bench"]
    assert own["unrated"] == 2 + 2  # two turns, alone and in pairs
    assert own["means"]["rating"]["value"] == pytest.approx((8 + 6.5) / 2)  # never the -1 of the file
    single = read_lines(tmp_path / f"{JUDGMENTS}_single.jsonl")
    assert {row["score"] for row in single if row["question_id"] == 11} == {-1}
    assert again == numbers and len(server.requests) == first == SINGLES + 2 * PAIRS


def test_a_judge_that_dies_is_resumed(
    tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(good) as server:
        whole = CHAT.run(eval_context(root, tmp_path / "whole", models, **judged(server)))

    def dies(request: Request, number: int) -> Reply:
        return good(request, number) if number < 15 else (503, "gone")

    out, slow = tmp_path / "out", CHAT.model_copy(update={"judge_parallel": 1})
    monkeypatch.setattr(judge_module, "RETRIES", 1)
    with serving(dies) as server, pytest.raises(InputError, match="15 replies are kept"):
        slow.run(eval_context(root, out, models, **judged(server)))
    before = server.prompts()[:15]
    replies = out / "chat" / f"judge-{file_name('j/udge')}.jsonl"
    assert len(read_lines(replies)) == 15
    replies.write_bytes(replies.read_bytes()[:-9])  # a kill while the last line was written
    with serving(good) as server:
        assert CHAT.run(eval_context(root, out, models, **judged(server))) == whole
    assert len(server.requests) == SINGLES + 2 * PAIRS - 14
    assert len(set(before) | set(server.prompts())) == SINGLES + 2 * PAIRS
    assert len(read_lines(out / f"{JUDGMENTS}_pair.jsonl")) == PAIRS


def test_judgments_of_other_answers_leave_the_file(
    tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]
) -> None:
    path = tmp_path / f"{JUDGMENTS}_single.jsonl"
    with serving(good) as server:
        CHAT.run(eval_context(root, tmp_path, models, **judged(server)))
        first = len(server.requests)
        old = {(row["model"], row["question_id"], row["turn"]): row["user_prompt"] for row in read_lines(path)}
        CHAT.run(eval_context(root, tmp_path, models, **judged(server, seed=3)))
    rows = read_lines(path)
    assert len(rows) == SINGLES and 0 < len(server.requests) - first < SINGLES + 2 * PAIRS
    changed = [row for row in rows if row["user_prompt"] != old[row["model"], row["question_id"], row["turn"]]]
    assert {row["question_id"] for row in changed} == {7, 11}  # sampled; maths is greedy and stays


def test_alpaca_is_judged_against_the_reference(tmp_path: Path, models: tuple[EvalModel, EvalModel]) -> None:
    root = alpaca_root(tmp_path / "data")

    def prefers_the_reference(request: Request, number: int) -> Reply:
        content = request["messages"][1]["content"]
        assert request["messages"][0] == {"role": "system", "content": "Choose."} and request["max_tokens"] == 16
        if '"i": "Name a {number}."' in content:
            return "both"
        return ' "m".' if any(f'"m": "{row["output"]}"' in content for row in ALPACA) else "M"

    with serving(prefers_the_reference) as server:
        numbers = Chat(max_new_tokens=4).run(eval_context(root, tmp_path / "out", models, **judged(server)))
    assert len(server.requests) == 2 * 3
    for name in ("teacher", STUDENT):
        own = numbers["models"][name]["alpaca_eval"]
        assert (own["against"], own["win_rate"]["value"], own["win_rate"]["n"], own["unrated"]) == ("old", 0, 2, 1)
        path = tmp_path / "out" / "alpaca_eval" / file_name(name) / file_name("j/udge") / "annotations.json"
        rows = json.loads(path.read_text("utf-8"))
        assert [row["preference"] for row in rows] == [1.0, None, 1.0]
        assert [(row["output_1"], row["generator_1"]) for row in rows] == [(row["output"], "old") for row in ALPACA]
        assert {row["generator_2"] for row in rows} == {name}
        assert set(rows[0]) == {
            "instruction", "output_1", "generator_1", "dataset", "output_2", "generator_2", "annotator", "preference",
            "raw_completion",
        }  # fmt: skip


def test_both_orders_of_alpaca_are_read() -> None:
    prompt = [{"role": "user", "content": "{output_1}>{output_2}"}]
    question = Question(id="i", category="d", turns=("i",), reference=("base",), generator="b")
    with serving(lambda request, number: "m") as server:  # always the one shown first
        judge = Judge(server.url, "m", Journal(None))
        values = [judge_module.judge_alpaca(judge, prompt, question, "o", "own", seed).value for seed in range(40)]
    assert server.prompts() == (["base>own", "own>base"] if values[0] == 0.0 else ["own>base", "base>own"])
    assert 8 < sum(value or 0.0 for value in values) < 32 and set(values) == {0.0, 1.0}


def test_all_official_prompts_are_filled(shared_dir: Path) -> None:
    chat = shared_dir / "data" / "eval" / "chat"
    questions, prompts = data.read_questions(chat, None)["mt_bench"], data.mt_bench_prompts(chat)
    texts = {name: {q.id: [f"{name}1 {{}}", f"{name}2"] for q in questions} for name in ("TTT", "SSS")}
    used = set()
    with serving(lambda request, number: "[[7]]") as server:
        judge = Judge(server.url, "m", Journal(None))
        tasks = judge_module.judge_tasks(judge, chat, questions, texts, "TTT", 0)
        assert len(tasks) == 320 + 160
        for task in [*tasks[:160], *tasks[320:]]:
            judgment = task()
            used.add(judgment.row[1]["judge"][1])  # type: ignore[index]
            names = [name for name in (judgment.model, judgment.against) if name]
            shown = [request["messages"][-1]["content"] for request in server.requests[-len(names) :]]
            for order, text in zip((names, names[::-1]), shown, strict=False):
                places = [text.index(f"{name}{turn}") for name in order for turn in range(1, judgment.turn + 1)]
                assert places == sorted(places) and judgment.question.turns[judgment.turn - 1] in text
                assert all(answer in text for answer in judgment.question.reference[: judgment.turn])
    assert used == set(prompts)


def test_an_incomplete_prompt(tmp_path: Path, models: tuple[EvalModel, EvalModel]) -> None:
    root = alpaca_root(tmp_path / "data")
    (root / "chat" / "alpaca_eval" / "prompt.txt").write_text("<|im_start|>user\n{instruction} {output_1}", "utf-8")
    ctx = eval_context(root, None, models, judge_url="http://127.0.0.1:1", judge_model="j")
    with pytest.raises(InputError, match=r"lacks \{output_2\}"):
        Chat().check(ctx)
