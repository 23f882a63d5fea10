"""The recall section as people read it: what the numbers mean, tables, heat maps and lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linearize.evaluation.context import Cell, Finding, Plot, SectionView, Stat, Table
from linearize.evaluation.sections.recall.numbers import (
    CellNumbers,
    ComparedNumbers,
    ModelRecall,
    RecallNumbers,
    TestName,
)
from linearize.metrics.theme import HEAT, colours, count_label, legend_below, percent_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TESTS: dict[TestName, str] = {
    "needle": "needle in a haystack",
    "passkey": "pass key in noise",
    "keys": "several facts, asked in turn",
    "multikey": "one of several needles",
    "multivalue": "all codes of one thing",
}
AT_LENGTHS: dict[TestName, str] = {
    "passkey": "Pass key", "multikey": "One of several needles", "multivalue": "All codes of one thing",
}  # fmt: skip
KEPT, NOTHING = 0.9, 0.2
"""Of the teacher's answers: kept well from here on; nothing recalled below."""
SPELLED_OUT = 6
"""Columns of a heat map whose cells are wide enough for their number."""


def present(numbers: RecallNumbers) -> SectionView:
    """The section as people read it."""
    models = numbers.models
    first = _any(models)
    lengths = sorted({cell.group for cell in first.needle.cells})
    summary = (
        f"Facts hidden in {lengths[0]} to {lengths[-1]} tokens of text and asked for at its end: {first.needle.n} "
        f"needles, {first.passkey.n} in repeated noise, {first.keys.n} questions among several facts{_further(first)}. "
        "Only the exact answer counts, generated greedily through the model's own cache; all models get the same items."
    )
    plots = [*_heat_plots(models), *(_line_plot(models, test) for test in first.tests if test != "needle")]
    return SectionView(summary=summary, findings=_findings(models), tables=_tables(models), plots=plots)


def headline(numbers: RecallNumbers) -> dict[str, list[Stat]]:
    """How much each student keeps of what its teacher recalls, in the first test that the teacher can do."""
    stats: dict[str, list[Stat]] = {}
    for name, model in numbers.models.items():
        if model.needle.against_teacher is None:
            continue
        test = next((test for test in model.tests if _groups(model, test)), None)
        stat = Stat(label="Recall kept", value="-", detail="the teacher itself recalls too little here")
        if test is not None:
            compared, where = _counted(model, test)
            detail = f"{compared.kept.count} answers of the teacher{where}: {TESTS[test]}"
            value = f"{compared.kept.value:.0%}" if compared.kept.n else "-"
            stat = Stat(label="Recall kept", value=value, detail=detail)
        stats[name] = [stat]
    return stats


def _further(model: ModelRecall) -> str:
    """The tests that not every evaluation runs."""
    parts = []
    if model.multikey is not None:
        parts.append(f"{model.multikey.n} for one of several needles")
    if model.multivalue is not None:
        parts.append(f"{model.multivalue.n} for all codes of one thing")
    return "".join(f", {part}" for part in parts)


def _any(models: Mapping[str, ModelRecall]) -> ModelRecall:
    return next(iter(models.values()))


def _groups(model: ModelRecall, test: TestName) -> list[int]:
    """The lengths, or numbers of facts, that the teacher can do."""
    against = model.test(test).against_teacher
    return against.groups if against is not None else []


def _counted(model: ModelRecall, test: TestName) -> tuple[ComparedNumbers, str]:
    """The items beyond the student's window, where it has one and there are such items, else all; and which."""
    against = model.test(test).against_teacher
    assert against is not None
    beyond = against.beyond_window
    if beyond is None or not beyond.student.n:
        return against.all, ""
    return beyond, f" beyond the window of {model.window_reach} tokens"


def _findings(models: Mapping[str, ModelRecall]) -> list[Finding]:
    findings: list[Finding] = []
    for test in _any(models).tests:
        title = TESTS[test]
        students = {name: model for name, model in models.items() if model.test(test).against_teacher is not None}
        if not students:
            continue
        teacher = next(model.test(test) for model in models.values() if model.role == "teacher")
        if _groups(_any(students), test):
            findings += [_judged(name, title, model, test) for name, model in students.items()]
        else:
            text = f"The teacher itself answers {teacher.count} ({title}): this test says nothing about its students."
            findings.append(Finding(level="note", text=text))
    return [*findings, *(_cache_finding(name, model) for name, model in models.items())]


