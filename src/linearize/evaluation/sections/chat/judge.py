"""A judge at an OpenAI-compatible endpoint: what it is asked, with the official prompts, and how its replies are read.

AlpacaEval's judge names the better output by a letter; the official win rate weighs by that letter's probability
instead, which not every endpoint reports.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from linearize.errors import InputError, one_line
from linearize.evaluation.sections.chat.data import (
    ALPACA,
    MT_BENCH,
    FileRow,
    Question,
    alpaca_prompt,
    file_name,
    mt_bench_prompts,
)
from linearize.storage.journal import Journal

RETRIES, TIMEOUT = 5, 180.0
"""Of a request that fails, and seconds for a reply."""
REFUSED = {400, 413, 422}  # statuses for one prompt: too long, or filtered
FAILED = "$ERROR$"  # FastChat's mark of a reply that never came
Texts = Mapping[str, Mapping[int | str, Sequence[str]]]
"""By model and question, the answers to all turns."""
WINNERS = ({"A": "model_1", "B": "model_2", "C": "tie"}, {"A": "model_2", "B": "model_1", "C": "tie"})
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


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """Of a model: a rating (`against` empty), or 1 for a win, 0.5 for a tie, 0 for a loss; None: unrated."""

    model: str
    against: str
    question: Question
    turn: int
    value: float | None
    row: FileRow


def judge_tasks(
    judge: Judge, folder: Path, questions: Sequence[Question], answers: Texts, teacher: str | None, seed: int
) -> list[Callable[[], Judgment]]:
    """What there is to judge of the answers to one benchmark: MT-Bench's are rated turn by turn, and students'
    compared with the teacher's (None: not); AlpacaEval's, whose questions name a `generator`, with the reference."""
    if all(question.generator for question in questions):
        prompt = alpaca_prompt(folder)
        pairs = [(model, question) for model in answers for question in questions]
        return [partial(judge_alpaca, judge, prompt, q, model, answers[model][q.id][0], seed) for model, q in pairs]
    prompts = mt_bench_prompts(folder)
    sides = [[model] for model in answers] + [[model, teacher] for model in answers if teacher not in (None, model)]
    return [
        partial(judge_mt_bench, judge, prompts, question, turn, {m: answers[m][question.id][:turn] for m in models})
        for models in sides
        for question in questions
        for turn in range(1, len(question.turns[:2]) + 1)
    ]


def judge_mt_bench(
    judge: Judge,
    prompts: Mapping[str, Mapping[str, str]],
    question: Question,
    turn: int,
    texts: Mapping[str, Sequence[str]],
) -> Judgment:
    """Rate one model's answers up to this turn, or compare two models' in both orders."""
    models, (kind, version) = [*texts], ("single", "v1") if len(texts) == 1 else ("pair", "v2")
    name = f"{kind}-{'math-v1' if question.reference else version}{'-multi-turn' if turn > 1 else ''}"
    template, orders = prompts[name]["prompt_template"], [models, models[::-1]][: len(models)]
    asked = [mt_bench_prompt(template, question, [texts[model] for model in order]) for order in orders]
    system = {"role": "system", "content": prompts[name]["system_prompt"]}
    replies = [judge.ask([system, {"role": "user", "content": text}], 2048) for text in asked]
    row: dict[str, object] = {"question_id": question.id, "judge": [judge.model, name], "turn": turn}
    if kind == "single":
        value = rating(replies[0])
        row |= {"model": models[0], "score": -1 if value is None else value}
        row |= {"user_prompt": asked[0], "judgment": replies[0]}
    else:
        first, second = (names.get(winner(reply), "error") for names, reply in zip(WINNERS, replies, strict=True))
        value = {"model_1": 1.0, "model_2": 0.0}.get(first, 0.5) if first == second else 0.5
        value = None if "error" in (first, second) else value
        row |= {"model_1": models[0], "model_2": models[1], "g1_winner": first, "g2_winner": second}
        row |= {"g1_user_prompt": asked[0], "g1_judgment": replies[0]}
        row |= {"g2_user_prompt": asked[1], "g2_judgment": replies[1]}
    file = (f"{MT_BENCH}/model_judgment/{file_name(judge.model)}_{kind}.jsonl", row | {"tstamp": time.time()})
    against = "".join(models[1:])
    return Judgment(model=models[0], against=against, question=question, turn=turn, value=value, row=file)


def mt_bench_prompt(template: str, question: Question, texts: Sequence[Sequence[str]]) -> str:
    """The template filled in with the answers of one model, or of assistants A and B, up to the turn judged."""
    values = {"question": question.turns[0]}
    values |= {f"question_{n}": text for n, text in enumerate(question.turns, 1)}
    values |= {f"ref_answer_{n}": text for n, text in enumerate(question.reference, 1)}
    for side, own in zip(("",) if len(texts) == 1 else ("_a", "_b"), texts, strict=True):
        values |= {f"answer{side}": own[0]} | {f"answer{side}_{n}": text for n, text in enumerate(own, 1)}
    return template.format(**values)


def rating(reply: str) -> float | None:
    """The first `[[n]]`, else the first `[n]`; None without one, or for one above 10."""
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", reply) or re.search(r"\[(\d+\.?\d*)\]", reply)
    return float(match[1]) if match and float(match[1]) <= 10 else None


def winner(reply: str) -> str:
    """The first of A, B, C (a tie) that the reply has in double brackets, in this order; empty without one."""
    return next((letter for letter in "ABC" if f"[[{letter}]]" in reply), "")


def judge_alpaca(judge: Judge, prompt: Messages, question: Question, model: str, output: str, seed: int) -> Judgment:
    """Whether an output is better than the reference; the order in which both are shown is drawn."""
    swapped = random.Random(f"{seed} {question.id}").random() < 0.5
    first, second = (output, question.reference[0]) if swapped else (question.reference[0], output)
    values = {"instruction": question.turns[0], "output_1": first, "output_2": second}

    def filled(text: str) -> str:  # other braces stay: the prompt shows JSON
        return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)

    reply = judge.ask([{**message, "content": filled(message["content"])} for message in prompt], 16)
    letter = reply.strip(" \t\r\n\"'`.*")
    value = float((letter == "m") == swapped) if letter in ("m", "M") else None
    row: dict[str, object] = {
        "instruction": question.id, "output_1": question.reference[0], "generator_1": question.generator,
        "dataset": question.category, "output_2": output, "generator_2": model, "annotator": judge.model,
        "preference": None if value is None else 1 + value, "raw_completion": reply,
    }  # fmt: skip
    file = f"{ALPACA}/{file_name(model)}/{file_name(judge.model)}/annotations.json"
    return Judgment(model=model, against=question.generator, question=question, turn=1, value=value, row=(file, row))
