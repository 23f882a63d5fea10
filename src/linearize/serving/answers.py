"""From the engine's events to OpenAI's responses: whole ones, and the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from linearize.serving.errors import ApiError
from linearize.serving.jobs import Delta, Event, Job, PromptRead
from linearize.serving.protocol import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    PromptDetails,
    TopLogprob,
    Usage,
)
from linearize.serving.sampling import TokenLogprob

Response = Completion | ChatCompletion | ChatChunk


@dataclass
class WholeAnswer:
    """What came of one answer so far."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass
class AnswerWriter:
    """Writes the responses of one request, whose answers come from `jobs`; the kinds differ in what they look like.

    `echo`: by the first choice of each job, the prompt's text, which its answers begin with.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    jobs: Sequence[Job]
    with_logprobs: bool = False
    echo: dict[int, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    answers: dict[int, WholeAnswer] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for job in self.jobs:
            for choice in range(job.first_choice, job.first_choice + job.n):
                self.answers[choice] = WholeAnswer()

    @property
    def is_done(self) -> bool:
        """Whether all answers have ended."""
        return all(answer.finish is not None for answer in self.answers.values())

    def usage(self) -> Usage:
        """Numbers of tokens so far."""
        prompt, generated = sum(len(job.prompt) for job in self.jobs), sum(job.num_generated for job in self.jobs)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(job.num_resumed for job in self.jobs)),
        )

    def take(self, events: Iterable[Event]) -> list[Delta]:
        """Note what came; gives one delta for each answer that it adds to.

        Raises:
            ApiError: an answer failed.
        """
        new: dict[int, Delta] = {}
        for event in events:
            if isinstance(event, ApiError):
                raise event
            deltas = self._echoed(event) if isinstance(event, PromptRead) else [event]
            for delta in deltas:
                old = new.get(delta.choice, Delta(delta.choice))
                new[delta.choice] = Delta(
                    delta.choice, old.text + delta.text, old.logprobs + delta.logprobs, delta.finish
                )
        for delta in new.values():
            answer = self.answers[delta.choice]
            answer.text += delta.text
            answer.logprobs += delta.logprobs
            answer.finish = delta.finish or answer.finish
        return list(new.values())

    def _echoed(self, event: PromptRead) -> list[Delta]:
        job = next(job for job in self.jobs if job.first_choice == event.first_choice)
        if event.first_choice not in self.echo:
            return []
        first = (TokenLogprob(job.prompt[0], None), *event.logprobs) if self.with_logprobs else ()
        text = self.echo[event.first_choice]
        return [Delta(choice, text, first) for choice in range(job.first_choice, job.first_choice + job.n)]

    def token_text(self, token: int) -> str:
        """One token as text; incomplete characters are shown as such."""
        return str(self.tokenizer.decode([token]))


class CompletionWriter(AnswerWriter):
    """Of `/v1/completions`."""

    def whole(self) -> Completion:
        """The response."""
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=self._logprobs(index, answer.logprobs),
                finish_reason=answer.finish,
            )
            for index, answer in sorted(self.answers.items())
        ]
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage())

    def chunk(self, delta: Delta) -> Iterator[Completion]:
        """The events of a stream for a part of an answer."""
        choice = CompletionChoice(
            index=delta.choice,
            text=delta.text,
            logprobs=self._logprobs(delta.choice, delta.logprobs),
            finish_reason=delta.finish,
        )
        yield Completion(id=self.id, created=self.created, model=self.model, choices=[choice])

    def last_chunk(self) -> Completion:
        """The event with the numbers of tokens."""
        return Completion(id=self.id, created=self.created, model=self.model, choices=[], usage=self.usage())

    def _logprobs(self, choice: int, logprobs: Sequence[TokenLogprob]) -> CompletionLogprobs | None:
        if not self.with_logprobs:
            return None
        tokens = [self.token_text(entry.token) for entry in logprobs]
        offset, offsets = self._offsets.get(choice, 0), []
        for text in tokens:
            offsets.append(offset)
            offset += len(text)
        self._offsets[choice] = offset
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[entry.logprob for entry in logprobs],
            top_logprobs=[self._top(entry) for entry in logprobs],
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens by their text, and the token itself; of several with one text, the likeliest."""
        if entry.logprob is None:
            return None
        top: dict[str, float] = {}
        for token, value in (*entry.top, (entry.token, entry.logprob)):
            top.setdefault(self.token_text(token), value)
        return top


class ChatWriter(AnswerWriter):
    """Of `/v1/chat/completions`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.id = self.id.replace("cmpl-", "chatcmpl-")
        self._begun: set[int] = set()

    def whole(self) -> ChatCompletion:
        """The response."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatAnswer(content=answer.text),
                logprobs=self._logprobs(answer.logprobs),
                finish_reason=answer.finish or "stop",
            )
            for index, answer in sorted(self.answers.items())
        ]
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage())

    def chunk(self, delta: Delta) -> Iterator[ChatChunk]:
        """The events of a stream for a part of an answer; before the first one, an event with the role."""
        if delta.choice not in self._begun:
            self._begun.add(delta.choice)
            yield self._chunk(ChatChunkChoice(index=delta.choice, delta=ChatAnswer(content="")))
        yield self._chunk(
            ChatChunkChoice(
                index=delta.choice,
                delta=ChatDelta(content=delta.text),
                logprobs=self._logprobs(delta.logprobs),
                finish_reason=delta.finish,
            )
        )

    def last_chunk(self) -> ChatChunk:
        """The event with the numbers of tokens."""
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=[], usage=self.usage())

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=[choice])

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        content = []
        for entry in logprobs:
            top = [self._top(token, value) for token, value in entry.top]
            own = self._top(entry.token, entry.logprob or 0.0)
            content.append(ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
        return ChatLogprobs(content=content)

    def _top(self, token: int, value: float) -> TopLogprob:
        text = self.token_text(token)
        return TopLogprob(token=text, logprob=value, bytes=list(text.encode()))


def to_json(response: Response) -> str:
    """A response as JSON; without `usage` where it has none."""
    return response.model_dump_json(exclude={"usage"} if response.usage is None else None)
