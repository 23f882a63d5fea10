"""Requests that are wrong, too large, too many or given up: an error in OpenAI's form, and a server that goes on."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from serve_cases import NAME, run, served, student, tokenizer

from linearize.serving.fair_queue import FairQueue
from linearize.serving.jobs import Delta, EventStream, Job
from linearize.serving.server import ServeOptions, build_app
from linearize.serving.text_stream import TextStream


@pytest.fixture(scope="module")
def model() -> Any:
    return student()


CHAT = {"messages": [{"role": "user", "content": "x"}]}
WRONG: dict[str, tuple[str, dict[str, Any], int, str | None]] = {
    "unknown field": ("completions", {"prompt": "x", "frobnicate": 1}, 400, "unknown_parameter"),
    "no prompt": ("completions", {}, 400, "invalid_value"),
    "no messages": ("chat/completions", {"messages": []}, 400, "invalid_value"),
    "no object": ("completions", {"prompt": {"a": 1}}, 400, "invalid_value"),
    "role": ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_value"),
    "image": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        400,
        "invalid_value",
    ),
    "temperature": ("completions", {"prompt": "x", "temperature": -0.1}, 400, "invalid_value"),
    "top_p": ("completions", {"prompt": "x", "top_p": 0}, 400, "invalid_value"),
    "penalty": ("completions", {"prompt": "x", "frequency_penalty": 0.5}, 400, "invalid_value"),
    "format": ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400, "invalid_value"),
    "tool": ("chat/completions", {**CHAT, "tool_choice": "required"}, 400, "invalid_value"),
    "stop": ("completions", {"prompt": "x", "stop": ""}, 400, "invalid_value"),
    "many logprobs": ("completions", {"prompt": "x", "logprobs": 21}, 400, "invalid_value"),
    "n": ("completions", {"prompt": "x", "n": 4}, 400, None),
    "token": ("completions", {"prompt": [3, 258]}, 400, None),
    "negative token": ("completions", {"prompt": [3, -1]}, 400, "invalid_value"),
    "no prompts": ("completions", {"prompt": []}, 400, None),
    "model": ("completions", {"prompt": "x", "model": "gpt-9"}, 404, "model_not_found"),
    "long prompt": ("completions", {"prompt": "x" * 101}, 400, "context_length_exceeded"),
    "long answer": ("completions", {"prompt": "x" * 50, "max_tokens": 51}, 400, "context_length_exceeded"),
    "long chat": ("chat/completions", {"messages": [{"role": "user", "content": "x" * 90}]}, 400,
                  "context_length_exceeded"),
    "answer": ("completions", {"prompt": "x", "max_tokens": 81}, 400, None),
}  # fmt: skip


def test_wrong_requests_are_errors_that_say_what_is_wrong(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        async with served(model, context=100, new_tokens=80) as server:
            for name, (path, body, status, code) in WRONG.items():
                response = await server.post(path, **body)
                error = response.json()["error"]
                assert (response.status_code, error["code"]) == (status, code), (name, response.text)
                assert error["type"] == "invalid_request_error" and error["message"], name
            assert (await server.complete("x" * 50, max_tokens=50))["usage"]["total_tokens"] == 100
            assert (await server.complete("x" * 97))["usage"]["completion_tokens"] == 3  # by default, what fits
            chat = await server.chat("x", max_completion_tokens=3)
            assert chat["usage"]["completion_tokens"] == 3

    run(work)
    assert capsys.readouterr().err == ""  # nothing of a request is printed


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"", 400), (b"[1]", 400), (b'{"prompt": "\\ud800"}', 400), (b'{"prompt": "x", "seed": NaN}', 400),
     (b"[" * 1_900, 400), (b"\xff\xfe", 400), (b'{"prompt": "' + b"x" * 3000 + b'"}', 413)],
)  # fmt: skip
def test_bodies_that_are_no_request(model: Any, content: bytes, status: int) -> None:
    async def work() -> None:
        async with served(model, max_body=2000) as server:
            headers = {"Content-Type": "application/json"}
            response = await server.client.post("/v1/completions", content=content, headers=headers)
            assert response.status_code == status and set(response.json()["error"]) == {
                "message", "type", "param", "code",
            }  # fmt: skip
            plain = await server.client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
            missing = await server.client.get("/v1/nothing")
            method = await server.client.get("/v1/completions")
        assert (plain.status_code, missing.status_code, method.status_code) == (415, 404, 405)
        assert missing.json()["error"]["message"] and method.json()["error"]["message"]

    run(work)


def test_the_key_guards_the_api_and_not_its_health(model: Any) -> None:
    async def work() -> None:
        async with served(model, key="s3cret") as server:
            for value in (None, "Bearer", "Bearer wrong", "Bearer s3cre", "Basic s3cret", "s3cret", "Bearer s3cret2"):
                headers = {} if value is None else {"Authorization": value}
                response = await server.client.get("/v1/models", headers=headers)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key", value
                post = await server.client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
                assert post.status_code == 401
            right = {"Authorization": "Bearer s3cret"}
            assert (await server.client.get("/v1/models", headers=right)).status_code == 200
            assert (await server.client.get("/health")).status_code == 200

    run(work)


def test_more_than_the_queue_holds_is_refused_at_once(model: Any) -> None:
    async def work() -> None:
        async with served(model, slots=1, queue=2) as server:
            running = [asyncio.create_task(server.post("completions", prompt="x", max_tokens=400))]
            while not await server.metric("running_answers"):
                await asyncio.sleep(0.01)
            running += [asyncio.create_task(server.post("completions", prompt="x", max_tokens=2)) for _ in range(2)]
            while await server.metric("waiting_requests") < 2:
                await asyncio.sleep(0.01)
            refused = await server.post("completions", prompt="x")
            assert [response.status_code for response in await asyncio.gather(*running)] == [200] * 3
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"

    run(work)


def test_a_server_that_stops_ends_what_waits_and_finishes_what_runs(model: Any) -> None:
    async def work() -> None:
        async with served(model, slots=1) as server:
            running = asyncio.create_task(server.post("completions", prompt="x", max_tokens=200))
            while not await server.metric("running_answers"):
                await asyncio.sleep(0.01)
            waiting = asyncio.create_task(server.post("completions", prompt="x", max_tokens=2))
            while not await server.metric("waiting_requests"):
                await asyncio.sleep(0.01)
            server.app.service.engine.refuse()
            late = await server.post("completions", prompt="x")
            assert [response.status_code for response in (await waiting, late, await running)] == [503, 503, 200]
            assert (await server.client.get("/health")).status_code == 503

    run(work)


def test_a_request_that_takes_too_long_is_ended(model: Any) -> None:
    async def work() -> None:
        async with served(model, timeout=0.3) as server:
            late = await server.post("completions", prompt="x", max_tokens=4000)
            events = await server.events("completions", prompt="x", max_tokens=4000)
            fine = await server.complete("x", max_tokens=2)
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        assert len(events) > 2 and events[-1]["error"]["code"] == "timeout"
        assert fine["choices"][0]["finish_reason"] == "length"

    run(work)


def test_logits_that_are_not_finite_fail_their_request_alone() -> None:
    model = student()
    with torch.no_grad():
        model.lm.lm_head.weight[5] = torch.nan

    async def work() -> None:
        async with served(model) as server:
            for options in ({"temperature": 0}, {"temperature": 1}):
                response = await server.post("completions", prompt="x", max_tokens=4, **options)
                assert response.status_code == 500 and "not finite" in response.json()["error"]["message"]
            assert (await server.client.get("/health")).status_code == 200

    run(work)


def test_a_step_that_fails_ends_its_answers_and_the_next_ones_run(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from linearize.modeling.static.rows import StaticRows

    read, calls = StaticRows.read, iter([True, True, True, False])

    def sometimes(self: Any, tokens: Any) -> Any:
        if not next(calls, True):
            raise RuntimeError("out of memory, or so")
        return read(self, tokens)

    monkeypatch.setattr(StaticRows, "read", sometimes)

    async def work() -> None:
        async with served(model) as server:
            failed = await server.post("completions", prompt="x", max_tokens=9)
            fine = await server.complete("x", max_tokens=9)
        assert failed.status_code == 500 and fine["usage"]["completion_tokens"] == 9

    run(work)
    assert "out of memory" in capsys.readouterr().err


@contextmanager
def listening(model: Any, **options: Any) -> Iterator[str]:
    """A real server at a free port, in a thread."""
    app, _ = build_app(model, tokenizer(), [NAME], ServeOptions(**{"state_disk": 0, "slots": 2, **options}))
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what a client does not read stays in the server
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def metric(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"linearize_{name}"))


def wait_for(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row(model: Any, stream: bool) -> None:
    body = {"prompt": "x", "max_tokens": 4000, "stream": stream}
    with listening(model) as url:
        if stream:
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
                lines = response.iter_lines()  # to be held: it closes the response when it is gone
                next(lines)
                wait_for(lambda: metric(url, "running_answers") == 1)
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body, timeout=0.5)
        wait_for(lambda: metric(url, "running_answers") == 0)
        assert metric(url, 'cancelled_requests_total{reason="disconnected"}') == 1
        assert metric(url, "generated_tokens_total") < 3900


def test_a_client_that_does_not_read_is_given_up_and_others_go_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.serving.streams.MOST_EVENTS", 20)
    body = json.dumps({"prompt": "x", "max_tokens": 4000, "stream": True, "logprobs": 20}).encode()
    with listening(model) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            headers = ["Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}", "", ""]
            slow.sendall("\r\n".join(["POST /v1/completions HTTP/1.1", *headers]).encode() + body)
            wait_for(lambda: metric(url, "running_answers") == 1)
            other = httpx.post(f"{url}/v1/completions", json={"prompt": "y", "max_tokens": 20}, timeout=30)
            assert other.status_code == 200 and other.json()["usage"]["completion_tokens"] == 20
            wait_for(lambda: metric(url, "running_answers") == 0, 60)
            assert metric(url, 'cancelled_requests_total{reason="slow reader"}') == 1


def test_an_event_stream_holds_so_many_and_always_the_error() -> None:
    from linearize.serving.errors import server_error

    woken = []
    stream = EventStream(2, lambda: woken.append(1))
    assert [stream.put(Delta(0, "a")) for _ in range(3)] == [True, True, False]
    assert stream.put(server_error("x")) and len(stream.take()) == 3 and stream.take() == [] and len(woken) == 3


def test_clients_take_turns_in_the_queue() -> None:
    queue, stream = FairQueue(10), EventStream(1, lambda: None)
    jobs = [Job(prompt=[n], max_tokens=1, events=stream, client=client) for n, client in enumerate("aaabac")]
    for job in jobs:
        queue.put(job)
    assert queue.remove({jobs[1]}) == [jobs[1]] and len(queue) == 5
    order = []
    while (job := queue.next()) is not None:
        assert queue.take() is job
        order.append(job.prompt[0])
    assert order == [0, 3, 5, 2, 4] and len(queue) == 0


@pytest.mark.parametrize("stops", [(), ("never",), ("né",), ("\N{GRINNING FACE}",), ("x", "ab")])
def test_text_comes_in_whole_characters_and_ends_before_a_stop(stops: tuple[str, ...]) -> None:
    text = "a né ab \N{GRINNING FACE} é"
    stream, parts = TextStream(tokenizer(), stops, tokenizer()("before ")["input_ids"]), []
    for token in tokenizer()(text)["input_ids"]:
        parts.append(stream.put(token))
        if stream.ended:
            break
    parts.append(stream.end())
    cuts = [text.index(stop) for stop in stops if stop in text]
    assert "".join(parts) == text[: min(cuts, default=None)] and stream.ended == bool(cuts)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)


def test_incomplete_characters_come_at_the_end() -> None:
    tokens = tokenizer()("é")["input_ids"]
    stream = TextStream(tokenizer())
    assert stream.put(tokens[0]) == "" and stream.end() == "\N{REPLACEMENT CHARACTER}"