def _judged(name: str, title: str, model: ModelRecall, test: TestName) -> Finding:
    """The judgement on a student against its teacher, on the items that count."""
    compared, where = _counted(model, test)
    student, teacher, kept = compared.student, compared.teacher, compared.kept
    facts = f"{title}: {student.count} facts{where} recalled, the teacher {teacher.count}{_only(model, test)}"
    share = f"of the teacher's answers {kept.count} are kept, {kept.text}"
    apart = student.high < teacher.low
    if apart and student.value < NOTHING * teacher.value:
        return Finding.on(name, model.role, "bad", f"{facts}: next to nothing comes back from there.")
    if kept.value >= KEPT:
        return Finding.on(name, model.role, "good", f"{facts}; {share}.")
    if apart or kept.high < KEPT:
        return Finding.on(name, model.role, "note", f"{facts}, clearly less; {share}.")
    return Finding.on(name, model.role, "note", f"{facts}; {share}: too few items to tell whether it lags.")


def _only(model: ModelRecall, test: TestName) -> str:
    """Which lengths or numbers of facts count, where the teacher cannot do all of them."""
    groups = _groups(model, test)
    if len(groups) == len({cell.group for cell in model.test(test).cells}):
        return ""
    kind = "numbers of facts" if test == "keys" else "lengths"
    return f" (counted at {kind} {', '.join(map(str, groups))}: elsewhere the teacher itself answers too little)"


def _cache_finding(name: str, model: ModelRecall) -> Finding:
    cache, way = model.cache, "decoding through the cache, in padded batches,"
    ties = f" ({cache.ties} near ties apart)" if cache.ties else ""
    if cache.differ:
        text = f"{way} does not do what the full forward does: {cache.differ} of {cache.items} items differ{ties}."
        return Finding.on(name, model.role, "bad", text)
    text = f"{way} gives what the full forward gives, on all {cache.items} items{ties}."
    return Finding.on(name, model.role, "good", text)


def _tables(models: Mapping[str, ModelRecall]) -> list[Table]:
    rows: list[dict[str, Cell]] = []
    for test in _any(models).tests:
        for name, model in models.items():
            row: dict[str, Cell] = {"test": TESTS[test], "model": name, "right": model.test(test).count}
            row["share"] = model.test(test).text
            if any(m.test(test).against_teacher for m in models.values()):
                against = model.test(test).against_teacher
                row["of the teacher's answers"] = against.all.kept.text if against else ""
                beyond = against.beyond_window if against else None
                row["of those beyond the window"] = beyond.kept.text if beyond else ""
            rows.append(row)
    note = (
        "Exact answers, with 95% intervals. Questions about one document count as independent items. The teacher's "
        "answers count at lengths, and numbers of facts, where it answers half or more, and more than by guessing."
    )
    at_lengths = [test for test in AT_LENGTHS if test in _any(models).tests]
    return [
        Table(title="Recall", rows=rows, note=note),
        _cell_table(models, "needle", "Needle by length and depth"),
        *(_cell_table(models, test, f"{AT_LENGTHS[test]} by length") for test in at_lengths),
        _cell_table(models, "keys", "Several facts in one document, by their number"),
    ]


def _cell_table(models: Mapping[str, ModelRecall], test: TestName, title: str) -> Table:
    """A row per cell, a column per model."""
    rows: list[dict[str, Cell]] = []
    for index, cell in enumerate(_any(models).test(test).cells):
        row: dict[str, Cell] = {"facts" if test == "keys" else "length": cell.group}
        row |= {"depth": f"{cell.depth:.0%}"} if cell.depth is not None else {}
        row |= {"tokens": f"{cell.tokens:.0f}", "tokens back": f"{cell.distance:.0f}"}
        row |= {name: model.test(test).cells[index].count for name, model in models.items()}
        rows.append(row | ({"guessing": f"{cell.chance:.0%}"} if cell.chance is not None else {}))
    return Table(title=title, rows=rows, note=_beyond_context(models, test))


def _beyond_context(models: Mapping[str, ModelRecall], test: TestName) -> str:
    notes = []
    for name, model in models.items():
        far = [cell.group for cell in model.test(test).cells if cell.beyond_context]
        if far:
            kind = "facts" if test == "keys" else "tokens"
            notes.append(f"From {min(far)} {kind} on, texts are longer than {name}'s context of {model.context}.")
    return " ".join(notes)


