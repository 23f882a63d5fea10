"""What people read of the cloze section: tables, a plot, findings, from the JSON numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from linearize.evaluation.context import Cell, Finding, Plot, SectionView, Stat, Table
from linearize.evaluation.sections.cloze.numbers import ClozeNumbers, LostShares
from linearize.metrics.theme import colours, legend_below, percent_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = ("scored", "generated")


def present(numbers: ClozeNumbers) -> SectionView:
    """The section as people read it."""
    lost = {name: model.lost for name, model in numbers.models.items() if model.lost is not None}
    findings = [_gap_finding(name, shares) for name, shares in lost.items()] + _cache_findings(numbers)
    return SectionView(
        summary=(
            f"The last word of {numbers.items:,} sentences: chosen among {numbers.choices} by log-likelihood, "
            "and written freely, on the same items."
        ),
        findings=findings,
        tables=[table for table in (_table(numbers), _drop_table(lost), _examples(numbers)) if table.rows],
        plots=[_plot(numbers)],
    )


def headline(numbers: ClozeNumbers) -> Mapping[str, list[Stat]]:
    """Stats of the verdict, by student."""
    models = numbers.models
    teacher = next((m for m in models.values() if m.role == "teacher"), None)
    detail = f"teacher {teacher.generated.percent}" if teacher else "last words written freely"
    return {
        name: [Stat(label="last words written", value=model.generated.percent, detail=detail)]
        for name, model in models.items()
        if model.role == "student"
    }


def _table(numbers: ClozeNumbers) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "model": name,
            "scored": model.scored.text,
            "generated": model.generated.text,
            "word is argmax": model.greedy.percent,
            "cache differs": model.cache_differs,
        }
        for name, model in numbers.models.items()
    ]
    note = (
        f"Right words, with 95% intervals; chance is {1 / numbers.choices:.0%} when scored, next to nothing when "
        "generating. Word is argmax: every token of the word is the most likely one in a full forward pass. Cache "
        "differs: items where greedy generation wrote those tokens and the full forward pass would not, or the reverse "
        "(0 for a faultless cache)."
    )
    return Table(title="Last words", rows=rows, note=note)


def _drop_table(lost: Mapping[str, LostShares]) -> Table:
    rows = [
        {
            "student": name,
            "lost when scored": shares.scored_drop.text,
            "lost when generating": shares.generated_drop.text,
            "difference": shares.gap.text,
        }
        for name, shares in lost.items()
    ]
    note = "Teacher less student on the same items, in points, with 95% intervals of paired differences."
    return Table(title="What the student lost, by way of asking", rows=rows, note=note)


def _examples(numbers: ClozeNumbers) -> Table:
    rows = [
        {"text": f"... {item.context}", "word": item.word}
        | {name: f"chose {answer.chose}; wrote {answer.wrote}" for name, answer in item.models.items()}
        for item in numbers.examples
    ]
    return Table(title="The first items", rows=rows)


def _gap_finding(name: str, lost: LostShares) -> Finding:
    scored, generated, gap = lost.scored_drop, lost.generated_drop, lost.gap
    behind = f"behind the teacher by {scored.points} when scored, by {generated.points} when generating"
    level: Literal["good", "note", "bad"]
    if gap.low > 0:
        level, text = "bad", f"scores hide what is lost when it writes: {behind}; the difference is {gap.points}"
    elif generated.low > 0 or scored.low > 0:
        level, text = "note", f"{behind}; scoring and generating agree within noise"
    else:
        level, text = "good", f"no loss beyond noise either way: {behind}"
    return Finding(level=level, text=f"{name}: {text}.", student=name)


def _cache_findings(numbers: ClozeNumbers) -> list[Finding]:
    found = []
    for name, model in numbers.models.items():
        student = name if model.role == "student" else None
        count, ties = model.cache_differs, model.ties
        if count:
            text = (
                f"{name}: decoding through the cache does not do what the full forward does: {count} of "
                f"{numbers.items} words differ."
            )
            found.append(Finding(level="bad", text=text, student=student))
        elif student is not None:
            few = f" ({ties} ties within the precision)" if ties else ""
            text = f"{name}: writes through its cache what the full forward pass predicts, on all {numbers.items} words"
            found.append(Finding(level="good", text=f"{text}{few}.", student=student))
    return found


def _plot(numbers: ClozeNumbers) -> Plot:
    models = numbers.models

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        palette = colours(models)
        width = 0.8 / len(models)
        for i, (name, model) in enumerate(models.items()):
            at = [k + (i - (len(models) - 1) / 2) * width for k in range(len(WAYS))]
            shares = [model.scored, model.generated]
            values = [share.value for share in shares]
            below = [max(share.value - share.low, 0.0) for share in shares]
            above = [max(share.high - share.value, 0.0) for share in shares]
            bar: dict[str, Any] = {"color": palette[name], "label": name, "capsize": 3}
            axis.bar(at, values, width=width * 0.92, yerr=[below, above], **bar)
        axis.axhline(1 / numbers.choices, xmax=0.5, color="gray", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(WAYS)), WAYS)
        axis.yaxis.set_major_formatter(percent_label)
        axis.set(title="Right last words", ylim=(0, 1))
        legend_below(figure)

    caption = "Right last words by model, scored among choices (dashed: chance) and generated; lines are 95% intervals."
    return Plot(name="cloze", caption=caption, draw=draw, width=4.8, height=3.6)
