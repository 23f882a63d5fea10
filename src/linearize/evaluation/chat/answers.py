"""Answers of a model, kept as they come: our own records, and from them the official files.

`chat/NAME.jsonl` holds a record a question: the answers' texts, how many tokens they took, whether they ended. Its `id`
is a hash of all that the answer depends on, so that a record is used again only where it would come out the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from linearize.evaluation.chat.answering import Ask, hold
from linearize.evaluation.chat.journal import Journal, Record, file_name
from linearize.evaluation.context import EvalModel


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All answers of one model to one benchmark: records in the order of the questions."""

    eval_model: str
    records: Sequence[Record]

    def described(self) -> Iterator[dict[str, Any]]:
        """Each answer alone, as `texts.described` takes them."""
        for record in self.records:
            for turn in record["turns"]:
                yield {"question": record["question"], **turn}


def answer_all(
    eval_model: EvalModel,
    asks: Mapping[Any, Ask],
    *,
    benchmark: str,
    max_new_tokens: int,
    batch: int,
    root: Path | None,
    done: Callable[[Record], None] = lambda record: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Answers to all questions, by their id; those in the journal under `root` are not written again.

    Questions are answered in groups of `batch`, always the same ones. `done` is called with each record, old or new, in
    order.
    """
    ids = answer_ids(eval_model, benchmark, asks, max_new_tokens)
    path = None if root is None else root / "chat" / f"{benchmark}-{file_name(eval_model.name)}.jsonl"
    journal = Journal(path, stale=lambda r: ids.get(r.get("question"), r.get("id")) != r.get("id"))
    kept = {record["id"]: record for record in journal.records}
    questions = list(asks)
    for start in range(0, len(questions), batch):
        group = questions[start : start + batch]
        if any(ids[question] not in kept for question in group):
            held = hold(eval_model.model, eval_model.tokenizer, [asks[question] for question in group], max_new_tokens)
            for question, turns in zip(group, held, strict=True):
                if ids[question] not in kept:
                    new = {"question": question, "id": ids[question], "turns": [asdict(turn) for turn in turns]}
                    kept[ids[question]] = journal.append({**new, "tstamp": time.time()})
        for question in group:
            done(kept[ids[question]])
        progress(min(start + batch, len(questions)), len(questions))
    return Answers(eval_model=eval_model.name, records=[kept[ids[question]] for question in questions])


def answer_ids(eval_model: EvalModel, benchmark: str, asks: Mapping[Any, Ask], max_new_tokens: int) -> dict[Any, str]:
    """By question 22 characters, as FastChat's are: a hash of all that the answer depends on."""
    who = [eval_model.name, eval_model.fingerprint or eval_model.path, eval_model.tokenizer.chat_template, benchmark]
    return {
        question: hashlib.sha256(
            json.dumps([*who, list(ask.turns), ask.temperature, ask.seed, max_new_tokens]).encode()
        ).hexdigest()[:22]
        for question, ask in asks.items()
    }
