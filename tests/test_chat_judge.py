"""Judging, against a stand-in endpoint on this machine: what is asked, tried again, kept, and counted."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_stand_in import (
    ALPACA,
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    QUESTIONS,
    Reply,
    Request,
    StandIn,
    completion,
    data_root,
    eval_context,
    eval_models,
    lines,
    read_lines,
    serving,
)  # fmt: skip

from linearize.errors import InputError
from linearize.evaluation.chat import alpaca, data, mt_bench
from linearize.evaluation.chat import answers as answers_module
from linearize.evaluation.chat.answering import Turn
from linearize.evaluation.chat.answers import Answers
from linearize.evaluation.chat.journal import Journal, file_name
from linearize.evaluation.chat.judge import Judge, JudgeConfig, Usage
from linearize.evaluation.context import EvalModel
from linearize.evaluation.sections.chat import Chat
from linearize.evaluation.sections.chat.measure import NO_PROMPT

STUDENT = "org/student"
CHAT_ONLY = Chat(max_new_tokens=5, benchmarks=("mt_bench",), judge_wait=0.0, judge_parallel=3)
SINGLES, PAIRS = 2 * 2 * 3, 2 * 3  # models x turns x questions; a pair is asked twice


@pytest.fixture(scope="module")
def models() -> tuple[EvalModel, EvalModel]:
    return eval_models()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return data_root(tmp_path / "data")


@pytest.fixture(autouse=True)
def no_other_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Connections to anywhere but this machine fail, and leave a trace."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    gone: list[Any] = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] != "127.0.0.1":
            gone.append(address)
            raise OSError("elsewhere")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    yield gone
    assert not gone


def good(request: Request, number: int) -> Reply:
    """Ratings 8 for maths (which show a reference), else 6; the pair's first assistant wins, but for maths a tie."""
    prompt = request["messages"][-1]["content"]
    if request["messages"][0]["content"] == "single judge":
        return "Fine. Rating: [[8]]" if "|R:" in prompt else "Rating: [[6.5]] and not [[1]]"
    return "[[C]]" if "|R:" in prompt else "A is better: [[A]]"


def judged(server: StandIn, **changes: Any) -> dict[str, Any]:
    return {"judge_url": server.url, "judge_model": "j/udge", **changes}


def judge_of(server: StandIn, journal: Journal | None = None, **changes: Any) -> tuple[Judge, list[float]]:
    waits: list[float] = []
    config = JudgeConfig(url=server.url, model="m", **changes)
    return Judge(config, journal or Journal(None), sleep=waits.append), waits


def ask(judge: Judge, text: str = "hello", label: str = "x") -> tuple[float | None, str]:
    return judge.ask(label, [{"role": "user", "content": text}], mt_bench.rating, max_tokens=9)


