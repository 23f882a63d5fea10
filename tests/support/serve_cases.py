"""A server for tests: a tiny student with a byte tokenizer, its application, and a client that needs no socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from byte_tokenizer import CHAT, SIZE, byte_tokenizer
from models import mixer, student_of, tiny

from linearize.serving.server import ServeOptions, build_app

NAME = "tiny"


def student(name: str = "lolcats", *, hybrid: bool = False, **settings: Any) -> Any:
    """A student whose vocabulary is that of the byte tokenizer; no token ends its text."""
    teacher = tiny("llama", attention="sdpa", vocab_size=SIZE, max_position_embeddings=4096)
    made = mixer(name, **settings)
    model = student_of(teacher, [made, None, made] if hybrid else made)
    model.generation_config.eos_token_id = None
    return model


def tokenizer() -> Any:
    return byte_tokenizer(chat=CHAT)


@dataclass
class Served:
    """A running application, with a client for it."""

    client: httpx.AsyncClient
    app: Any

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(f"/v1/{path}", json=body)

    async def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        response = await self.post("completions", prompt=prompt, **body)
        assert response.status_code == 200, response.text
        return response.json()

    async def chat(self, *turns: str, **body: Any) -> dict[str, Any]:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        response = await self.post("chat/completions", messages=messages, **body)
        assert response.status_code == 200, response.text
        return response.json()

    async def events(self, path: str, **body: Any) -> list[Any]:
        """All events of a stream; the last one is the text `[DONE]`, or an error."""
        response = await self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    async def metric(self, name: str) -> float:
        text = (await self.client.get("/metrics")).text
        values = [line.split()[-1] for line in text.splitlines() if line.startswith(f"linearize_{name}")]
        return sum(map(float, values))


@asynccontextmanager
async def served(model: Any, *, key: str | None = None, headers: Any = None, **options: Any) -> AsyncIterator[Served]:
    """The application of a model, started, and stopped at the end."""
    chosen = {"slots": 3, "prefill_tokens": 16, "state_disk": 0, **options}
    app, _ = build_app(model, tokenizer(), [NAME, "also/tiny"], ServeOptions(api_key=key, **chosen))
    async with lifespan(app):
        where: Any = {"transport": httpx.ASGITransport(app=app), "base_url": "http://test", "headers": headers}
        async with httpx.AsyncClient(**where, timeout=60) as client:
            yield Served(client, app)


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """What a server tells an application when it starts and stops."""
    received: asyncio.Queue[Any] = asyncio.Queue()
    sent: asyncio.Queue[Any] = asyncio.Queue()
    await received.put({"type": "lifespan.startup"})
    task = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, received.get, sent.put))
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    try:
        yield
    finally:
        await received.put({"type": "lifespan.shutdown"})
        assert (await sent.get())["type"] == "lifespan.shutdown.complete"
        await task


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(work())


def continuation(model: Any, ids: list[int], count: int, **settings: Any) -> list[int]:
    """What `linearize.decoding.generate` gives for a prompt, the new tokens alone."""
    from linearize.decoding.generate import _generate

    settings = {"max_new_tokens": count, "pad_token_id": 1, "do_sample": False, **settings}
    seed = settings.pop("seed", 0)
    return _generate(model, ids, settings, seed, None)[len(ids) :]  # type: ignore[arg-type]


def state_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))
