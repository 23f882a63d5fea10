"""MT-Bench (2306.05685): answers and judgments as FastChat writes them, prompts and parsing as FastChat has them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.evaluation.chat.answering import Ask
from linearize.evaluation.chat.answers import Answers, answer_all, answer_ids
from linearize.evaluation.chat.data import TEMPERATURES, Question
from linearize.evaluation.chat.journal import Journal, Record, file_name
from linearize.evaluation.chat.judge import Judge
from linearize.evaluation.context import EvalModel

NAME = "mt_bench"
JUDGE_TOKENS = 2048
BEST = 10.0  # the prompts ask for 1 to 10; a judge that gives 0 to an empty answer is taken at its word
RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
UNRATED = -1
Prompts = Mapping[str, Mapping[str, str]]


def rating(reply: str) -> float | None:
    """The first `[[n]]`, else the first `[n]`; None without one, or for one above 10."""
    found = next((match for pattern in RATING if (match := pattern.search(reply))), None)
    value = float(found[1]) if found else None
    return value if value is not None and value <= BEST else None


def winner(reply: str) -> str | None:
    """`A` for `[[A]]`, `B` for `[[B]]`, `tie` for `[[C]]`; the first of them in this order that is there, else None."""
    marks = (("[[A]]", "A"), ("[[B]]", "B"), ("[[C]]", "tie"))
    return next((found for mark, found in marks if mark in reply), None)


def answer(
    eval_model: EvalModel,
    questions: Sequence[Question],
    *,
    seed: int,
    max_new_tokens: int,
    batch: int,
    root: Path | None,
    progress: Callable[[int, int], None],
) -> Answers:
    """Answers to all turns, also in `root/mt_bench/model_answer/NAME.jsonl`, a line a question as it is answered."""
    asks = {
        q.id: Ask(turns=q.turns, temperature=TEMPERATURES.get(q.category, 0.7), seed=f"{seed}/{NAME}/{q.id}")
        for q in questions
    }
    ids = answer_ids(eval_model, NAME, asks, max_new_tokens)
    path = None if root is None else root / NAME / "model_answer" / f"{file_name(eval_model.name)}.jsonl"
    official = Journal(path, stale=lambda r: ids.get(r.get("question_id"), r.get("answer_id")) != r.get("answer_id"))
    written = {record["answer_id"] for record in official.records}

    def done(record: Record) -> None:
        if record["id"] not in written:
            official.append(official_answer(record, eval_model.name))

    return answer_all(
        eval_model, asks, benchmark=NAME, max_new_tokens=max_new_tokens, batch=batch, root=root, done=done,
        progress=progress,
    )  # fmt: skip


def official_answer(record: Record, name: str) -> Record:
    """A line of FastChat's answer files."""
    return {
        "question_id": record["question"],
        "answer_id": record["id"],
        "model_id": name,
        "choices": [{"index": 0, "turns": [turn["text"] for turn in record["turns"]]}],
        "tstamp": record["tstamp"],
    }


@dataclass(frozen=True, kw_only=True)
class Match:
    """One thing to judge: the answers of one model, or of two, up to this turn (1 or 2)."""

    question: Question
    turn: int
    models: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]

    @property
    def pair(self) -> bool:
        """Whether two models are compared."""
        return len(self.models) == 2

    @property
    def prompt_name(self) -> str:
        """Of the official prompt."""
        kind = "pair" if self.pair else "single"
        version = "math-v1" if self.question.needs_reference else "v2" if self.pair else "v1"
        return f"{kind}-{version}{'-multi-turn' if self.turn > 1 else ''}"

    def user_prompt(self, template: str, swapped: bool = False) -> str:
        """The prompt filled in; `swapped`: the second model is assistant A."""
        values = {"question": self.question.turns[0]}
        for turn in range(self.turn):
            values[f"question_{turn + 1}"] = self.question.turns[turn]
            if self.question.needs_reference:
                values[f"ref_answer_{turn + 1}"] = self.question.reference[turn]
        if self.pair:
            sides = self.answers[::-1] if swapped else self.answers
            for side, answers in zip("ab", sides, strict=True):
                values[f"answer_{side}"] = answers[0]
                values |= {f"answer_{side}_{turn + 1}": answers[turn] for turn in range(self.turn)}
        else:
            values["answer"] = self.answers[0][0]
            values |= {f"answer_{turn + 1}": self.answers[0][turn] for turn in range(self.turn)}
        return template.format(**values)