@pytest.mark.parametrize(
    ("reply", "found"),
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
def test_ratings_are_read_as_officially(reply: str, found: float | None) -> None:
    assert mt_bench.rating(reply) == found


def test_verdicts_are_read_as_officially() -> None:
    replies = {"so [[A]]": "A", "[[B]]": "B", "[[C]]": "tie", "A": None, "[[B]] no, [[A]]": "A"}
    assert {reply: mt_bench.winner(reply) for reply in replies} == replies


def test_what_is_asked(tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    with serving(good) as server:
        CHAT_ONLY.run(eval_context(root, tmp_path, models, **judged(server)))
    assert len(server.requests) == SINGLES + 2 * PAIRS and set(server.paths) == {"/v1/chat/completions"}
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
    assert Counter(server.prompts()) == expected


def test_official_judgments(tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    with serving(good) as server:
        numbers = CHAT_ONLY.run(eval_context(root, tmp_path, models, **judged(server)))
    folder = tmp_path / "mt_bench" / "model_judgment"
    single = read_lines(folder / f"{file_name('j/udge')}_single.jsonl")
    fields = ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert len(single) == SINGLES and all(list(row) == fields for row in single)
    names = {(row["question_id"], row["turn"]): row["judge"] for row in single if row["model"] == STUDENT}
    assert names[7, 1] == ["j/udge", "single-v1"] and names[7, 2] == ["j/udge", "single-v1-multi-turn"]
    assert names[8, 1] == ["j/udge", "single-math-v1"] and names[8, 2] == ["j/udge", "single-math-v1-multi-turn"]
    assert {row["score"] for row in single if row["question_id"] == 8} == {8.0}
    pair = read_lines(folder / f"{file_name('j/udge')}_pair.jsonl")
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
    assert own["scores"]["overall"] == {"mean": 7.0, "error": pytest.approx(0.5), "count": 6}
    assert own["scores"]["categories"]["math"]["mean"] == 8 and own["scores"]["turn_1"]["count"] == 3
    assert own["score_difference"]["mean"] == 0
    assert [own["against_teacher"][k] for k in ("wins", "ties", "losses", "unrated")] == [0, 6, 0, 0]
    replies = SINGLES + 2 * PAIRS
    assert numbers["judge"]["requests"] == replies and numbers["judge"]["cost"] is None
    assert numbers["judge"]["prompt_tokens"] == replies * PROMPT_TOKENS
    shown = Chat.present(json.loads(json.dumps(numbers)))
    assert shown.plots[0].name == "chat_ratings"
    assert [table.title for table in shown.tables][:2] == [
        "MT-Bench ratings, 1 to 10", "MT-Bench, each answer beside the teacher's",
    ]  # fmt: skip
    assert [stat.label for stat in Chat.headline(numbers)[STUDENT]] == ["MT-Bench rating", "MT-Bench wins"]


def test_a_better_student_wins(
    tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that prefers the student's answers in either place."""
    chat = Chat(**{**CHAT_ONLY.model_dump(), "price_in": 2.0, "price_out": 10.0})

    def written(model: Any, tokenizer: Any, asks: Any, max_new_tokens: int) -> list[list[Turn]]:
        name = "mine" if model is models[1].model else "theirs"
        return [[Turn(text=f"{name} {i}", tokens=2, ended=True, cut=0) for i in range(2)] for _ in asks]

    monkeypatch.setattr(answers_module, "hold", written)

    def fan(request: Request, number: int) -> Reply:
        own = "|A:mine" in request["messages"][-1]["content"]
        single = request["messages"][0]["content"] == "single judge"
        return ("[[9]]" if own else "[[3]]") if single else ("[[A]]" if own else "[[B]]")

    with serving(fan) as server:
        numbers = chat.run(eval_context(root, tmp_path, models, **judged(server)))
    own = numbers["models"][STUDENT]["mt_bench"]
    assert own["against_teacher"]["wins"] == 6 and own["against_teacher"]["win_rate"]["value"] == 1.0
    assert 0.4 < own["against_teacher"]["win_rate"]["low"] < 1.0  # three questions are no certainty
    assert own["score_difference"]["mean"] == 6.0
    replies = SINGLES + 2 * PAIRS
    assert numbers["judge"]["cost"] == pytest.approx(replies * (PROMPT_TOKENS * 2 + COMPLETION_TOKENS * 10) / 1e6)


def test_nonsense_is_asked_again_and_counted(tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    def nonsense(request: Request, number: int) -> Reply:
        return "I like turtles" if "fox" in request["messages"][-1]["content"] else good(request, number)

    with serving(nonsense) as server:
        numbers = CHAT_ONLY.run(eval_context(root, tmp_path, models, **judged(server)))
        asked = Counter(server.prompts())
        first = len(server.requests)
        again = CHAT_ONLY.run(eval_context(root, tmp_path, models, **judged(server)))
    assert set(asked.values()) == {1, 3} and {n for text, n in asked.items() if "fox" in text} == {3}
    scores = numbers["models"][STUDENT]["mt_bench"]["scores"]
    assert scores["unrated"] == 2 and scores["overall"]["count"] == 4
    assert scores["overall"]["mean"] == pytest.approx((8 + 6.5) / 2)  # never the -1 of the file
    assert numbers["models"][STUDENT]["mt_bench"]["against_teacher"]["unrated"] == 2
    single = read_lines(tmp_path / "mt_bench" / "model_judgment" / f"{file_name('j/udge')}_single.jsonl")
    assert {row["score"] for row in single if row["question_id"] == 7} == {-1}
    assert again == numbers and len(server.requests) == first
    assert any("no rating to 2 of 6" in finding.text for finding in Chat.present(numbers).findings)


def test_a_judge_that_dies_is_resumed(tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    with serving(good) as server:
        whole = CHAT_ONLY.run(eval_context(root, tmp_path / "whole", models, **judged(server)))

    def dies(request: Request, number: int) -> Reply:
        return good(request, number) if number < 15 else (503, "gone\nhome")

    out = tmp_path / "out"
    slow = CHAT_ONLY.model_copy(update={"judge_tries": 2, "judge_parallel": 1})
    with (
        serving(dies) as server,
        pytest.raises(InputError, match=r"stopped answering \(HTTP 503: gone home, 2") as told,
    ):
        slow.run(eval_context(root, out, models, **judged(server)))
    assert "15 replies are kept" in str(told.value) and "\n" not in str(told.value)
    assert len(server.requests) == 17
    before = server.prompts()[:15]
    pairs = out / "mt_bench" / "model_judgment" / f"{file_name('j/udge')}_pair.jsonl"
    assert len(read_lines(pairs)) == 1  # 12 ratings, a pair, and half of the next, whose reply is kept too
    with serving(good) as server:
        numbers = CHAT_ONLY.run(eval_context(root, out, models, **judged(server)))
    assert numbers == whole
    assert len(server.requests) == SINGLES + 2 * PAIRS - 15
    asked = Counter(before) + Counter(server.prompts())
    assert sum(asked.values()) == SINGLES + 2 * PAIRS and len(read_lines(pairs)) == PAIRS
    assert not any(
        row["judgment"].startswith("$ERROR")
        for row in read_lines(pairs.with_name(pairs.name.replace("pair", "single")))
    )


def test_a_truncated_judgment_file(tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]) -> None:
    with serving(good) as server:
        whole = CHAT_ONLY.run(eval_context(root, tmp_path, models, **judged(server)))
        first = len(server.requests)
        replies = tmp_path / "chat" / f"judge-{file_name('j/udge')}.jsonl"
        single = tmp_path / "mt_bench" / "model_judgment" / f"{file_name('j/udge')}_single.jsonl"
        for path in (replies, single):
            path.write_bytes(path.read_bytes()[:-9])
        assert CHAT_ONLY.run(eval_context(root, tmp_path, models, **judged(server))) == whole
    assert len(server.requests) == first + 1 and len(read_lines(single)) == SINGLES


def test_judgments_of_other_answers_leave_the_file(
    tmp_path: Path, root: Path, models: tuple[EvalModel, EvalModel]
) -> None:
    single = tmp_path / "mt_bench" / "model_judgment" / f"{file_name('j/udge')}_single.jsonl"
    with serving(good) as server:
        CHAT_ONLY.run(eval_context(root, tmp_path, models, **judged(server)))
        first = len(server.requests)
        old = {(row["model"], row["question_id"], row["turn"]): row["user_prompt"] for row in read_lines(single)}
        CHAT_ONLY.run(eval_context(root, tmp_path, models, **judged(server, seed=3)))
    rows = read_lines(single)
    assert len(rows) == SINGLES and 0 < len(server.requests) - first < SINGLES + 2 * PAIRS
    changed = [row for row in rows if row["user_prompt"] != old[row["model"], row["question_id"], row["turn"]]]
    assert {row["question_id"] for row in changed} == {7, 11}  # sampled; maths is greedy and stays


def test_it_waits_and_tries_again() -> None:
    replies: list[Reply] = [(429, "slow down"), (500, ""), (200, "no json"), (200, "{}"), "[[4]]"]
    with serving(lambda request, number: replies[number]) as server:
        judge, waits = judge_of(server, wait=0.5)
        assert ask(judge) == (4.0, "[[4]]")
    assert waits == [3.0, 1.0, 2.0, 4.0]  # the 429 says how long; then doubled each time
    assert judge.usage == Usage(requests=1, prompt_tokens=PROMPT_TOKENS, completion_tokens=COMPLETION_TOKENS)


def test_a_silent_judge_times_out() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        config = JudgeConfig(url=f"http://127.0.0.1:{silent.getsockname()[1]}", model="m", tries=2, timeout=0.1)
        with pytest.raises(InputError, match=r"stopped answering .*timed out, 2 tries"):
            ask(Judge(config, Journal(None), sleep=lambda seconds: None))


def test_a_judge_that_is_not_there() -> None:
    with serving(good) as server:
        judge, waits = judge_of(server, tries=3)
    with pytest.raises(InputError, match="stopped answering"):
        ask(judge)
    assert len(waits) == 2


def test_faults_that_stay_are_told_at_once() -> None:
    for status, hint in ((401, "OPENAI_API_KEY"), (404, "--judge-model"), (400, "--judge-model")):
        with serving(lambda request, number, status=status: (status, "no")) as server:  # type: ignore[misc]
            judge, waits = judge_of(server)
            with pytest.raises(InputError, match=f"HTTP {status}: no.*{hint}"):
                ask(judge)
        assert not waits and len(server.requests) == 1


def test_a_single_prompt_that_is_refused_is_unrated(tmp_path: Path) -> None:
    with serving(lambda request, number: "[[4]]" if number == 0 else (400, "too long")) as server:
        judge, waits = judge_of(server, Journal(tmp_path / "j"))
        ask(judge)
        found, reply = ask(judge, "long")
        assert found is None and reply.startswith("$ERROR$") and "too long" in reply and len(server.requests) == 2
        assert ask(judge_of(server, Journal(tmp_path / "j"))[0], "long")[0] is None
    assert len(server.requests) == 2 and not waits


def test_no_redirect_is_followed_and_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(good) as other, serving(lambda request, number: (302, other.url)) as server:
        with pytest.raises(InputError, match="HTTP 302"):
            ask(judge_of(server)[0])
        assert server.headers[0]["Authorization"] == "Bearer secret"
    assert not other.requests
    monkeypatch.delenv("OPENAI_API_KEY")
    with serving(lambda request, number: "[[1]]") as server:
        ask(judge_of(server)[0])
        assert "Authorization" not in server.headers[0]


def test_tokens_that_are_not_told_make_the_cost_unknown() -> None:
    bare = json.dumps({"choices": [{"message": {"content": "[[2]]"}}]})
    with serving(lambda request, number: (200, bare) if number else completion("[[3]]") and "[[3]]") as server:
        judge, _ = judge_of(server)
        ask(judge, label="a")
        assert judge.usage.cost(1.0, 1.0) == (PROMPT_TOKENS + COMPLETION_TOKENS) / 1e6
        assert judge.usage.cost(None, 1.0) is None
        ask(judge, label="b")
    assert judge.usage.unreported == 1 and judge.usage.cost(1.0, 1.0) is None


def test_alpaca_is_judged_against_the_reference(tmp_path: Path, models: tuple[EvalModel, EvalModel]) -> None:
    root = data_root(tmp_path / "data", alpaca=True)
    section = Chat(max_new_tokens=4, benchmarks=("alpaca_eval",), judge_wait=0.0)

    def prefers_the_reference(request: Request, number: int) -> Reply:
        shown = json.loads(request["messages"][1]["content"].rpartition(" {")[0], strict=False)
        assert request["messages"][0] == {"role": "system", "content": "Choose."}
        if shown["i"] == "Name a {number}.":
            return "both"
        return ' "m".' if shown["m"] in [row["output"] for row in ALPACA] else "M"

    with serving(prefers_the_reference) as server:
        numbers = section.run(eval_context(root, tmp_path / "out", models, **judged(server)))
    assert len(server.requests) == 2 * (1 + 1 + 3)  # nonsense three times
    for name in ("teacher", STUDENT):
        found = numbers["models"][name]["alpaca_eval"]["judged"]
        assert (found["against"], found["win_rate"]["value"], found["win_rate"]["n"], found["unrated"]) == (
            "old",
            0,
            2,
            1,
        )
        path = tmp_path / "out" / "alpaca_eval" / file_name(name) / file_name("j/udge") / "annotations.json"
        rows = json.loads(path.read_text("utf-8"))
        assert [row["preference"] for row in rows] == [1.0, None, 1.0]
        assert [(row["output_1"], row["generator_1"]) for row in rows] == [(row["output"], "old") for row in ALPACA]
        assert {row["generator_2"] for row in rows} == {name}
        assert set(rows[0]) == {
            "instruction", "output_1", "generator_1", "dataset", "output_2", "generator_2", "annotator", "preference",
            "raw_completion",
        }  # fmt: skip
    assert Chat.present(numbers).tables[0].title == "AlpacaEval win rate"


def test_both_orders_of_alpaca_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    instruction, prompt = (
        data.Instruction(text="i", dataset="d"),
        [{"role": "user", "content": "{output_1}>{output_2}"}],
    )
    with serving(lambda request, number: "m") as server:  # always the one shown first
        judge, _ = judge_of(server)
        for turned, preference in ((False, 1.0), (True, 2.0)):
            monkeypatch.setattr(alpaca, "swapped", lambda seed, text, turned=turned: turned)
            row = alpaca.annotate(instruction, ("base", "own"), ("b", "o"), judge, prompt, 0)
            assert row["preference"] == preference
    assert server.prompts() == ["base>own", "own>base"]
    monkeypatch.undo()
    assert 20 < sum(alpaca.swapped(0, str(i)) for i in range(80)) < 60


def test_without_a_reference_alpaca_is_judged_against_the_teacher() -> None:
    records = [{"question": text, "turns": [{"text": text.upper()}]} for text in ("a", "b")]
    teacher = Answers(eval_model="teacher", records=records)
    plain = [data.Instruction(text=text, dataset="d") for text in ("a", "b")]
    assert alpaca.baseline(plain, teacher) == ("teacher", {"a": "A", "b": "B"})
    assert alpaca.baseline(plain, None) is None
    half = [data.Instruction(text="a", dataset="d", output="x", generator="old"), plain[1]]
    assert alpaca.baseline(half, teacher) == ("teacher", {"a": "A", "b": "B"})


def test_without_the_official_prompt_alpaca_is_not_judged(tmp_path: Path, models: tuple[EvalModel, EvalModel]) -> None:
    root = data_root(tmp_path / "data", alpaca=True)
    (root / "chat" / "alpaca_eval" / "prompt.txt").unlink()
    section = Chat(max_new_tokens=3, benchmarks=("alpaca_eval",))
    with serving(good) as server:
        numbers = section.run(eval_context(root, None, models, **judged(server)))
    assert not server.requests and numbers["notes"] == [NO_PROMPT]


def test_all_official_prompts_are_filled(shared_dir: Path) -> None:
    root = shared_dir / "data" / "eval"
    questions, prompts = data.mt_bench_questions(root, None), data.judge_prompts(root)
    answers = [
        Answers(
            eval_model=name,
            records=[{"question": q.id, "turns": [{"text": f"{name}1 {{}}"}, {"text": f"{name}2"}]} for q in questions],
        )
        for name in ("TTT", "SSS")
    ]
    used = set()
    for pairs, number in ((False, 320), (True, 160)):
        found = list(mt_bench.matches(questions, answers, pairs=pairs))
        assert len(found) == number
        for match in found:
            used.add(match.prompt_name)
            template = prompts[match.prompt_name]["prompt_template"]
            for names, turned in ((match.models, False), (match.models[::-1], True)):
                text = match.user_prompt(template, swapped=turned)
                places = [text.index(f"{name}{turn}") for name in names for turn in range(1, match.turn + 1)]
                assert places == sorted(places) and match.question.turns[match.turn - 1] in text
                assert not match.question.needs_reference or match.question.reference[match.turn - 1] in text
    assert used == set(data.PROMPTS)


def test_broken_data_files(tmp_path: Path, root: Path) -> None:
    prompts = root / "chat" / "judge_prompts.jsonl"
    lines(prompts, read_lines(prompts)[:-1])
    with pytest.raises(InputError, match="lacks the prompts pair-math-v1-multi-turn"):
        data.judge_prompts(root)
    (root / "chat" / "alpaca_eval" / "prompt.txt").write_text("{instruction} {output_1}", "utf-8")
    with pytest.raises(InputError, match=r"lacks \{output_2\}"):
        data.alpaca_prompt(root)
