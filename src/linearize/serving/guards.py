"""What stands before the routes: the key, and limits on a request's body."""

from __future__ import annotations

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linearize.numbers import size_text
from linearize.serving.errors import ApiError, bad_request
from linearize.serving.streams import send_error

DISCARDED = 8  # of a body that is too large, so many times the limit are read, for the client to see the answer
WRONG_KEY = ApiError(
    401, "wrong or no API key: give the server's in the header 'Authorization: Bearer KEY'", code="invalid_api_key"
)


class Guards:
    """Refuses requests to `/v1` without the key (None: there is none), and bodies that are too large, too slow, or no
    JSON by their header; other bodies reach the application whole."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, most_bytes: int, body_timeout: float) -> None:
        self.app, self.most_bytes, self.body_timeout = app, most_bytes, body_timeout
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if scope["path"].startswith("/v1/"):
                self._check_key(scope)
            if scope["method"] == "POST":
                receive = _replayed(await self._body(scope, receive), receive)
        except ApiError as error:
            await send_error(send, error)
            return
        await self.app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None:
            return
        scheme, _, key = _header(scope, b"authorization").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise WRONG_KEY

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        kind = _header(scope, b"content-type").split(b";")[0].strip().lower()
        if kind != b"application/json":  # a page of another site could send anything else without asking
            raise ApiError(415, "the body must be JSON: send the header 'Content-Type: application/json'")
        try:
            async with asyncio.timeout(self.body_timeout):
                return await self._read(receive)
        except TimeoutError as error:
            late = f"the body took more than {self.body_timeout:.0f} s to arrive"
            raise ApiError(408, late, code="timeout") from error

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size, more = 0, True
        while more and size <= DISCARDED * self.most_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise bad_request("the client has gone")
            part = message.get("body", b"")
            size, more = size + len(part), message.get("more_body", False)
            parts = [*parts, part] if size <= self.most_bytes else []
        if size > self.most_bytes:
            limit = size_text(self.most_bytes)
            raise ApiError(413, f"the body is larger than {limit}: send less, or start the server with --max-body")
        return b"".join(parts)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What gives the body in one message, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
