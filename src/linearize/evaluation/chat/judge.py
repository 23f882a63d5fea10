"""A judge at an OpenAI-compatible endpoint: asked once per prompt, again when it fails, with every reply kept.

Only the given URL is contacted: redirects are refused. The key of the endpoint comes from OPENAI_API_KEY, if set.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from linearize.errors import InputError, one_line
from linearize.evaluation.chat.journal import Journal, Record

T = TypeVar("T")
Message = dict[str, str]

TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
REFUSED = {400, 413, 422}  # of this one prompt: too long, or filtered
LONGEST_WAIT = 60.0  # seconds
FAILED = "$ERROR$"  # FastChat's mark of a reply that never came


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Where the judge is and how patient we are. `tries` of a request that fails, `wait` seconds before the second try
    (doubled each time, or as the endpoint asks), `timeout` seconds for a reply; `asks` of a prompt whose reply cannot
    be read."""

    url: str
    model: str
    tries: int = 6
    wait: float = 1.0
    timeout: float = 180.0
    asks: int = 3

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"--judge-url {self.url!r} is no URL: it must begin with http:// or https://")

    @property
    def endpoint(self) -> str:
        """The address that requests go to."""
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"


@dataclass
class Usage:
    """What the judge was asked, over all replies in use, those of earlier runs included."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    """Replies whose endpoint did not say how many tokens they took."""

    def add(self, reply: Record) -> None:
        """Count one reply."""
        self.requests += 1
        counted = reply["prompt_tokens"], reply["completion_tokens"]
        if None in counted:
            self.unreported += 1
        self.prompt_tokens += counted[0] or 0
        self.completion_tokens += counted[1] or 0

    def cost(self, price_in: float | None, price_out: float | None) -> float | None:
        """In the currency of the prices, which are for a million tokens; None where something is not known."""
        if price_in is None or price_out is None or self.unreported:
            return None
        return (self.prompt_tokens * price_in + self.completion_tokens * price_out) / 1e6


class RefusedError(InputError):
    """The endpoint answered, and refuses this prompt."""


class _FailureError(Exception):
    """A failure that may pass. `after`: seconds that the endpoint asks to wait."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


@dataclass
class Judge:
    """Asks, and keeps replies in `journal` by what was asked, so that nothing is asked twice. Threads may share it."""

    config: JudgeConfig
    journal: Journal
    sleep: Callable[[float], None] = time.sleep
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self._kept = {str(record.get("id")): record for record in self.journal.records if "reply" in record}
        self._lock = threading.Lock()
        self._gone: InputError | None = None

    def ask(
        self, label: str, messages: Sequence[Message], parse: Callable[[str], T | None], *, max_tokens: int
    ) -> tuple[T | None, str]:
        """What `parse` reads in the reply, and the reply; (None, last reply) if it never reads anything.

        `label` tells apart prompts that happen to be the same. Raises InputError when the judge stops answering.
        """
        reply = ""
        for attempt in range(self.config.asks):
            reply = self._reply(f"{label}/{attempt}", messages, max_tokens)
            if reply.startswith(FAILED):
                break
            found = parse(reply)
            if found is not None:
                return found, reply
        return None, reply

    def _reply(self, label: str, messages: Sequence[Message], max_tokens: int) -> str:
        body = {
            "model": self.config.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
            "n": 1,
        }
        key = hashlib.sha256(json.dumps([label, body], sort_keys=True).encode()).hexdigest()[:32]
        found = self._kept.get(key)
        if found is None:
            answer = self._patiently(body)
            found = self.journal.append({"id": key, "label": label, "judge": self.config.model, **answer})
        with self._lock:
            self._kept[key] = found
            self.usage.add(found)
        return str(found["reply"])

    def _patiently(self, body: Record) -> Record:
        """The endpoint's answer, tried again with growing waits. When one thread gives up, all do."""
        try:
            return self._try(body)
        except InputError as error:
            self._gone = self._gone or error
            raise

    def _try(self, body: Record) -> Record:
        wait = self.config.wait
        for left in reversed(range(self.config.tries)):
            if self._gone is not None:
                raise self._gone
            try:
                return self._post(body)
            except RefusedError as error:
                if not self._kept:  # it never answered: the request itself is wrong
                    raise
                return {"reply": f"{FAILED} {error}", "prompt_tokens": 0, "completion_tokens": 0, "tstamp": time.time()}
            except _FailureError as error:
                if not left:
                    raise InputError(self._told_gone(error)) from error
                self.sleep(min(LONGEST_WAIT, wait if error.after is None else error.after))
                wait *= 2
        raise AssertionError

    def _told_gone(self, error: Exception) -> str:
        where = f" in {self.journal.path}" if self.journal.path else ""
        return (
            f"the judge at {self.config.endpoint} stopped answering ({one_line(error)}, {self.config.tries} tries): "
            f"{len(self.journal.records)} replies are kept{where}; run the same command again to go on"
        )

    def _post(self, body: Record) -> Record:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        request = urllib.request.Request(self.config.endpoint, json.dumps(body).encode(), headers, method="POST")
        try:
            with _OPENER.open(request, timeout=self.config.timeout) as response:
                return _answer(response.read())
        except urllib.error.HTTPError as error:
            raise _told(error, self.config) from error
        except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke
            raise _FailureError(one_line(error)) from error


class _Stay(urllib.request.HTTPRedirectHandler):
    """No other address is contacted: a redirect is an error, and the key goes nowhere else."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Stay())


def _answer(payload: bytes) -> Record:
    """Reply and token counts out of a response. A reply may be null (nothing said)."""
    try:
        found = json.loads(payload)
        reply = found["choices"][0]["message"]["content"] or ""
        usage = found.get("usage") or {}
        tokens = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _FailureError(f"no chat completion in its response: {payload[:80]!r}") from error
    return {"reply": str(reply), **tokens, "tstamp": time.time()}


def _told(error: urllib.error.HTTPError, config: JudgeConfig) -> Exception:
    """What an HTTP status means."""
    try:
        said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:160]
    except (OSError, http.client.HTTPException):
        said = ""
    told = f"HTTP {error.code}{': ' + said if said else ''}"
    if error.code in TRY_AGAIN:
        after = error.headers.get("Retry-After", "")
        return _FailureError(told, float(after) if after.isdigit() else None)
    if error.code in REFUSED:
        return RefusedError(f"the judge refuses the request ({told}); check --judge-url and --judge-model")
    hint = "set OPENAI_API_KEY" if error.code in (401, 403) else "check --judge-url and --judge-model"
    return InputError(f"the judge at {config.endpoint} does not answer ({told}); {hint}")
