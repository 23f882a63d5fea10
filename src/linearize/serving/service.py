"""From requests to jobs: prompts as tokens, limits, and the state that a prompt may go on from."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from linearize.modeling.text_cache import SavedText
from linearize.serving.answers import ChatWriter, CompletionWriter
from linearize.serving.engine import Engine
from linearize.serving.errors import ApiError, bad_request
from linearize.serving.jobs import Job
from linearize.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest
from linearize.serving.sampling import SamplingSettings
from linearize.serving.streams import AsyncEvents, Writer
from linearize.storage.files import well_formed

DEFAULT_COMPLETION = 16  # tokens, as OpenAI's


@dataclass(frozen=True, kw_only=True)
class Limits:
    """`context`: tokens of prompt and answer. `new_tokens`: of an answer. `timeout`: seconds for a request, in which
    its answers end. `write_timeout`: seconds that a client may take to make space for more of a stream."""

    context: int
    new_tokens: int
    timeout: float
    write_timeout: float = 60.0


@dataclass(kw_only=True)
class Service:
    """The model that is served. `names`: what requests may call it, the first one in responses."""

    names: Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    engine: Engine
    limits: Limits
    created: int = field(default_factory=lambda: int(time.time()))
    _encoding: threading.Lock = field(default_factory=threading.Lock)  # a tokenizer serves one thread at a time

    async def complete(self, request: CompletionRequest, client: str) -> tuple[AsyncEvents, Writer, list[Job]]:
        """The jobs of a completion request, submitted.

        Raises:
            ApiError: a request beyond the limits.
        """
        self._check_model(request)
        prompts, texts = await asyncio.to_thread(self._prompts, request)
        events, n = AsyncEvents(), request.n or 1
        jobs = []
        for number, prompt in enumerate(prompts):
            job = self._job(request, prompt, events, client, request.max_tokens, DEFAULT_COMPLETION)
            job.first_choice = number * n
            job.logprobs = request.logprobs
            job.prompt_logprobs = request.echo and request.logprobs is not None
            job.keep = "no" if request.echo or job.max_tokens < 2 else "memory"
            jobs.append(job)
        echo = {job.first_choice: text for job, text in zip(jobs, texts, strict=True)} if request.echo else {}
        writer = CompletionWriter(self.names[0], self.tokenizer, jobs, request.logprobs is not None, echo)
        await self._submit(jobs)
        return events, writer, jobs

    async def chat(self, request: ChatRequest, client: str) -> tuple[AsyncEvents, Writer, list[Job]]:
        """The job of a chat request, submitted.

        Raises:
            ApiError: a request beyond the limits, or messages that the chat template refuses.
        """
        self._check_model(request)
        prompt = await asyncio.to_thread(self._chat_prompt, request)
        events = AsyncEvents()
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        job = self._job(request, prompt, events, client, limit, self.limits.context)
        job.logprobs = (request.top_logprobs or 0) if request.logprobs else None
        job.keep = "disk"
        writer = ChatWriter(self.names[0], self.tokenizer, [job], bool(request.logprobs))
        await self._submit([job])
        return events, writer, [job]

    def _check_model(self, request: GenerationRequest) -> None:
        if request.model is not None and request.model not in self.names:
            raise ApiError(
                404, f"the model {request.model[:100]!r} is not served here: {self.names[0]!r} is", param="model",
                code="model_not_found",
            )  # fmt: skip

    def _job(
        self,
        request: GenerationRequest,
        prompt: list[int],
        events: AsyncEvents,
        client: str,
        limit: int | None,
        default: int,
    ) -> Job:
        """`limit`: tokens of an answer as the request has it; `default`: where it has none and so many fit."""
        limits, n = self.limits, request.n or 1
        left = limits.context - len(prompt)
        if left < 1 or (limit or 0) > left:
            answer = "" if limit is None else f" and {limit} for the answer"
            raise bad_request(
                f"the prompt has {len(prompt)} tokens{answer}: together at most {limits.context}",
                code="context_length_exceeded",
            )
        if (limit or 0) > limits.new_tokens:
            raise bad_request(f"max_tokens {limit}: this server answers with at most {limits.new_tokens}", "max_tokens")
        if n > self.engine.most_rows:
            raise bad_request(f"n {n}: this server decodes at most {self.engine.most_rows} answers together", "n")
        sampling = SamplingSettings(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            seed=request.seed,
            ignore_eos=request.ignore_eos,
        )
        return Job(
            prompt=prompt,
            max_tokens=min(default, left, limits.new_tokens) if limit is None else limit,
            events=events.stream,
            client=request.user or client,
            n=n,
            sampling=sampling,
            stops=tuple(request.stops()),
            deadline=time.monotonic() + limits.timeout,
        )

    async def _submit(self, jobs: list[Job]) -> None:
        for job in jobs:
            if job.keep != "no":
                job.resume_from = await asyncio.to_thread(self._find, job.prompt)
        self.engine.submit(jobs)

    def _find(self, prompt: list[int]) -> SavedText | None:
        return self.engine.store.find(prompt)

    def _prompts(self, request: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """The prompts as tokens and as text."""
        prompts: list[list[int]] = []
        texts: list[str] = []
        for entry in _entries(request.prompt):
            if isinstance(entry, str):
                ids, text = self._encode(entry, add_special_tokens=True), entry
            else:
                ids = entry
                if any(token >= self.vocabulary for token in ids):
                    raise bad_request(f"prompt: token ids are below {self.vocabulary}", "prompt")
                text = str(self.tokenizer.decode(ids)) if request.echo else ""
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [self.tokenizer.bos_token_id]
            if not ids:
                raise bad_request("prompt: it is empty and this model has no token to begin with", "prompt")
            prompts.append(ids)
            texts.append(text)
        if not prompts:
            raise bad_request("prompt: give at least one", "prompt")
        return prompts, texts

    def _chat_prompt(self, request: ChatRequest) -> list[int]:
        """The conversation through the chat template; without one, as `linearize chat` does: one text."""
        messages = [message.model_dump(exclude_none=True) | {"content": message.text()} for message in request.messages]
        if not self.tokenizer.chat_template:
            return self._encode("\n".join(str(m["content"]) for m in messages), add_special_tokens=True)
        tools = None if request.tool_choice == "none" else request.tools
        options = request.chat_template_kwargs or {}
        try:
            text = self.tokenizer.apply_chat_template(
                well_formed(messages),
                tools=tools,  # type: ignore[arg-type]
                add_generation_prompt=True,
                tokenize=False,
                **{name: value for name, value in options.items() if name not in ("tokenize", "return_dict")},
            )
        except Exception as error:  # templates raise what they like
            raise bad_request(f"the chat template refuses these messages: {str(error)[:200]}", "messages") from error
        return self._encode(str(text), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._encoding:
            return list(self.tokenizer(well_formed(text), add_special_tokens=add_special_tokens)["input_ids"])


def _entries(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a request, one or several."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [entry for entry in prompt if not isinstance(entry, int)]