def _heat_plots(models: Mapping[str, ModelRecall]) -> list[Plot]:
    """A plot per student, next to the teacher; a model alone by itself."""
    teacher = next((name for name, model in models.items() if model.role == "teacher"), None)
    students = [name for name in models if name != teacher]
    pairs = [[teacher, name] if teacher else [name] for name in students] or [list(models)]
    return [_heat_plot({name: models[name] for name in pair}) for pair in pairs]


def _heat_plot(pair: Mapping[str, ModelRecall]) -> Plot:
    names = list(pair)
    shares = " and ".join(f"{name} {pair[name].needle.text}" for name in names)
    depths = len({cell.depth for cell in pair[names[0]].needle.cells})

    def draw(figure: Figure) -> None:
        panels = list(figure.subplots(1, len(names), squeeze=False, sharey=True)[0])
        for axis, name in zip(panels, names, strict=True):
            image = _heat(axis, pair[name].needle.cells, name)
        panels[0].set_ylabel("depth of the needle")
        if len(panels[0].get_xticks()) > SPELLED_OUT:
            figure.colorbar(image, ax=panels, format=percent_label, location="bottom", label="exact answers")

    return Plot(
        name=f"recall_needle_{re.sub(r'[^A-Za-z0-9]+', '_', names[-1])}",
        caption=f"Share of needles recalled, by length of the text and depth of the needle in it: {shares}.",
        draw=draw,
        height=1.5 + 0.42 * min(depths, 10),
    )


def _heat(axis: Axes, cells: Sequence[CellNumbers], name: str) -> Any:
    """One model's grid, the start of the text on top; every cell shows its share where it is wide enough."""
    lengths = sorted({cell.group for cell in cells})
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    share = {(cell.group, cell.depth): cell.value for cell in cells}
    grid = [[share[length, depth] for length in lengths] for depth in depths]
    image = axis.imshow(grid, vmin=0, vmax=1, cmap=HEAT, aspect="auto", interpolation="nearest")
    axis.grid(False)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_xticks(range(len(lengths)), [count_label(length) for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(title=name, xlabel="tokens of text")
    if len(lengths) <= SPELLED_OUT:
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                ink = "black" if value > 0.6 else "white"
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", color=ink, fontsize=9)
    return image


def _line_plot(models: Mapping[str, ModelRecall], test: TestName) -> Plot:
    """Share by number of facts or by length, with intervals; models side by side at each."""
    label = "facts in the document" if test == "keys" else "tokens of text"
    title = "Answers among several facts" if test == "keys" else f"{AT_LENGTHS[test]} recalled"
    shares = ", ".join(f"{name} {model.test(test).count}" for name, model in models.items())
    guessing = " The dashed line is a guess among the document's answers." if test == "keys" else ""

    def draw(figure: Figure) -> None:
        axis: Axes = figure.subplots()
        palette = colours(models)
        cells = _any(models).test(test).cells
        for number, (name, model) in enumerate(models.items()):
            shift = 0.08 * (number - (len(models) - 1) / 2)
            _line(axis, model.test(test).cells, shift, name, palette[name])
        if test == "keys":
            at, chance = range(len(cells)), [cell.chance or 0.0 for cell in cells]
            axis.plot(at, chance, color="#8a8a8a", linestyle="--", linewidth=1.2, label="guessing")
        axis.set_xticks(range(len(cells)), [count_label(cell.group) for cell in cells])
        axis.yaxis.set_major_formatter(percent_label)
        axis.set(title=title, xlabel=label, ylabel="exact answers", ylim=(-0.03, 1.03))
        axis.margins(x=0.1)
        legend_below(figure)

    return Plot(name=f"recall_{test}", caption=f"{title}, with 95% intervals: {shares}.{guessing}", draw=draw)


def _line(axis: Axes, cells: Sequence[CellNumbers], shift: float, name: str, colour: str) -> None:
    values = [cell.value for cell in cells]
    errors = [[cell.value - cell.low for cell in cells], [cell.high - cell.value for cell in cells]]
    at = [x + shift for x in range(len(cells))]
    axis.errorbar(at, values, yerr=errors, marker="o", color=colour, capsize=3, label=name, clip_on=False)
