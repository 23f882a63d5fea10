"""Numbers of the tasks section, by model, and how they are presented."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from linearize.evaluation.context import Cell, Finding, Plot, SectionView, Stat, Table
from linearize.evaluation.harness.outcome import CLEAR, Average, AverageShare, Contrast, Scored, Share
from linearize.evaluation.numbers import NumbersModel
from linearize.metrics import theme
from linearize.metrics.intervals import Z95

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT_WELL = 0.9  # a share whose interval ends below is a fault
AVERAGES: dict[Literal["all", "without_mmlu"], str] = {"all": "average", "without_mmlu": "average without MMLU"}


class TaskScore(Scored):
    """A task on a model: `score`, the mean of the first metric, its standard error, and what guessing scores.

    `inside_window`: the share of items that the students' window holds whole, prompt and answer (None: no window)."""

    score: float
    stderr: float | None
    chance: float
    inside_window: float | None

    @property
    def above_chance(self) -> bool:
        """Whether the model is clearly above chance."""
        above = self.score - self.chance
        return self.stderr is not None and above > 0 and above > CLEAR * self.stderr and not self.lower_is_better


class TasksNumbers(NumbersModel):
    """`source`: where the items come from; `batch` rows of at most `max_length` tokens; `limit`: items of each task;
    `window_reach`: tokens that the shortest window among the models holds (None: there is none).

    `notes`, `commands`: by task. `models`, `averages`: by model. `against_teacher`, `kept`: by student.
    """

    lm_eval: str
    source: str
    batch: int
    max_length: int
    limit: int | None
    window_reach: int | None
    notes: dict[str, str]
    commands: dict[str, str]
    models: dict[str, dict[str, TaskScore]]
    averages: dict[str, dict[Literal["all", "without_mmlu"], Average]]
    against_teacher: dict[str, dict[str, Contrast]]
    kept: dict[str, AverageShare | None]


def present(numbers: TasksNumbers) -> SectionView:
    """The section as people read it."""
    first = _first(numbers)
    limit = f", at most {numbers.limit} items each" if numbers.limit else ""
    summary = (
        f"{_count(len(first))} by lm-eval {numbers.lm_eval} (its runner, definitions and metrics){limit}; items from "
        f"{numbers.source}; rows of at most {numbers.max_length} tokens, {numbers.batch} at a time."
    )
    tables = [_scores(numbers)]
    if numbers.against_teacher:
        tables.append(_differences(numbers))
    commands: list[dict[str, Cell]] = [{"task": task, "command": command} for task, command in numbers.commands.items()]
    tables.append(Table(title="The first model's numbers by lm-eval's own command", rows=commands))
    findings = [*_at_chance(numbers), *_students(numbers)]
    return SectionView(summary=summary, findings=findings, tables=tables, plots=[_plot(numbers)])


def headline(numbers: TasksNumbers) -> Mapping[str, Sequence[Stat]]:
    """Return the share of the teacher's score above chance, and MMLU's."""
    headlines: dict[str, Sequence[Stat]] = {}
    for name, kept in numbers.kept.items():
        stats = []
        if kept is not None:
            detail = f"above chance, {_count(len(kept.tasks))}"
            stats.append(Stat(label="task score kept", value=_percent(kept), detail=detail))
        mmlu = numbers.against_teacher[name].get("mmlu")
        if mmlu is not None and mmlu.share is not None:
            shots = numbers.models[name]["mmlu"].shots
            stats.append(Stat(label="MMLU kept", value=_percent(mmlu.share), detail=f"above chance, {shots}-shot"))
        headlines[name] = stats
    return headlines


def _first(numbers: TasksNumbers) -> dict[str, TaskScore]:
    """The scores of the teacher, or of the model alone."""
    return next(iter(numbers.models.values()))


def _scores(numbers: TasksNumbers) -> Table:
    rows: list[dict[str, Cell]] = []
    for task, first in _first(numbers).items():
        row: dict[str, Cell] = {"task": task, "shots": str(first.shots), "metric": first.metric.replace(",none", "")}
        row |= {name: _score(scores[task]) for name, scores in numbers.models.items()}
        row |= {"chance": f"{first.chance:.1%}", "items": str(first.n)}
        if first.inside_window is not None:
            row["inside the window"] = f"{first.inside_window:.0%}"
        rows.append(row)
    for kind, title in AVERAGES.items():
        means = {name: averages[kind] for name, averages in numbers.averages.items() if kind in averages}
        if len(_first(numbers)) > 1 and len(means) == len(numbers.models):
            shown: dict[str, Cell] = {name: _percent(average) for name, average in means.items()}
            rows.append({"task": title, "shots": "", "metric": "", **shown, "chance": "", "items": ""})
    notes = [f"{task}: {note}" for task, note in numbers.notes.items()]
    if numbers.window_reach is not None:
        notes.insert(0, f"inside the window: items of at most {numbers.window_reach} tokens, where softmax sees all")
    return Table(title="Scores", rows=rows, note="; ".join(["± is one standard error", *notes]) + ".")


