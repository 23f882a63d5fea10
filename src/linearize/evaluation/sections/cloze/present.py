"""Numbers of the cloze section, by model, and how they are presented."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linearize.evaluation.context import Cell, Finding, Plot, SectionView, Stat, Table
from linearize.evaluation.numbers import DifferenceNumbers, NumbersModel, Role, ShareNumbers
from linearize.metrics.theme import colours, legend_below, percent_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = ("scored", "generated")


class ModelCloze(NumbersModel):
    """Shares of right words: chosen among others (`scored`), argmax of a full forward (`greedy`), and `generated`.

    `cache_differs`: items where greedy generation and the full forward disagree beyond `ties`.
    """

    role: Role
    scored: ShareNumbers
    greedy: ShareNumbers
    generated: ShareNumbers
    cache_differs: int
    ties: int


class ComparedCloze(ModelCloze):
    """A student with a teacher: teacher less student on the same items; `gap`: generated less scored."""

    scored_drop: DifferenceNumbers
    generated_drop: DifferenceNumbers
    gap: DifferenceNumbers


class ExampleAnswer(NumbersModel):
    """What one model chose and wrote for an item."""

    chose: str
    wrote: str


class ClozeExample(NumbersModel):
    """An item with the answers to it, by model; `context`: the last words before the one asked for."""

    context: str
    word: str
    models: dict[str, ExampleAnswer]


class ClozeNumbers(NumbersModel):
    """`items`: how many; `choices`: of each; `tokens`: of a right word, on average."""

    items: int
    choices: int
    tokens: float
    models: dict[str, ComparedCloze | ModelCloze]
    examples: list[ClozeExample]

    @property
    def compared(self) -> dict[str, ComparedCloze]:
        """The students that have a teacher."""
        return {name: model for name, model in self.models.items() if isinstance(model, ComparedCloze)}


def present(numbers: ClozeNumbers) -> SectionView:
    """The section as people read it."""
    findings = [_gap_finding(name, model) for name, model in numbers.compared.items()]
    return SectionView(
        summary=(
            f"The last word of {numbers.items:,} sentences: chosen among {numbers.choices} by log-likelihood, "
            "and written freely, on the same items."
        ),
        findings=[*findings, *_cache_findings(numbers)],
        tables=[table for table in (_table(numbers), _examples(numbers)) if table.rows],
        plots=[_plot(numbers)],
    )


def headline(numbers: ClozeNumbers) -> Mapping[str, Sequence[Stat]]:
    """The share of words that each student writes, next to the teacher's."""
    models = numbers.models
    teacher = next((m for m in models.values() if m.role == "teacher"), None)
    detail = f"teacher {teacher.generated.percent}" if teacher else "last words written freely"
    return {
        name: [Stat(label="last words written", value=model.generated.percent, detail=detail)]
        for name, model in models.items()
        if model.role == "student"
    }


def _table(numbers: ClozeNumbers) -> Table:
    rows: list[dict[str, Cell]] = []
    for name, model in numbers.models.items():
        row: dict[str, Cell] = {"model": name, "scored": model.scored.text, "generated": model.generated.text}
        row |= {"word is argmax": model.greedy.percent, "cache differs": model.cache_differs}
        if numbers.compared:
            lost = numbers.compared.get(name)
            row["lost when scored"] = lost.scored_drop.text if lost else ""
            row["lost when generating"] = lost.generated_drop.text if lost else ""
            row["difference"] = lost.gap.text if lost else ""
        rows.append(row)
    note = (
        f"Right words, with 95% intervals; chance is {1 / numbers.choices:.0%} when scored, next to nothing when "
        "generating. Word is argmax: every token of the word is the most likely one in a full forward pass. Cache "
        "differs: items where greedy generation wrote those tokens and the full forward pass would not, or the reverse "
        "(0 for a faultless cache). Lost: teacher less student on the same items, with intervals of paired differences."
    )
    return Table(title="Last words", rows=rows, note=note)


def _examples(numbers: ClozeNumbers) -> Table:
    rows = [
        {"text": f"... {item.context}", "word": item.word}
        | {name: f"chose {answer.chose}; wrote {answer.wrote}" for name, answer in item.models.items()}
        for item in numbers.examples
    ]
    return Table(title="The first items", rows=rows)


def _gap_finding(name: str, lost: ComparedCloze) -> Finding:
    scored, generated, gap = lost.scored_drop, lost.generated_drop, lost.gap
    behind = f"behind the teacher by {scored.points} when scored, by {generated.points} when generating"
    if gap.low > 0:
        text = f"scores hide what is lost when it writes: {behind}; the difference is {gap.points}."
        return Finding.on(name, lost.role, "bad", text)
    if generated.low > 0 or scored.low > 0:
        return Finding.on(name, lost.role, "note", f"{behind}; scoring and generating agree within noise.")
    return Finding.on(name, lost.role, "good", f"no loss beyond noise either way: {behind}.")


def _cache_findings(numbers: ClozeNumbers) -> Iterator[Finding]:
    for name, model in numbers.models.items():
        differ, ties = model.cache_differs, model.ties
        if differ:
            text = "decoding through the cache does not do what the full forward does"
            yield Finding.on(name, model.role, "bad", f"{text}: {differ} of {numbers.items} words differ.")
        elif model.role == "student":
            near = f" ({ties} ties within the precision)" if ties else ""
            text = f"writes through its cache what the full forward pass predicts, on all {numbers.items} words{near}."
            yield Finding.on(name, model.role, "good", text)


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
