"""The embedded server gives the tokens of plain decoding, whatever else it is decoding, in OpenAI's forms."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
import torch
from serve_cases import NAME, continuation, run, served, student, tokenizer

PROMPTS = ["one", "a rather longer prompt, of several pieces of sixteen tokens each", "x", "mid-sized prompt", "two "]


@pytest.fixture(scope="module")
def model() -> Any:
    return student()


def ids(text: str) -> list[int]:
    return list(tokenizer()(text)["input_ids"])


def text_of(model: Any, prompt: str, count: int, **settings: Any) -> str:
    return tokenizer().decode(continuation(model, ids(prompt), count, **settings), skip_special_tokens=True)


KINDS: dict[str, dict[str, Any]] = {
    "lolcats": {}, "hybrid": {"hybrid": True}, "mamba2": {"name": "mamba2"},
    "sinks": {"window_shape": "sliding", "num_sinks": 2},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_generate_whatever_else_is_decoded(kind: str) -> None:
    model = student(**KINDS[kind])

    async def work() -> None:
        async with served(model, slots=3) as server:
            counts = [23, 9, 31, 4, 17]

            async def one(number: int) -> str:
                await asyncio.sleep(0.02 * number)
                got = await server.complete(PROMPTS[number], max_tokens=counts[number], temperature=0)
                return got["choices"][0]["text"]

            texts = await asyncio.gather(*map(one, range(len(PROMPTS))))
            for prompt, count, text in zip(PROMPTS, counts, texts, strict=True):
                assert text == text_of(model, prompt, count), prompt

    run(work)


def test_models_without_static_steps_answer_too() -> None:
    model = student()
    model.keep_heads({0: [0], 2: [1]})

    async def work() -> None:
        async with served(model) as server:
            got = await asyncio.gather(*(server.complete(p, max_tokens=11, temperature=0) for p in PROMPTS))
        for prompt, answer in zip(PROMPTS, got, strict=True):
            assert answer["choices"][0]["text"] == text_of(model, prompt, 11)

    run(work)


def test_sampling_with_a_seed_is_that_of_generate_and_choices_differ(model: Any) -> None:
    settings = {"temperature": 1.3, "top_p": 0.9, "top_k": 40}

    async def work() -> None:
        async with served(model) as server:
            many = server.complete("seeded", max_tokens=14, seed=11, n=3, **settings)
            other = server.complete("something else", max_tokens=30, seed=5)
            got, _ = await asyncio.gather(many, other)
            again = await server.complete("seeded", max_tokens=14, seed=11, n=3, **settings)
            unseeded = [await server.complete("seeded", max_tokens=14, **settings) for _ in range(2)]
        texts = [choice["text"] for choice in got["choices"]]
        assert [choice["index"] for choice in got["choices"]] == [0, 1, 2]
        assert texts == [choice["text"] for choice in again["choices"]] and len(set(texts)) == 3
        for number, text in enumerate(texts):
            assert text == text_of(model, "seeded", 14, do_sample=True, seed=11 + number, **settings)
        assert unseeded[0]["choices"][0]["text"] != unseeded[1]["choices"][0]["text"]
        assert got["usage"]["completion_tokens"] == 42 and got["usage"]["prompt_tokens"] == 6

    run(work)


def test_a_stream_is_the_whole_text_and_ends_with_its_usage(model: Any) -> None:
    async def work() -> None:
        async with served(model) as server:
            options = {"prompt": "stream", "max_tokens": 19, "temperature": 0}
            *events, usage, done = await server.events("completions", **options, stream_options={"include_usage": True})
            chat = await server.events("chat/completions", messages=[{"role": "user", "content": "s"}], max_tokens=5)
        assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 19
        assert len(events) > 3 and events[-1]["choices"][0]["finish_reason"] == "length"
        assert "".join(event["choices"][0]["text"] for event in events) == text_of(model, "stream", 19)
        assert chat[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert {event["object"] for event in chat[:-1]} == {"chat.completion.chunk"} and chat[-1] == "[DONE]"

    run(work)


def test_a_stop_text_ends_the_answer_before_it(model: Any) -> None:
    whole = text_of(model, "stop", 40)
    at = next(i for i in range(6, 30) if whole.index(whole[i : i + 3]) == i and whole[i : i + 3].isprintable())
    stop = whole[at : at + 3]

    async def work() -> None:
        async with served(model) as server:
            options: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "stop": ["not there", stop]}
            got = (await server.complete("stop", **options))["choices"][0]
            events = await server.events("completions", prompt="stop", **options)
            missed = await server.complete("stop", max_tokens=at + 1, temperature=0, stop=stop)
        assert got["text"] == whole[:at] and got["finish_reason"] == "stop"
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole[:at]
        assert missed["choices"][0]["text"] == whole[: at + 1] and missed["choices"][0]["finish_reason"] == "length"

    run(work)


def test_an_end_token_ends_the_answer() -> None:
    model = student()
    tokens = continuation(model, ids("end"), 20)
    at = next(i for i in range(4, 20) if tokens.index(tokens[i]) == i)
    model.generation_config.eos_token_id = tokens[at]

    async def work() -> None:
        async with served(model) as server:
            got = await server.complete("end", max_tokens=20, temperature=0)
            past = await server.complete("end", max_tokens=20, temperature=0, ignore_eos=True)
        assert got["choices"][0]["finish_reason"] == "stop" and got["usage"]["completion_tokens"] == at + 1
        assert got["choices"][0]["text"] == tokenizer().decode(tokens[:at], skip_special_tokens=True)
        assert past["choices"][0]["finish_reason"] == "length" and past["usage"]["completion_tokens"] == 20

    run(work)


def test_log_probabilities_of_prompt_and_answer_are_the_models(model: Any) -> None:
    prompt = ids("a prompt longer than one piece of it is, and then more")
    with torch.no_grad():
        due = model(torch.tensor([prompt])).logits[0].log_softmax(-1)

    async def work() -> None:
        async with served(model) as server:
            body = {"prompt": [prompt, prompt[:20]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
            response = await server.post("completions", model=NAME, seed=1234, **body)
            chat = await server.chat("hi", max_tokens=4, logprobs=True, top_logprobs=3, temperature=0)
        for choice, count in zip(response.json()["choices"], (len(prompt), 20), strict=True):
            logprobs = choice["logprobs"]
            assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
            assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == count + 1
            got = torch.tensor(logprobs["token_logprobs"][1:count])
            torch.testing.assert_close(got, due[torch.arange(count - 1), prompt[1:count]], atol=2e-4, rtol=0)
            for value, top, row in zip(got.tolist(), logprobs["top_logprobs"][1:count], due, strict=False):
                is_best = value >= float(row.max()) - 1e-3
                assert (max(top.values()) - value < 1e-3) == is_best and max(top.values()) <= 0
            assert choice["text"].startswith(tokenizer().decode(prompt[:count]))
        content = chat["choices"][0]["logprobs"]["content"]
        assert len(content) == 4 and all(len(entry["top_logprobs"]) == 3 for entry in content)
        assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)

    run(work)


def test_lm_eval_reads_the_log_likelihoods(model: Any) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    whole, split = ids("a context, and a continuation"), 11
    with torch.no_grad():
        due = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    greedy = continuation(model, whole[:split], 5)

    async def work() -> None:
        async with served(model) as server:
            body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
            got = await server.complete([whole, whole[:split] + greedy], **body)
        (value, is_greedy), (_, is_greedy_too) = LocalCompletionsAPI.parse_logprobs(got, ctxlens=[split, split])
        expected = sum(float(due[at - 1, whole[at]]) for at in range(split, len(whole)))
        assert value == pytest.approx(expected, abs=1e-3) and not is_greedy and is_greedy_too

    run(work)


def test_several_prompts_are_several_choices(model: Any) -> None:
    async def work() -> None:
        async with served(model, slots=2) as server:
            got = await server.complete(PROMPTS, max_tokens=6, temperature=0, n=2)
            echoed = await server.complete("echo", max_tokens=0, echo=True)
        assert [choice["index"] for choice in got["choices"]] == list(range(10))
        assert [c["text"] for c in got["choices"]] == [text_of(model, p, 6) for p in PROMPTS for _ in range(2)]
        assert echoed["choices"][0] == {"index": 0, "text": "echo", "logprobs": None, "finish_reason": "length"}

    run(work)


def test_the_chat_template_sees_messages_tools_and_parts(model: Any) -> None:
    async def work() -> None:
        async with served(model) as server:
            parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
            got = await server.post(
                "chat/completions", max_tokens=7, temperature=0,
                messages=[{"role": "system", "content": "be"}, {"role": "user", "content": parts}],
                tools=[{"type": "function", "function": {"name": "f"}}],
            )  # fmt: skip
        due = text_of(model, "<system> be\n<user> ab\nc\n<assistant> ", 7)
        assert got.json()["choices"][0]["message"] == {"role": "assistant", "content": due}

    run(work)


def test_the_openai_client_reads_answers_and_streams(model: Any) -> None:
    async def work() -> None:
        async with served(model, key="secret") as server:
            http = httpx2_client(server.app)
            client = openai.AsyncOpenAI(api_key="secret", base_url="http://test/v1", http_client=http)
            names = [entry.id async for entry in client.models.list()]
            message: Any = [{"role": "user", "content": "hello"}]
            whole = await client.chat.completions.create(model=NAME, messages=message, max_tokens=8, temperature=0)
            stream = await client.chat.completions.create(
                model=NAME, messages=message, max_tokens=8, temperature=0, stream=True
            )
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            with pytest.raises(openai.NotFoundError) as missing:
                await client.completions.create(model="other", prompt="x")
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="wrong").models.list()
        assert names == [NAME] and "".join(parts) == whole.choices[0].message.content
        assert missing.value.code == "model_not_found"

    run(work)


def httpx2_client(app: Any) -> Any:
    """A client of the library that openai uses, for an application in this process."""
    library = openai.AsyncOpenAI(api_key="x").copy()._client.__class__.__mro__
    module = next(kind.__module__.split(".")[0] for kind in library if kind.__module__.startswith("httpx"))
    httpx = __import__(module)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


def test_metrics_page_and_health(model: Any) -> None:
    async def work() -> None:
        async with served(model) as server:
            await server.complete("count", max_tokens=9)
            page, health = await server.client.get("/"), await server.client.get("/health")
            models = (await server.client.get("/v1/models")).json()
            one = await server.client.get("/v1/models/also/tiny")
            assert await server.metric("generated_tokens_total") == 9
            assert await server.metric("prefilled_tokens_total") == 5
            assert await server.metric('responses_total{path="/v1/completions",status="200"}') == 1
            assert await server.metric("time_to_first_token_seconds_count") == 1
        assert health.json() == {"status": "ok"} and one.json() == models["data"][0]
        assert "<script>" in page.text and "http://" not in page.text and "https://" not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]

    run(work)


def test_json_of_a_chat_has_no_private_fields(model: Any) -> None:
    async def work() -> None:
        async with served(model) as server:
            got = await server.chat("hi", max_tokens=2)
        assert set(got) == {"id", "object", "created", "model", "choices", "usage"}
        assert json.loads(json.dumps(got)) == got

    run(work)
