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
    "looping: answers where it is half or more. Pairs are judged in both orders on MT-Bench; a tie is half a win. "
    "Judges like long answers: read win rates beside the number of words."
)


def present(numbers: ChatNumbers) -> SectionView:
    """Return summary, findings and tables."""
    counts = " and ".join(f"{count} questions of {TITLES[name]}" for name, count in numbers.questions.items())
    by = f"judged by {numbers.judge.model}" if numbers.judge else "not judged (no --judge-url)"
    tables = [_table(name, numbers) for name in numbers.questions]
    if numbers.judge is not None:
        row: dict[str, Cell] = {**numbers.judge.to_json()}
        row["cost"] = "unknown" if numbers.judge.cost is None else numbers.judge.cost
        tables.append(Table(title="What the judge took", rows=[row]))
    return SectionView(
        summary=f"{counts}, at most {numbers.max_new_tokens} tokens an answer; {by}.",
        findings=[*_findings(numbers)],
        tables=tables,
    )


def headline(numbers: ChatNumbers) -> Mapping[str, Sequence[Stat]]:
    """Return each student's rating and win rates; without a judge how many answers loop."""
    stats: dict[str, list[Stat]] = {student: [] for student in numbers.students}
    for student, own in stats.items():
        for name, result in numbers.models[student].items():
            if "rating" in result.means:
                own.append(
                    Stat(label=f"{TITLES[name]} rating", value=f"{result.means['rating'].value:.2f}", detail="of 10")
                )
            if result.win_rate is not None:
                detail = f"against {result.against}"
                own.append(Stat(label=f"{TITLES[name]} wins", value=f"{result.win_rate.value:.0%}", detail=detail))
            if numbers.judge is None:
                value = f"{result.means['looping'].value:.0%}"
                own.append(Stat(label="Looping answers", value=value, detail=f"of {TITLES[name]}"))
    return {student: own[:3] for student, own in stats.items()}


def _table(benchmark: str, numbers: ChatNumbers) -> Table:
    results = {model: own[benchmark] for model, own in numbers.models.items()}
    rows: list[dict[str, Cell]] = [
        {"": measure, **{model: _cell(result, measure) for model, result in results.items()}}
        for measure in dict.fromkeys(name for result in results.values() for name in result.means)
        if measure != "win rate"
    ]
    if numbers.judge is not None:
        wins = {
            model: f"{result.win_rate.text} against {result.against}" if result.win_rate else ""
            for model, result in results.items()
        }
        rows = [{"": "win rate", **wins}, {"": "unrated", **{m: r.unrated for m, r in results.items()}}, *rows]
    return Table(title=TITLES[benchmark], rows=rows, note=NOTE)


def _cell(result: BenchmarkNumbers, measure: str) -> str:
    return result.means[measure].text if measure in result.means else ""


def _findings(numbers: ChatNumbers) -> Iterator[Finding]:
    for model, results in numbers.models.items():
        for benchmark, result in results.items():
            title, above = TITLES[benchmark], result.above_teacher
            for measure, verb in (("looping", "runs in loops"), ("empty", "stays empty")):
                if measure in above and above[measure].low > 0:
                    text = f"{model} {verb} on {title}: {above[measure].text} more answers than the teacher."
                    yield Finding(level="bad", student=model, text=text)
                elif measure in above and above[measure].value <= FEW_MORE and above[measure].high < RULED_OUT:
                    text = f"{model} {verb} on {title} no more often than the teacher."
                    yield Finding(level="good", student=model, text=text)
            if "rating" in above:
                yield _rating_finding(model, title, result)
            if result.unrated:
                yield Finding(level="note", text=f"{model}: {result.unrated} judgments on {title} without a verdict.")
            if result.means["cut"].value:
                text = f"{model}: prompts of {title} that did not fit the context and lost their beginning: {_cell(result, 'cut')}."
                yield Finding(level="note", text=text)
    if not numbers.template:
        yield Finding(level="note", text="The tokenizer has no chat template: a plain User/Assistant one was used.")


def _rating_finding(model: str, title: str, result: BenchmarkNumbers) -> Finding:
    above = result.above_teacher["rating"]
    teacher = result.means["rating"].value - above.value
    facts = f"{model}, {title}: rating {above.value:+.2f} ({above.low:+.2f} to {above.high:+.2f}) from the teacher's"
    if above.high < 0:
        large = -above.value > LARGE_DROP * teacher
        return Finding(level="bad" if large else "note", student=model, text=f"{facts}: a drop beyond noise.")
    if (above.high - above.low) / 2 <= SURE:
        return Finding(level="good", student=model, text=f"{facts}: no drop beyond noise.")
    return Finding(level="note", student=model, text=f"{facts}: too few questions to judge.")
