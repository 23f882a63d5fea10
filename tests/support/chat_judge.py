"""What the tests of the judge share: no address but this machine, and a judge that answers as it should."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from chat_stand_in import Reply, Request


@pytest.fixture(autouse=True)
def no_other_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
    yield
    assert not gone


def good(request: Request, number: int) -> Reply:
    """Ratings 8 for maths (which show a reference), else 6.5; the pair's first assistant wins, but for maths a tie."""
    prompt = request["messages"][-1]["content"]
    if request["messages"][0]["content"] == "single judge":
        return "Fine. Rating: [[8]]" if "|R:" in prompt else "Rating: [[6.5]] and not [[1]]"
    return "[[C]]" if "|R:" in prompt else "A is better: [[A]]"
