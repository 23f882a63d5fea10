"""What people read of the cloze section: tables, a plot, findings, from the JSON numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from linearize.evaluation.context import Finding, Numbers, Plot, SectionView, Stat, Table
from linearize.metrics.intervals import share_text
from linearize.metrics.theme import colours, legend_below, percent_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = {"scored": "scored", "generated": "generated"}


def present(numbers: Numbers) -> SectionView:
    """The section as people read it."""
    students = [name for name, model in numbers["models"].items() if "gap" in model]
    findings = [f for name in students for f in _gap_findings(numbers, name)] + _cache_findings(numbers)
    return SectionView(
        summary=(
            f"The last word of {numbers['items']:,} sentences: chosen among {numbers['choices']} by log-likelihood, "
            "and written freely, on the same items."
        ),
        findings=findings,
        tables=[table for table in (_table(numbers), _drop_table(numbers, students), _examples(numbers)) if table.rows],
        plots=[_plot(numbers)],
    )


def headline(numbers: Numbers) -> Mapping[str, list[Stat]]:
    """Stats of the verdict, by student."""
    models = numbers["models"]
    teacher = next((m for m in models.values() if m["role"] == "teacher"), None)
    detail = f"teacher {_percent(teacher['generated'])}" if teacher else "last words written freely"
    return {
        name: [Stat(label="last words written", value=_percent(model["generated"]), detail=detail)]
        for name, model in models.items()
        if model["role"] == "student"
    }


def _percent(share: Mapping[str, Any]) -> str:
    return f"{100 * share['value']:.1f}%"


def _interval(share: Mapping[str, Any]) -> str:
    return share_text(share["value"], share["low"], share["high"])


def _points(share: Mapping[str, Any]) -> str:
    return f"{100 * share['value']:.1f} points ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def _table(numbers: Numbers) -> Table:
    rows = [
        {
            "model": name,
            "scored": _interval(model["scored"]),
            "generated": _interval(model["generated"]),
            "word is argmax": _percent(model["greedy"]),
            "cache differs": model["cache_differs"],
        }
        for name, model in numbers["models"].items()
    ]
    note = (
        f"Right words, with 95% intervals; chance is {1 / numbers['choices']:.0%} when scored, next to nothing when "
        "generating. Word is argmax: every token of the word is the most likely one in a full forward pass. Cache "
        "differs: items where greedy generation wrote those tokens and the full forward pass would not, or the reverse "
        "(0 for a faultless cache)."
    )
    return Table(title="Last words", rows=rows, note=note)


def _drop_table(numbers: Numbers, students: list[str]) -> Table:
    rows = []
    for name in students:
        model = numbers["models"][name]
        row = {"student": name, "lost when scored": _interval(model["scored_drop"])}
        rows.append(
            row | {"lost when generating": _interval(model["generated_drop"]), "difference": _interval(model["gap"])}
        )
    note = "Teacher less student on the same items, in points, with 95% intervals of paired differences."
    return Table(title="What the student lost, by way of asking", rows=rows, note=note)


def _examples(numbers: Numbers) -> Table:
    rows = [
        {"text": f"... {item['context']}", "word": item["word"]}
        | {name: f"chose {given['chose']}; wrote {given['wrote']}" for name, given in item["models"].items()}
        for item in numbers["examples"]
    ]
    return Table(title="The first items", rows=rows)


def _gap_findings(numbers: Numbers, name: str) -> list[Finding]:
    model = numbers["models"][name]
    scored, generated, gap = model["scored_drop"], model["generated_drop"], model["gap"]
    told = f"behind the teacher by {_points(scored)} when scored, by {_points(generated)} when generating"
    if gap["low"] > 0:
        level, text = "bad", f"scores hide what is lost when it writes: {told}; the difference is {_points(gap)}"
    elif generated["low"] > 0 or scored["low"] > 0:
        level, text = "note", f"{told}; scoring and generating agree within noise"
    else:
        level, text = "good", f"no loss beyond noise either way: {told}"
    return [Finding(level=level, text=f"{name}: {text}.", student=name)]  # type: ignore[arg-type]


def _cache_findings(numbers: Numbers) -> list[Finding]:
    found = []
    for name, model in numbers["models"].items():
        student = name if model["role"] == "student" else None
        count, ties = model["cache_differs"], model["ties"]
        if count:
            text = (
                f"{name}: decoding through the cache does not do what the full forward does: {count} of "
                f"{numbers['items']} words differ."
            )
            found.append(Finding(level="bad", text=text, student=student))
        elif student is not None:
            few = f" ({ties} ties within the precision)" if ties else ""
            text = (
                f"{name}: writes through its cache what the full forward pass predicts, on all {numbers['items']} words"
            )
            found.append(Finding(level="good", text=f"{text}{few}.", student=student))
    return found


def _plot(numbers: Numbers) -> Plot:
    models = numbers["models"]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        palette = colours(models)
        width = 0.8 / len(models)
        for i, (name, model) in enumerate(models.items()):
            at = [k + (i - (len(models) - 1) / 2) * width for k in range(len(WAYS))]
            values = [model[way]["value"] for way in WAYS]
            below = [max(model[way]["value"] - model[way]["low"], 0.0) for way in WAYS]
            above = [max(model[way]["high"] - model[way]["value"], 0.0) for way in WAYS]
            bar: dict[str, Any] = {"color": palette[name], "label": name, "capsize": 3}
            axis.bar(at, values, width=width * 0.92, yerr=[below, above], **bar)
        axis.axhline(1 / numbers["choices"], xmax=0.5, color="gray", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(WAYS)), [f"{text}" for text in WAYS.values()])
        axis.yaxis.set_major_formatter(percent_label)
        axis.set(title="Right last words", ylim=(0, 1))
        legend_below(figure)

    caption = "Right last words by model, scored among choices (dashed: chance) and generated; lines are 95% intervals."
    return Plot(name="cloze", caption=caption, draw=draw, width=4.8, height=3.6)
