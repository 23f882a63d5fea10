"""The scheduler: one thread that runs the model. It reads a part of a waiting prompt, then decodes one token of every
answer, and so on: long prompts do not hold up answers, and answers join and leave between any two tokens.

Letters: B answers, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import one_line
from linearize.modeling.cache_argument import with_cache
from linearize.modeling.forward_call import last_logits
from linearize.modeling.text_cache import TextCaches, empty_cache
from linearize.serving.conversations import ConversationStore, resume_point
from linearize.serving.errors import ApiError, overloaded, server_error
from linearize.serving.fair_queue import FairQueue
from linearize.serving.jobs import Answer, Delta, Job, Prefill, PromptRead
from linearize.serving.metrics import ServerMetrics
from linearize.serving.notices import notice
from linearize.serving.protocol import FinishReason
from linearize.serving.rows import Rows
from linearize.serving.sampling import choose, chooser_of_tokens, is_plain_argmax, token_logprobs
from linearize.serving.text_stream import TextStream

STOPPING = server_error("the server is stopping", status=503, code="stopping")


class Engine:
    """Answers jobs. `most_rows`: answers that are decoded together. `prefill_tokens`: of a prompt, read between two
    tokens of the answers."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Rows,
        *,
        most_rows: int,
        caches: TextCaches,
        store: ConversationStore,
        metrics: ServerMetrics,
        prefill_tokens: int,
        most_waiting: int,
    ) -> None:
        self.model, self.tokenizer, self.rows, self.most_rows = model, tokenizer, rows, most_rows
        self.caches, self.store, self.metrics = caches, store, metrics
        self.prefill_tokens = prefill_tokens
        self._waiting = FairQueue(most_waiting)
        self._reading: deque[Prefill] = deque()
        self._answers: list[Answer] = []  # in the order of their rows
        self._changed = threading.Condition()
        self._stopping = False
        self._special = frozenset(tokenizer.all_special_ids)
        self._thread = threading.Thread(target=self._run, name="linearize-engine", daemon=True)
        metrics.watch("running_answers", "Answers that are being decoded.", lambda: len(self._answers))
        metrics.watch("waiting_requests", "Prompts that wait for their turn.", lambda: len(self._waiting))

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether jobs are taken and answered."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs into the queue, all or none.

        Raises:
            ApiError: the queue is full, or the server is stopping.
        """
        with self._changed:
            if self._stopping:
                raise STOPPING
            if len(self._waiting) + len(jobs) > self._waiting.most:
                raise overloaded(f"{len(self._waiting)} requests are waiting already: try again later")
            for job in jobs:
                self._waiting.put(job)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up jobs, wherever they are; those that have ended stay as they are."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def refuse(self) -> None:
        """Take no further jobs, and end those that wait; answers that have begun go on."""
        with self._changed:
            self._stopping = True
            for job in self._waiting.remove(set(self._waiting.all())):
                self._end(job, STOPPING)
            self._changed.notify()

    def stop(self) -> None:
        """End everything, and the thread."""
        self.refuse()
        with self._changed:
            for job in {*(p.job for p in self._reading), *(a.job for a in self._answers)}:
                job.cancelled = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def _free(self) -> int:
        """Rows that no answer has, and that are not kept for those of a prompt that is being read."""
        return self.most_rows - len(self._answers) - sum(prefill.job.n for prefill in self._reading)

    @torch.no_grad()
    def _run(self) -> None:
        """The thread."""
        try:
            while self._next_jobs():
                self._read_prompts()
                self._decode()
        except BaseException as error:
            notice(f"the engine has stopped: {type(error).__name__}: {one_line(error)}")
            self.refuse()
            for job in {*(p.job for p in self._reading), *(a.job for a in self._answers)}:
                self._end(job, _failed(error))
            raise

    def _next_jobs(self) -> bool:
        """Wait for something to do; take out jobs that were given up, and begin others. False: there is no more."""
        with self._changed:
            while not (self._stopping or self._reading or self._answers or len(self._waiting)):
                self._changed.wait()
            if self._stopping and not (self._reading or self._answers):
                return False
            given_up = self._given_up()
            self._waiting.remove(given_up)
            admitted, free = [], self._free
            while (job := self._waiting.next()) is not None and job.n <= free:
                admitted.append(self._waiting.take())
                free -= job.n
        for job in given_up:
            late = not job.cancelled
            self.metrics.cancelled.labels("timeout" if late else "disconnected").inc()
            self._give_up(job, server_error("the request took too long", 504, "timeout") if late else None)
        for job in admitted:
            try:
                self._reading.append(self._begin(job))
            except Exception as error:
                self._end(job, _failed(error))
        return True

    def _given_up(self) -> set[Job]:
        """Jobs that were cancelled or have no time left."""
        now = time.monotonic()
        jobs = {*(p.job for p in self._reading), *(a.job for a in self._answers), *self._waiting.all()}
        return {job for job in jobs if job.cancelled or job.deadline <= now}

    def _give_up(self, job: Job, error: ApiError | None) -> None:
        """End a job that is not waiting, without an answer or with part of one."""
        for prefill in [prefill for prefill in self._reading if prefill.job is job]:
            self._reading.remove(prefill)
        for answer in [answer for answer in self._answers if answer.job is job]:
            self._leave(answer)
        self._end(job, error)

    def _end(self, job: Job, error: ApiError | None = None) -> None:
        job.ended = True
        if error is not None:
            job.events.put(error)
        self.metrics.request_seconds.observe(time.monotonic() - job.submitted)

    def _begin(self, job: Job) -> Prefill:
        saved, job.resume_from = job.resume_from, None
        keeps = job.keep != "no" and self.caches.can_save
        keep_at = resume_point(job.prompt, self._special) if keeps else 0
        if saved is None:
            return Prefill(job, empty_cache(self.model), 0, keep_at)
        job.num_resumed = saved.length
        self.metrics.resumed_tokens.inc(saved.length)
        return Prefill(job, self.caches.restore(saved), saved.length, keep_at)

    def _read_prompts(self) -> None:
        """Read the next part of one prompt; the prompts take turns."""
        if not self._reading:
            return
        prefill = self._reading.popleft()
        job = prefill.job
        try:
            logits_V = self._read_part(prefill)
            if prefill.read < len(job.prompt):
                self._reading.append(prefill)
                return
            self._answer(prefill, logits_V)
        except Exception as error:
            self._give_up(job, _failed(error))

    @torch.no_grad()
    def _read_part(self, prefill: Prefill) -> Tensor:
        """The logits after the part, `[V]`."""
        job, start = prefill.job, prefill.read
        end = start + self.prefill_tokens
        tokens = job.prompt[start : prefill.keep_at if start < prefill.keep_at < end else end]
        ids = torch.tensor([tokens], device=self.model.device)
        last = {} if job.prompt_logprobs else last_logits(self.model, ids)
        out = self.model(input_ids=ids, use_cache=True, **with_cache(self.model, prefill.cache), **last)
        prefill.read += len(tokens)
        if prefill.read == prefill.keep_at:
            self.store.keep(job.prompt[: prefill.read], self.caches.save(prefill.cache), job.keep)
        self.metrics.prefilled_tokens.inc(len(tokens))
        if job.prompt_logprobs:
            following = job.prompt[start + 1 : prefill.read + 1]
            logits_TV = out.logits[0, : len(following)]
            if following:
                prefill.logprobs += token_logprobs(logits_TV, following, job.logprobs or 0)
        logits_V: Tensor = out.logits[0, -1]
        return logits_V

    def _answer(self, prefill: Prefill, logits_V: Tensor) -> None:
        """The prompt was read: the first token of each answer, which takes a row if there is more to come."""
        job = prefill.job
        self.metrics.prompt_tokens.inc(len(job.prompt))
        job.events.put(PromptRead(job.first_choice, tuple(prefill.logprobs)))
        answers = [self._new_answer(job, number) for number in range(job.n)]
        for answer in answers:
            if job.max_tokens == 0:
                self._put(answer, Delta(answer.index, finish="length"))
            elif not self._accept(answer, choose(answer.processing, logits_V, job.prompt), logits_V):
                self.rows.join(prefill.cache)
                self._answers.append(answer)
        self.metrics.first_token_seconds.observe(time.monotonic() - job.submitted)
        self._end_if_done(job)

    def _new_answer(self, job: Job, number: int) -> Answer:
        processing = chooser_of_tokens(self.model, job.prompt, job.sampling, job.max_tokens, number)
        text = TextStream(self.tokenizer, job.stops, job.prompt)
        return Answer(job, job.first_choice + number, processing, text, is_plain_argmax(processing))

    def _decode(self) -> None:
        """One token of every answer."""
        if not self._answers:
            return
        try:
            logits_BV = self.rows.read([answer.tokens[-1] for answer in self._answers])
            tokens, finite = logits_BV.argmax(-1).tolist(), logits_BV.amax(-1).isfinite().tolist()
        except Exception as error:
            notice(f"decoding failed, {len(self._answers)} answers were given up: {one_line(error)}")
            for job in {answer.job for answer in self._answers}:
                self._give_up(job, _failed(error))
            return
        for row, answer in enumerate(list(self._answers)):
            if answer.job.ended:
                continue
            try:
                token = tokens[row]
                if not (answer.greedy and finite[row]):
                    token = choose(answer.processing, logits_BV[row], answer.whole)
                if self._accept(answer, token, logits_BV[row]):
                    self._leave(answer)
                    self._end_if_done(answer.job)
            except Exception as error:
                self._give_up(answer.job, _failed(error))

    def _accept(self, answer: Answer, token: int, logits_V: Tensor) -> bool:
        """Take a token into an answer and put out what it adds; whether the answer has ended."""
        job = answer.job
        answer.tokens.append(token)
        job.num_generated += 1
        self.metrics.generated_tokens.inc()
        logprobs = () if job.logprobs is None else tuple(token_logprobs(logits_V[None], [token], job.logprobs))
        is_last = token in answer.processing.stop_tokens
        text = "" if is_last else answer.text.put(token)
        finish: FinishReason | None = None
        if is_last or answer.text.ended:
            finish = "stop"
        elif len(answer.tokens) >= job.max_tokens:
            finish = "length"
        if finish is not None:
            text += answer.text.end()
            finish = "stop" if answer.text.ended else finish
            self._keep_state(answer)  # before the client knows that it may go on
        if text or logprobs or finish is not None:
            self._put(answer, Delta(answer.index, text, logprobs, finish))
        return finish is not None

    def _put(self, answer: Answer, delta: Delta) -> None:
        """Raises ApiError where nobody takes what is put out."""
        if not answer.job.events.put(delta):
            self.metrics.cancelled.labels("slow reader").inc()
            raise server_error("the answer was not read for too long", 408, "slow_reader")

    def _keep_state(self, answer: Answer) -> None:
        """Store the state of an answer that has ended, if it had a row: its last token was not read."""
        if answer.job.keep == "no" or not self.caches.can_save or answer not in self._answers:
            return
        try:
            saved = self.caches.save(self.rows.cache_of(self._answers.index(answer)))
            self.store.keep(answer.whole[:-1], saved, answer.job.keep)
        except Exception as error:
            notice(f"the state of a conversation could not be stored: {one_line(error)}")

    def _leave(self, answer: Answer) -> None:
        """The answer's row becomes free; the last row takes its place."""
        row = self._answers.index(answer)
        self.rows.leave(row)
        self._answers[row] = self._answers[-1]
        self._answers.pop()

    def _end_if_done(self, job: Job) -> None:
        if not any(answer.job is job for answer in self._answers):
            self._end(job)


def _failed(error: BaseException) -> ApiError:
    return error if isinstance(error, ApiError) else server_error(f"generation failed: {type(error).__name__}")
