"""The chat section as people read it: a table for each benchmark, and what it says of each student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from linearize.evaluation.chat.data import TITLES
from linearize.evaluation.context import Cell, Finding, SectionView, Stat, Table
from linearize.evaluation.sections.chat.numbers import BenchmarkNumbers, ChatNumbers

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