def matches(questions: Sequence[Question], answers: Sequence[Answers], pairs: bool) -> Iterator[Match]:
    """All that is judged: each model alone (or, with `pairs`, each against the first), both turns of each question.

    The first of `answers` is the teacher's; the second turn is judged where there are exactly two, as FastChat does.
    """
    texts = {
        a.eval_model: {r["question"]: tuple(turn["text"] for turn in r["turns"]) for r in a.records} for a in answers
    }
    names = [a.eval_model for a in answers]
    fields = [(name, names[0]) for name in names[1:]] if pairs else [(name,) for name in names]
    for models in fields:
        for question in questions:
            for turn in (1, 2) if len(question.turns) == 2 else (1,):
                held = tuple(texts[name][question.id] for name in models)
                yield Match(question=question, turn=turn, models=models, answers=held)


def judge_match(match: Match, judge: Judge, prompts: Prompts) -> Record:
    """Ask the judge (both orders of a pair), and return the line of FastChat's judgment file."""
    prompt = prompts[match.prompt_name]
    label = f"{NAME}/{match.question.id}/{match.turn}/{'/'.join(match.models)}"

    def ask(swapped: bool, parse: Callable[[str], Any]) -> tuple[Any, str, str]:
        text = match.user_prompt(prompt["prompt_template"], swapped)
        messages = [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": text}]
        found, reply = judge.ask(f"{label}/{int(swapped)}", messages, parse, max_tokens=JUDGE_TOKENS)
        return found, text, reply

    common = {"judge": [judge.config.model, match.prompt_name]}
    if not match.pair:
        score, text, reply = ask(False, rating)
        return {
            "question_id": match.question.id, "model": match.models[0], **common, "user_prompt": text,
            "judgment": reply, "score": UNRATED if score is None else score, "turn": match.turn, "tstamp": time.time(),
        }  # fmt: skip
    first, text_1, reply_1 = ask(False, winner)
    second, text_2, reply_2 = ask(True, winner)
    return {
        "question_id": match.question.id, "model_1": match.models[0], "model_2": match.models[1],
        "g1_winner": {"A": "model_1", "B": "model_2", "tie": "tie"}.get(first, "error"),
        "g2_winner": {"A": "model_2", "B": "model_1", "tie": "tie"}.get(second, "error"),
        **common, "g1_user_prompt": text_1, "g1_judgment": reply_1, "g2_user_prompt": text_2, "g2_judgment": reply_2,
        "turn": match.turn, "tstamp": time.time(),
    }  # fmt: skip


def outcome(judgment: Record) -> float | None:
    """Of a pair, for the first model: 1 a win, 0 a loss, 0.5 a tie or orders that disagree; None: unrated."""
    first, second = judgment["g1_winner"], judgment["g2_winner"]
    if "error" in (first, second):
        return None
    if first != second or first == "tie":
        return 0.5
    return 1.0 if first == "model_1" else 0.0


class Judgments:
    """The judgments of one kind, `root/mt_bench/model_judgment/JUDGE_{single,pair}.jsonl`, and what is still missing.

    A judgment holds for the prompt that it answers: one of other answers leaves the file.
    """

    def __init__(self, root: Path | None, judge: Judge, prompts: Prompts, wanted: Sequence[Match]) -> None:
        self.judge, self.prompts, self.wanted = judge, prompts, wanted
        kind = "pair" if any(match.pair for match in wanted) else "single"
        name = f"{file_name(judge.config.model)}_{kind}.jsonl"
        path = None if root is None else root / NAME / "model_judgment" / name
        self._prompts = {self._key(match): self._text(match) for match in wanted}
        self._journal = Journal(path, stale=self._stale)
        self._found = {_key(record): record for record in self._journal.records}

    def judge_one(self, match: Match) -> Record:
        """The judgment of a match, kept or new. (Replies are kept apart, so a half-judged pair is asked only for its
        second half; asking also counts what the kept replies took.)"""
        new = judge_match(match, self.judge, self.prompts)
        key = self._key(match)
        if key not in self._found:
            self._found[key] = self._journal.append(new)
        return self._found[key]

    def _key(self, match: Match) -> tuple[Any, ...]:
        return (match.question.id, match.turn, *match.models, self.judge.config.model, match.prompt_name)

    def _text(self, match: Match) -> str:
        return match.user_prompt(self.prompts[match.prompt_name]["prompt_template"])

    def _stale(self, record: Record) -> bool:
        asked = self._prompts.get(_key(record))
        return asked is not None and asked != record.get("user_prompt", record.get("g1_user_prompt"))


def _key(record: Record) -> tuple[Any, ...]:
    models = (record["model"],) if "model" in record else (record.get("model_1"), record.get("model_2"))
    return (record.get("question_id"), record.get("turn"), *models, *record.get("judge", ()))
