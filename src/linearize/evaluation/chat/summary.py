"""Numbers of a chat evaluation, from the answers and the judgments of each model; all JSON-able."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from linearize.evaluation.chat.answers import Answers
from linearize.evaluation.chat.data import Question
from linearize.evaluation.chat.journal import Record
from linearize.evaluation.chat.mt_bench import UNRATED, outcome
from linearize.evaluation.chat.texts import described, loops, mean_of, repeated
from linearize.metrics.intervals import Difference, Proportion, paired_difference


def answers_summary(answers: Answers, teacher: Answers | None) -> dict[str, Any]:
    """How the answers look; of a student also how many more questions loop, or stay empty, than of the teacher."""
    found = described(list(answers.described()))
    if teacher is not None and teacher is not answers:
        for name, bad in (("looping_more", loops), ("empty_more", lambda text: not text)):
            own, theirs = (
                [any(bad(turn["text"]) for turn in r["turns"]) for r in a.records] for a in (answers, teacher)
            )
            found[name] = paired_difference(own, theirs).to_dict()
    return found


def repeated_by_category(answers: Answers, questions: Sequence[Question]) -> dict[str, Any]:
    """Mean share of repeated 4-grams in each category."""
    category = {question.id: question.category for question in questions}
    turns = [
        (category[r["question"]], r["question"], repeated(t["text"])[0]) for r in answers.records for t in r["turns"]
    ]
    return {name: mean_of(values, ids) for name, (values, ids) in _grouped(turns).items()}


def scores_summary(judgments: Iterable[Record], questions: Sequence[Question]) -> dict[str, Any]:
    """Mean ratings of one model: overall, by turn, by category; those without a rating are counted, never averaged."""
    category = {question.id: question.category for question in questions}
    every = list(judgments)
    rated = [record for record in every if record["score"] != UNRATED]
    turns = {
        f"turn_{turn}": mean_of(*_columns(record for record in rated if record["turn"] == turn)) for turn in (1, 2)
    }
    by_category = _grouped((category[r["question_id"]], r["question_id"], r["score"]) for r in rated)
    return {
        "overall": mean_of(*_columns(rated)),
        **turns,
        "categories": {name: mean_of(values, ids) for name, (values, ids) in by_category.items()},
        "unrated": len(every) - len(rated),
    }


def _columns(records: Iterable[Record]) -> tuple[list[float], list[Any]]:
    found = list(records)
    return [record["score"] for record in found], [record["question_id"] for record in found]


def _grouped(rows: Iterable[tuple[str, Any, float]]) -> dict[str, tuple[list[float], list[Any]]]:
    """Values and questions of each group, groups in the order in which they come."""
    groups: dict[str, tuple[list[float], list[Any]]] = {}
    for group, question, value in rows:
        values, ids = groups.setdefault(group, ([], []))
        values.append(value)
        ids.append(question)
    return groups


def score_difference(student: Iterable[Record], teacher: Iterable[Record]) -> dict[str, Any] | None:
    """Mean of student - teacher over the turns where both have a rating; None where none has."""
    theirs = {(r["question_id"], r["turn"]): r["score"] for r in teacher if r["score"] != UNRATED}
    both = [r for r in student if r["score"] != UNRATED and (r["question_id"], r["turn"]) in theirs]
    values = [r["score"] - theirs[r["question_id"], r["turn"]] for r in both]
    return mean_of(values, [r["question_id"] for r in both])


def pair_summary(judgments: Iterable[Record]) -> dict[str, Any]:
    """Wins, ties and losses of a student against the teacher, turn by turn, and the win rate (a tie is half a win)
    with an interval over questions."""
    every = list(judgments)
    rated = [(record["question_id"], found) for record in every if (found := outcome(record)) is not None]
    by_question: dict[Any, list[float]] = {}
    for question, found in rated:
        by_question.setdefault(question, []).append(found)
    values = [found for _, found in rated]
    return {
        "wins": values.count(1.0),
        "ties": values.count(0.5),
        "losses": values.count(0.0),
        "unrated": len(every) - len(rated),
        "win_rate": win_rate([sum(found) / len(found) for found in by_question.values()]),
    }


def win_rate(outcomes: Sequence[float]) -> dict[str, Any] | None:
    """The mean of outcomes between 0 (lost) and 1 (won), with an interval that is not empty when all are won."""
    if not outcomes:
        return None
    found: Difference = paired_difference(outcomes, [1 - x for x in outcomes])
    value, low, high = ((1 + x) / 2 for x in (found.value, found.low, found.high))
    return {"value": value, "low": max(0.0, low), "high": min(1.0, high), "n": found.n}


def alpaca_summary(annotations: Sequence[Record], against: str) -> dict[str, Any]:
    """Win rate of a model, over the instructions with a verdict, and how long both sides' outputs are."""
    rated = [record["preference"] for record in annotations if record["preference"] is not None]
    found = Proportion.of(preference == 2 for preference in rated).to_dict()
    lengths: Mapping[str, float] = {
        side: sum(len(record[key]) for record in annotations) / max(1, len(annotations))
        for side, key in (("characters", "output_2"), ("characters_against", "output_1"))
    }
    return {
        "against": against,
        "win_rate": {name: found[name] for name in ("value", "low", "high", "n")} if rated else None,
        "unrated": len(annotations) - len(rated),
        **lengths,
    }
