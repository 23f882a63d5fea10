"""The routes, as a FastAPI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from linearize.serving.errors import ApiError, from_validation, server_error
from linearize.serving.guards import Guards
from linearize.serving.jobs import Job
from linearize.serving.notices import notice
from linearize.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest, ModelCard, ModelList
from linearize.serving.service import Service
from linearize.serving.streams import AsyncEvents, EventResponse, Writer, whole_response

R = TypeVar("R", bound=BaseModel)
Start = Callable[[Any, str], Awaitable[tuple[AsyncEvents, Writer, list[Job]]]]
CLIENT_HAS_GONE = 499
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}


class CountedApp:
    """An application with the status of each response counted."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in ROUTES else "other"
                self.service.engine.metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, count_and_send if scope["type"] == "http" else send)


def create_app(
    service: Service, *, api_key: str | None = None, max_body: int = 2**24, body_timeout: float = 30
) -> CountedApp:
    """The application; its engine starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> Any:
        service.engine.start()
        try:
            yield
        finally:
            try:
                service.engine.stop()
            finally:
                service.engine.store.close()

    app = FastAPI(title="linearize", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guards, api_key=api_key, most_bytes=max_body, body_timeout=body_timeout)
    _add_errors(app)
    _add_pages(app, service)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(request, service, CompletionRequest, service.complete)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(request, service, ChatRequest, service.chat)

    return CountedApp(app, service)


ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")


def _add_pages(app: FastAPI, service: Service) -> None:
    page = (files("linearize.serving") / "pages" / "chat.html").read_text("utf-8")

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> Response:
        running = service.engine.is_running
        return JSONResponse({"status": "ok" if running else "stopped"}, 200 if running else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    def card() -> ModelCard:
        return ModelCard(id=service.names[0], created=service.created, max_model_len=service.limits.context)

    @app.get("/v1/models")
    async def models() -> Response:
        return _json(ModelList(data=[card()]))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in service.names:
            raise ApiError(404, f"the model {name[:100]!r} is not served here", param="model", code="model_not_found")
        return _json(card())


async def _answer(request: Request, service: Service, kind: type[R], start: Start) -> Response:
    body: Any = _parsed(kind, await request.body())
    client = request.client.host if request.client is not None else ""
    events, writer, jobs = await start(body, client)
    if body.stream:
        return EventResponse(
            events,
            writer,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            write_timeout=service.limits.write_timeout,
            close=lambda: service.engine.cancel(jobs),
        )
    try:
        response = await whole_response(request, events, writer)
    finally:
        service.engine.cancel(jobs)
    return Response(status_code=CLIENT_HAS_GONE) if response is None else response


def _parsed(kind: type[R], body: bytes) -> R:
    try:
        parsed = kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
    assert isinstance(parsed, GenerationRequest)
    return parsed


def _add_errors(app: FastAPI) -> None:
    """All errors in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: Any) -> Response:
        return _json(error.body(), error.status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: Any) -> Response:
        what = f"{request.method} {request.url.path[:100]}"
        return _json(ApiError(error.status_code, f"{what}: {error.detail}", code="not_found").body(), error.status_code)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        notice(f"{request.url.path[:100]} failed: {type(error).__name__}")
        return _json(server_error(f"the server failed: {type(error).__name__}").body(), 500)


def _json(content: BaseModel, status: int = 200) -> Response:
    return Response(content.model_dump_json(), status, media_type="application/json")