def _differences(numbers: TasksNumbers) -> Table:
    rows = []
    for task in _first(numbers):
        row: dict[str, Cell] = {"task": task}
        for name, against in numbers.against_teacher.items():
            row[f"{name} - teacher"] = _range(against[task])
            share = against[task].share
            row[f"{name}: kept"] = _percent(share) if share is not None else "teacher at chance"
        rows.append(row)
    return Table(
        title="Against the teacher, item by item",
        rows=rows,
        note="Paired differences with 95% intervals. Kept: (student - chance) / (teacher - chance), where the teacher "
        f"is at least {CLEAR:g} standard errors above chance.",
    )


def _at_chance(numbers: TasksNumbers) -> Iterator[Finding]:
    """Tasks that cannot tell the models apart, since the first of them is at chance."""
    name, rows = next(iter(numbers.models.items()))
    at_chance = [task for task, row in rows.items() if not row.above_chance]
    if len(at_chance) == len(rows):
        worst = max(row.stderr or 0.0 for row in rows.values())
        tasks = f"all {len(rows)} tasks" if len(rows) > 1 else "the one task"
        yield Finding(
            level="note",
            text=f"{name} is within noise of chance on {tasks} (standard errors up to {worst:.1%}): "
            "at this size they exercise the harness and say nothing about a student",
        )
    elif at_chance:
        yield Finding(
            level="note",
            text=f"{name} is within noise of chance on {', '.join(at_chance)}: no share is reported there",
        )


def _students(numbers: TasksNumbers) -> Iterator[Finding]:
    for name, against in numbers.against_teacher.items():
        able = [task for task, row in _first(numbers).items() if row.above_chance]
        lost = {task: against[task] for task in able if against[task].high < 0}
        if lost:
            each = ", ".join(f"{task} {_range(contrast)}" for task, contrast in lost.items())
            fault = any(contrast.share is not None and contrast.share.high < KEPT_WELL for contrast in lost.values())
            text = f"{name} is below the teacher beyond noise: {each}"
            yield Finding(level="bad" if fault else "note", student=name, text=text)
        elif able:
            tasks = f"any of the {len(able)} tasks" if len(able) > 1 else "the one task"
            text = f"{name} is not below the teacher beyond noise on {tasks} that the teacher can do"
            yield Finding(level="good", student=name, text=text)


def _plot(numbers: TasksNumbers) -> Plot:
    first, names = _first(numbers), list(numbers.models)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        colours = theme.colours(names)
        step = 0.7 / len(names)
        for i, (name, scores) in enumerate(numbers.models.items()):
            rows = [scores[task] for task in first]
            heights = [place + (i - (len(names) - 1) / 2) * step for place in range(len(first))]
            axis.errorbar(
                [row.score for row in rows], heights, xerr=[Z95 * (row.stderr or 0.0) for row in rows],
                fmt="o", color=colours[name], label=name, capsize=2, markersize=5,
            )  # fmt: skip
        chance = [row.chance for row in first.values()]
        axis.plot(chance, range(len(first)), "|", color="#999999", markersize=18, markeredgewidth=2, label="chance")
        axis.set_yticks(range(len(first)), list(first))
        axis.invert_yaxis()
        axis.grid(True, axis="both")
        axis.xaxis.set_major_formatter(theme.percent_label)
        theme.legend_below(figure)

    height = 1.2 + 0.32 * len(first) * max(1.0, len(names) / 2)
    caption = f"Scores of {', '.join(names)} with 95% intervals; the stroke is what guessing scores."
    return Plot(name="tasks", caption=caption, draw=draw, width=5.6, height=height)


def _score(row: TaskScore) -> str:
    if row.lower_is_better:
        return f"{row.score:.4g} ± {row.stderr or 0.0:.2g}"
    return f"{row.score:.1%}" if row.stderr is None else f"{row.score * 100:.1f} ± {row.stderr * 100:.1f}%"


def _percent(number: Share | Average) -> str:
    return f"{number.value * 100:.1f} ± {number.stderr * 100:.1f}%"


def _range(contrast: Contrast) -> str:
    return f"{contrast.difference:+.1%} ({contrast.low:+.1%} to {contrast.high:+.1%})"


def _count(tasks: int) -> str:
    return f"{tasks} task{'s' if tasks != 1 else ''}"
