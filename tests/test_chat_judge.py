"""The judge's client against a stand-in endpoint on this machine: tried again, kept, counted, refused."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from chat_judge import no_other_address as no_other_address
from chat_stand_in import (
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    Reply,
    StandIn,
    data_root,
    eval_context,
    eval_models,
    serving,
)

from linearize.errors import InputError
from linearize.evaluation.sections.chat import Chat
from linearize.evaluation.sections.chat import judge as judge_module
from linearize.evaluation.sections.chat.judge import FAILED, Judge
from linearize.evaluation.sections.chat.present import judge_numbers
from linearize.storage.journal import Journal

pytest.importorskip("openai")


def judge_of(server: StandIn, path: Path | None = None) -> Judge:
    return Judge(server.url, "m", Journal(path, checksums=False))


def ask(judge: Judge, text: str = "hello") -> str:
    return judge.ask([{"role": "user", "content": text}], 9)


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda request, number: "[[4]]") as server:
        assert ask(judge_of(server)) == "[[4]]"
        ask(Judge(f"{server.url}/chat/completions", "m", Journal(None)))
    assert server.paths == ["/v1/chat/completions"] * 2
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert server.requests[0] == {
        "model": "m", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 9, "n": 1,
    }  # fmt: skip


def test_without_a_key_a_dummy_is_sent() -> None:
    with serving(lambda request, number: "[[1]]") as server:
        ask(judge_of(server))
    assert server.headers[0]["authorization"] == "Bearer none"


def test_it_tries_again() -> None:
    replies: list[Reply] = [(429, "slow down"), (500, ""), (503, "gone"), "[[4]]"]
    with serving(lambda request, number: replies[number]) as server:
        judge = judge_of(server)
        assert ask(judge) == "[[4]]"
    numbers = judge_numbers(judge, 2.0, 10.0)
    assert (numbers.replies, numbers.prompt_tokens, numbers.completion_tokens) == (1, PROMPT_TOKENS, COMPLETION_TOKENS)
    assert numbers.cost == pytest.approx((PROMPT_TOKENS * 2 + COMPLETION_TOKENS * 10) / 1e6)


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    with serving(lambda request, number: f"[[{number}]]") as server:
        first = judge_of(server, tmp_path / "j")
        assert [ask(first, "a"), ask(first, "b"), ask(first, "a")] == ["[[0]]", "[[1]]", "[[0]]"]
        second = judge_of(server, tmp_path / "j")
        assert [ask(second, "b"), ask(second, "c")] == ["[[1]]", "[[2]]"]
    assert len(server.requests) == 3
    assert judge_numbers(second, None, None).replies == 2  # those in use


@pytest.mark.parametrize("status", [429, 500])
def test_a_judge_that_stops_answering(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "RETRIES", 2)
    with serving(lambda request, number: "[[4]]" if number == 0 else (status, "gone\nhome")) as server:
        judge = judge_of(server)
        ask(judge)
        with pytest.raises(InputError, match=f"HTTP {status}: gone home") as error:
            ask(judge, "more")
    assert len(server.requests) == 1 + 3 and "1 replies are kept" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_silent_judge_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "RETRIES", 1)
    monkeypatch.setattr(judge_module, "TIMEOUT", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(InputError, match="timed out"):
            ask(Judge(f"http://127.0.0.1:{silent.getsockname()[1]}", "m", Journal(None)))


def test_a_judge_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "RETRIES", 1)
    with serving(lambda request, number: "[[4]]") as server:
        judge = judge_of(server)
    with pytest.raises(InputError, match="refused"):
        ask(judge)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_faults_that_stay_are_reported_at_once(status: int) -> None:
    refusal = pytest.raises(InputError, match=f"HTTP {status}: no.*--judge-model")
    with serving(lambda request, number: (status, "no")) as server, refusal:
        ask(judge_of(server))
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", ["no json", "{}", '{"choices": []}', '{"choices": [{"message": null}]}'])
def test_a_response_that_is_no_completion(body: str) -> None:
    with serving(lambda request, number: (200, body)) as server, pytest.raises(InputError, match="no chat completion"):
        ask(judge_of(server))


def test_a_single_prompt_that_is_refused_is_kept_as_such(tmp_path: Path) -> None:
    with serving(lambda request, number: "[[4]]" if number == 0 else (400, "too long")) as server:
        judge = judge_of(server, tmp_path / "j")
        ask(judge)
        reply = ask(judge, "long")
        assert reply.startswith(FAILED) and "too long" in reply and len(server.requests) == 2
        assert ask(judge_of(server, tmp_path / "j"), "long") == reply
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [301, 302, 307])
def test_no_redirect_is_followed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(lambda request, number: "[[4]]") as other:
        refusal = pytest.raises(InputError, match=f"HTTP {status}")
        with serving(lambda request, number: (status, other.url)) as server, refusal:
            ask(judge_of(server))
        assert len(server.requests) == 1 and not other.requests


def test_tokens_that_are_not_reported_make_the_cost_unknown() -> None:
    bare = json.dumps({"choices": [{"message": {"content": None}}]})
    with serving(lambda request, number: (200, bare) if number else "[[3]]") as server:
        judge = judge_of(server)
        ask(judge, "a")
        assert judge_numbers(judge, 1.0, 1.0).cost == (PROMPT_TOKENS + COMPLETION_TOKENS) / 1e6
        assert judge_numbers(judge, None, 1.0).cost is None
        assert ask(judge, "b") == ""
    numbers = judge_numbers(judge, 1.0, 1.0)
    assert numbers.cost is None and numbers.prompt_tokens == PROMPT_TOKENS


def test_a_judge_that_cannot_be_asked_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, models = data_root(tmp_path / "data"), eval_models()
    url = "http://127.0.0.1:1"
    Chat().check(eval_context(root, None, models, judge_url=url, judge_model="j"))
    for wrong in ({"judge_url": "file:///etc", "judge_model": "j"}, {"judge_url": url}, {"judge_model": "j"}):
        with pytest.raises(InputError, match="--judge-url"):
            Chat().check(eval_context(root, None, models, **wrong))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find_spec(name))
    with pytest.raises(InputError, match=r"pip install 'linearize\[eval\]'"):
        Chat().check(eval_context(root, None, models, judge_url=url, judge_model="j"))


def test_importing_evaluation_does_not_import_openai() -> None:
    code = "import sys, linearize.evaluation, linearize.evaluation.sections; assert 'openai' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
