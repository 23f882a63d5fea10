"""Numbers of the chat section: how answers look, how a judge rates them, how often they win; and their presentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, stdev

from linearize.evaluation.context import Cell, Finding, SectionView, Stat, Table
from linearize.evaluation.numbers import DifferenceNumbers, MeanNumbers, NumbersModel
from linearize.evaluation.sections.chat.answering import Answers, Turn
from linearize.evaluation.sections.chat.data import TITLES
from linearize.evaluation.sections.chat.judge import Judge, Judgment

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


LARGE_DROP = 0.1  # of the teacher's rating: beyond it, and beyond noise, is a fault
SURE = 0.5  # points: with a wider 95% interval "no drop" says nothing
FEW_MORE, RULED_OUT = 0.02, 0.1  # share of answers: at most so many more is good, if this many can be ruled out
NOTE = (
    "± one standard error over questions. Repeated: share of an answer's 4-grams of words that occurred in it before; "
    "looping: answers where it is half or more. A tie is half a win. Judges like long answers: compare the words too."
)


def present(numbers: ChatNumbers) -> SectionView:
    """Return summary, findings and tables."""
    counts = " and ".join(f"{count} questions of {TITLES[name]}" for name, count in numbers.questions.items())
    by = f"judged by {numbers.judge.model}" if numbers.judge else "not judged (no --judge-url)"
    tables = [_table(name, numbers) for name in numbers.questions]
    if numbers.judge is not None:
        cost = "unknown" if numbers.judge.cost is None else numbers.judge.cost
        tables.append(Table(title="What the judge took", rows=[{**numbers.judge.to_json(), "cost": cost}]))
    summary = f"{counts}, at most {numbers.max_new_tokens} tokens an answer; {by}."
    return SectionView(summary=summary, findings=[*_findings(numbers)], tables=tables)


def headline(numbers: ChatNumbers) -> Mapping[str, Sequence[Stat]]:
    """Return each student's rating and win rates; without a judge how many answers loop."""
    names = ("rating", "win rate") if numbers.judge else ("looping",)
    return {
        student: [
            Stat(label=f"{TITLES[benchmark]}: {name}", value=f"{result.means[name].value:.2f}")
            for benchmark, result in numbers.models[student].items()
            for name in names
            if name in result.means
        ]
        for student in numbers.students
    }


def _table(benchmark: str, numbers: ChatNumbers) -> Table:
    results = {model: own[benchmark] for model, own in numbers.models.items()}
    rows: list[dict[str, Cell]] = [
        {"measure": name, **{model: result.text(name) for model, result in results.items()}}
        for name in dict.fromkeys(name for result in results.values() for name in result.means)
    ]
    if numbers.judge is not None:
        rows.append({"measure": "unrated", **{model: result.unrated for model, result in results.items()}})
    return Table(title=TITLES[benchmark], rows=rows, note=NOTE)


def _findings(numbers: ChatNumbers) -> Iterator[Finding]:
    for model, results in numbers.models.items():
        for benchmark, result in results.items():
            title, above = TITLES[benchmark], result.above_teacher
            for name, verb in (("looping", "runs in loops"), ("empty", "stays empty")):
                if name in above and above[name].low > 0:
                    text = f"{model} {verb} on {title}: {above[name].text} more answers than the teacher."
                    yield Finding(level="bad", student=model, text=text)
                elif name in above and above[name].value <= FEW_MORE and above[name].high < RULED_OUT:
                    text = f"{model} {verb} on {title} no more often than the teacher."
                    yield Finding(level="good", student=model, text=text)
            if "rating" in above:
                yield _rating_finding(model, title, result)
            if result.unrated:
                yield Finding(level="note", text=f"{model}: {result.unrated} judgments on {title} without a verdict.")
            if result.means["cut"].value:
                text = f"{model}: share of {title} prompts too long for the context, cut at the beginning: "
                yield Finding(level="note", text=f"{text}{result.text('cut')}.")
    if not numbers.template:
        yield Finding(level="note", text="The tokenizer has no chat template: a plain User/Assistant one was used.")


def _rating_finding(model: str, title: str, result: BenchmarkNumbers) -> Finding:
    above, own = result.above_teacher["rating"], result.means["rating"].value
    facts = f"{model}, {title}: rating {above.value:+.2f} ({above.low:+.2f} to {above.high:+.2f}) from the teacher's"
    if above.high < 0:
        large = -above.value > LARGE_DROP * (own - above.value)
        return Finding(level="bad" if large else "note", student=model, text=f"{facts}: a drop beyond noise.")
    if (above.high - above.low) / 2 <= SURE:
        return Finding(level="good", student=model, text=f"{facts}: no drop beyond noise.")
    return Finding(level="note", student=model, text=f"{facts}: too few questions to judge.")
