"""What the chat section measures: how answers look, how a judge rates them, how often they win."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from linearize.evaluation.chat.answering import Answers, Turn
from linearize.evaluation.chat.judge import Judge, Judgment
from linearize.evaluation.numbers import DifferenceNumbers, MeanNumbers, NumbersModel

Values = dict[int | str, float]
"""By question, the mean over its turns."""


class BenchmarkNumbers(NumbersModel):
    """One model on one benchmark: by measure the mean over questions and, of a student, how far it is above its
    teacher's. `win_rate` (a tie is half a win) is over `against`; `unrated`: judgments without a verdict."""

    means: dict[str, MeanNumbers]
    above_teacher: dict[str, DifferenceNumbers]
    against: str
    win_rate: DifferenceNumbers | None
    unrated: int

    def text(self, name: str) -> str:
        """A mean with its error, the win rate with its interval; empty where there is none."""
        if name == "win rate" and self.win_rate is not None:
            return self.win_rate.text
        return self.means[name].text if name in self.means else ""


class JudgeNumbers(NumbersModel):
    """What the judge's replies took. `cost`: None where a price, or the tokens of a reply, are not known."""

    model: str
    replies: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None


class ChatNumbers(NumbersModel):
    """By model and benchmark; `questions`: of each benchmark; `template`: whether the tokenizer has a chat template."""

    models: dict[str, dict[str, BenchmarkNumbers]]
    students: list[str]
    questions: dict[str, int]
    judge: JudgeNumbers | None
    max_new_tokens: int
    template: bool


def repeated(text: str) -> tuple[float, int]:
    """The share of the 4-grams of words (of letters, in a single word) seen before, and how many there are."""
    words = text.split()
    units = words if len(words) > 1 else list(text.strip())
    grams = [tuple(units[i : i + 4]) for i in range(len(units) - 3)]
    return (1 - len(set(grams)) / len(grams) if grams else 0.0), len(grams)


def loops(text: str) -> bool:
    """Whether half of an answer, or more, was said before: a known failure of linearized models."""
    share, grams = repeated(text)
    return share >= 0.5 and grams >= 12


MEASURES: dict[str, Callable[[Turn], float]] = {
    "words": lambda turn: len(turn.text.split()),
    "repeated": lambda turn: repeated(turn.text)[0],
    "looping": lambda turn: loops(turn.text),
    "empty": lambda turn: not turn.text,
    "unended": lambda turn: not turn.ended,
    "cut": lambda turn: turn.cut > 0,
}
"""Of each answer. `repeated`: share of 4-grams seen before; `cut`: whether its prompt lost its beginning."""


def benchmark_numbers(
    answers: Mapping[str, Answers], judgments: Sequence[Judgment], teacher: str | None
) -> dict[str, BenchmarkNumbers]:
    """By model, from its answers and the judgments of them."""
    values = {
        model: {name: {q: fmean(map(measure, turns)) for q, turns in own.items()} for name, measure in MEASURES.items()}
        for model, own in answers.items()
    }
    verdicts: dict[tuple[str, str], dict[int | str, list[float]]] = {}
    for j in judgments:
        names = ["win rate"] if j.against else ["rating", f"rating, turn {j.turn}", f"rating, {j.question.category}"]
        for name in names if j.value is not None else []:
            verdicts.setdefault((j.model, name), {}).setdefault(j.question.id, []).append(j.value or 0.0)
    for (model, name), by_question in verdicts.items():
        values[model][name] = {question: fmean(turns) for question, turns in by_question.items()}
    numbers = {}
    for model, own in values.items():
        other = values[teacher] if teacher is not None and teacher != model else {}
        numbers[model] = BenchmarkNumbers(
            means={name: _mean([*by_question.values()]) for name, by_question in own.items()},
            above_teacher={name: _difference(own[name], other[name]) for name in own if name in other},
            against=next((j.against for j in judgments if j.model == model and j.against), ""),
            win_rate=_win_rate(own["win rate"]) if "win rate" in own else None,
            unrated=sum(j.value is None for j in judgments if j.model == model),
        )
    return numbers


def judge_numbers(judge: Judge, price_in: float | None, price_out: float | None) -> JudgeNumbers:
    """Of all replies in use, those of earlier runs included; prices are for a million tokens."""
    tokens = [(reply["prompt_tokens"], reply["completion_tokens"]) for reply in judge.replies.values()]
    total_in, total_out = (sum(pair[side] or 0 for pair in tokens) for side in (0, 1))
    cost = None
    if price_in is not None and price_out is not None and not any(None in pair for pair in tokens):
        cost = (total_in * price_in + total_out * price_out) / 1e6
    return JudgeNumbers(
        model=judge.model, replies=len(tokens), prompt_tokens=total_in, completion_tokens=total_out, cost=cost
    )


def _mean(values: Sequence[float]) -> MeanNumbers:
    return MeanNumbers(value=fmean(values), error=stdev(values) / len(values) ** 0.5 if len(values) > 1 else None)


def _difference(first: Values, second: Values) -> DifferenceNumbers:
    """First minus second, over the questions that have both."""
    both = [question for question in first if question in second]
    return DifferenceNumbers.of([first[q] for q in both], [second[q] for q in both])


def _win_rate(outcomes: Values) -> DifferenceNumbers:
    """The mean outcome, with an interval that is not empty where all are won."""
    more = _difference(outcomes, {question: 1 - outcome for question, outcome in outcomes.items()})
    value, low, high = ((1 + x) / 2 for x in (more.value, more.low, more.high))
    return DifferenceNumbers(value=value, low=max(0.0, low), high=min(1.0, high), n=more.n)
