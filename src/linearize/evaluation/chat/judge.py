"""A judge at an OpenAI-compatible endpoint, asked once for each prompt."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from linearize.errors import InputError, one_line
from linearize.storage.journal import Journal

RETRIES, TIMEOUT = 5, 180.0
"""Of a request that fails, and seconds for a reply."""
REFUSED = {400, 413, 422}  # statuses for one prompt: too long, or filtered
FAILED = "$ERROR$"  # FastChat's mark of a reply that never came
Messages = Sequence[Mapping[str, str]]


class Judge:
    """Asks, and keeps replies in the journal by what was asked. Threads may share it. `replies`: those in use.

    Only `url` is contacted, with the key in OPENAI_API_KEY, and redirects are refused.
    Raises InputError where openai is not installed or `url` is not a URL.
    """

    def __init__(self, url: str, model: str, journal: Journal) -> None:
        if importlib.util.find_spec("openai") is None:
            raise InputError("a judge needs openai, which is not installed: pip install 'linearize[eval]'")
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--judge-url {url!r} is not a URL: it must begin with http:// or https://")
        from openai import DefaultHttpxClient, OpenAI

        self.url, self.model, self.journal = url.rstrip("/").removesuffix("/chat/completions"), model, journal
        self.replies: dict[str, dict[str, Any]] = {}
        self._kept = {row["id"]: row for row in journal.rows}
        key, http = os.environ.get("OPENAI_API_KEY") or "none", DefaultHttpxClient(follow_redirects=False)
        self._client = OpenAI(base_url=self.url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT, http_client=http)

    def ask(self, messages: Messages, max_tokens: int) -> str:
        """The reply. Raises InputError where the judge does not answer."""
        key = hashlib.sha256(json.dumps([self.model, messages, max_tokens]).encode()).hexdigest()[:32]
        if key not in self._kept:
            self._kept[key] = self.journal.append({"id": key, **self._completion(messages, max_tokens)})
        self.replies[key] = self._kept[key]
        return str(self._kept[key]["reply"])

    def _completion(self, messages: Messages, max_tokens: int) -> dict[str, str | int | None]:
        """The reply and its tokens (None: not reported)."""
        from openai import APIConnectionError, APIStatusError

        create: Any = self._client.chat.completions.create
        try:
            completion = create(model=self.model, messages=messages, temperature=0, max_tokens=max_tokens, n=1)
            text, usage = completion.choices[0].message.content or "", completion.usage
            return {"reply": text} | {
                name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")
            }
        except APIStatusError as error:
            why = f"HTTP {error.status_code}: {' '.join(error.response.text.split())[:160]}"
            if error.status_code in REFUSED and self._kept:  # it answered other prompts
                return {"reply": f"{FAILED} {why}", "prompt_tokens": 0, "completion_tokens": 0}
        except APIConnectionError as error:
            why = one_line(error.__cause__ or error)
        except (AttributeError, TypeError, IndexError, ValueError):
            why = "no chat completion in its response"
        raise InputError(
            f"the judge at {self.url} does not answer ({why}): check --judge-url, --judge-model and OPENAI_API_KEY; "
            f"{len(self._kept)} replies are kept, and the same command continues from them"
        )
