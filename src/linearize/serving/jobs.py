"""A request on its way through the engine: what was asked for, its answers, and the events that it puts out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from linearize.decoding.speculative.logits_processing import LogitsProcessing
from linearize.modeling.text_cache import SavedText
from linearize.serving.conversations import Keep
from linearize.serving.errors import ApiError
from linearize.serving.protocol import FinishReason
from linearize.serving.sampling import SamplingSettings, TokenLogprob
from linearize.serving.text_stream import TextStream


@dataclass(frozen=True)
class Delta:
    """More of an answer. `choice`: which one. `finish`: why it ended (None: it goes on)."""

    choice: int
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True)
class PromptRead:
    """The prompt of these answers was read. `logprobs`: of its tokens, where they were asked for."""

    first_choice: int
    logprobs: tuple[TokenLogprob, ...] = ()


Event = Delta | PromptRead | ApiError


class EventStream:
    """The events of one response, from the engine's thread to the one that writes them. It holds at most `most`."""

    def __init__(self, most: int, wake: Callable[[], None]) -> None:
        """`wake`: called in the engine's thread when there is something to take."""
        self._most, self._wake = most, wake
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()

    def put(self, event: Event) -> bool:
        """Whether there was space for the event; the last one, an error, always has."""
        with self._lock:
            if len(self._events) >= self._most and not isinstance(event, ApiError):
                return False
            self._events.append(event)
        self._wake()
        return True

    def take(self) -> list[Event]:
        """All events since the last call."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        return events


@dataclass(eq=False, kw_only=True)
class Job:
    """A prompt with the answers to it, `n` of them, numbered from `first_choice` on.

    `client`: whose turn it is in the queue. `stops`: texts that end an answer. `logprobs`: how many of the likeliest
    tokens are wanted with each token (None: no log-probabilities). `prompt_logprobs`: those of the prompt too.
    `deadline`: on the monotonic clock. `keep`: where the states after the prompt and after each answer are stored:
    not at all, in memory, or also on disk.
    """

    prompt: list[int]
    max_tokens: int
    events: EventStream
    client: str = ""
    n: int = 1
    first_choice: int = 0
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    deadline: float = float("inf")
    keep: Keep = "no"
    resume_from: SavedText | None = None
    # kept by the engine
    submitted: float = field(default_factory=time.monotonic)
    num_resumed: int = 0
    num_generated: int = 0
    cancelled: bool = False
    ended: bool = False


@dataclass(eq=False)
class Answer:
    """One answer that is being decoded: `tokens` after the prompt, of which the last is not read yet."""

    job: Job
    index: int
    processing: LogitsProcessing
    text: TextStream
    greedy: bool
    tokens: list[int] = field(default_factory=list)

    @property
    def whole(self) -> list[int]:
        """Prompt and answer."""
        return self.job.prompt + self.tokens


@dataclass(eq=False)
class Prefill:
    """A prompt that is being read in parts: `read` tokens are in the cache. `keep_at`: the state after so many is
    stored (0: none is)."""

    job: Job
    cache: Any
    read: int
    keep_at: int
    logprobs: list[TokenLogprob] = field(default_factory=list)
