"""Responses that are written as the engine goes: they end, and give up their jobs, when the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from linearize.serving.answers import ChatWriter, CompletionWriter, to_json
from linearize.serving.errors import ApiError, server_error
from linearize.serving.jobs import Event, EventStream

Writer = CompletionWriter | ChatWriter
MOST_EVENTS = 1024  # of a response that nobody reads


class AsyncEvents:
    """The events of one response, for the event loop that it is made in."""

    def __init__(self) -> None:
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self.stream = EventStream(MOST_EVENTS, self._wake)

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop has ended, and the response with it
            self._loop.call_soon_threadsafe(self._ready.set)

    async def batches(self) -> AsyncIterator[list[Event]]:
        """What has come since the last time, for ever."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            if events := self.stream.take():
                yield events


async def whole_response(request: Request, events: AsyncEvents, writer: Writer) -> HttpResponse | None:
    """The response when all answers have ended; None: the client has gone.

    Raises:
        ApiError: an answer failed.
    """
    gone = asyncio.ensure_future(_disconnected(request.receive))
    answered = asyncio.ensure_future(_all_answers(events, writer))
    try:
        await asyncio.wait({gone, answered}, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            return None
        answered.result()
        return HttpResponse(to_json(writer.whole()), media_type="application/json")
    finally:
        gone.cancel()
        answered.cancel()


async def _all_answers(events: AsyncEvents, writer: Writer) -> None:
    async for batch in events.batches():
        writer.take(batch)
        if writer.is_done:
            return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventResponse(HttpResponse):
    """Server-sent events. The response begins with the first event of the engine: an error before it has its status.

    `write_timeout`: seconds that a client may take to make space for more. `close`: called when it is over, however.
    """

    def __init__(
        self,
        events: AsyncEvents,
        writer: Writer,
        *,
        include_usage: bool,
        write_timeout: float,
        close: Callable[[], None],
    ) -> None:
        super().__init__(media_type="text/event-stream")
        self._events, self._writer, self._include_usage = events, writer, include_usage
        self._write_timeout, self._close = write_timeout, close
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response; returns early when the client has gone or does not read."""
        gone = asyncio.ensure_future(_disconnected(receive))
        written = asyncio.ensure_future(self._write(send))
        try:
            await asyncio.wait({gone, written}, return_when=asyncio.FIRST_COMPLETED)
            if written.done():
                with suppress(OSError, TimeoutError):
                    written.result()
        finally:
            gone.cancel()
            written.cancel()
            self._close()

    async def _write(self, send: Send) -> None:
        try:
            async for batch in self._events.batches():
                for delta in self._writer.take(batch):
                    for chunk in self._writer.chunk(delta):
                        await self._put(send, to_json(chunk))
                if self._writer.is_done:
                    break
            if self._include_usage:
                await self._put(send, to_json(self._writer.last_chunk()))
            await self._put(send, "[DONE]")
        except ApiError as error:
            if not self._begun:
                await send_error(send, error)
                return
            await self._put(send, error.body().model_dump_json())
        except (OSError, TimeoutError):
            raise
        except Exception as error:
            await self._put(send, server_error(f"the server failed: {type(error).__name__}").body().model_dump_json())
        await self._send(send, {"type": "http.response.body", "body": b""})

    async def _put(self, send: Send, data: str) -> None:
        if not self._begun:
            self._begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            headers.append((b"x-accel-buffering", b"no"))
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        await asyncio.wait_for(send(message), self._write_timeout)


async def send_error(send: Send, error: ApiError) -> None:
    """A whole response that is an error."""
    body = error.body().model_dump_json().encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status in (401,):
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
