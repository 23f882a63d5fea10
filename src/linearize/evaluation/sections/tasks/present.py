"""Task scores as people read them: a table, the differences to the teacher, a plot with intervals, judgements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linearize.evaluation.context import Finding, Plot, SectionView, Stat, Table
from linearize.evaluation.harness.contrast import CLEAR
from linearize.metrics import theme
from linearize.metrics.intervals import Z95

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = Mapping[str, Any]


def present(numbers: Numbers) -> SectionView:
    """From the section's JSON numbers alone."""
    names = list(numbers["models"])
    tasks = list(numbers["models"][names[0]])
    limit = f", at most {numbers['limit']} items each" if numbers["limit"] else ""
    summary = (
        f"{len(tasks)} task{'s' if len(tasks) != 1 else ''} by lm-eval {numbers['lm_eval']} (its runner, definitions "
        f"and metrics){limit}; items from {numbers['source']}; rows of at most {numbers['max_length']} tokens, "
        f"{numbers['batch']} at a time."
    )
    tables = [_scores(numbers, names, tasks)]
    if numbers["against_teacher"]:
        tables.append(_differences(numbers, tasks))
    tables.append(_reproduce(numbers))
    findings = [*_missing(numbers), *_chance(numbers, names, tasks), *_students(numbers)]
    return SectionView(summary=summary, findings=findings, tables=tables, plots=[_plot(numbers, names, tasks)])


def headline(numbers: Numbers) -> dict[str, Sequence[Stat]]:
    """The share of the teacher's score above chance, and MMLU's beside it."""
    found: dict[str, Sequence[Stat]] = {}
    for name, kept in numbers["kept"].items():
        stats = []
        if kept is not None:
            count = len(kept["tasks"])
            stats.append(Stat(label="task score kept", value=_percent(kept), detail=f"above chance, {_tasks(count)}"))
        mmlu = numbers["against_teacher"][name].get("mmlu")
        if mmlu is not None and mmlu["share"] is not None:
            shots = numbers["models"][name]["mmlu"]["shots"]
            stats.append(Stat(label="MMLU kept", value=_percent(mmlu["share"]), detail=f"above chance, {shots}-shot"))
        found[name] = stats
    return found


def _scores(numbers: Numbers, names: Sequence[str], tasks: Sequence[str]) -> Table:
    rows: list[dict[str, Any]] = []
    for task in tasks:
        first = numbers["models"][names[0]][task]
        row = {"task": task, "shots": str(first["shots"]), "metric": first["metric"].replace(",none", "")}
        scores = {name: _score(numbers["models"][name][task]) for name in names}
        rows.append({**row, **scores, "chance": f"{first['chance']:.1%}", "items": str(first["n"])})
    for kind, title in (("all", "average"), ("without_mmlu", "average without MMLU")):
        found = {name: numbers["averages"][name].get(kind) for name in names}
        if len(tasks) > 1 and all(found.values()):
            means = {name: _percent(value) for name, value in found.items() if value}
            rows.append({"task": title, "shots": "", "metric": "", **means, "chance": "", "items": ""})
    notes = [f"{task}: {note}" for task, note in numbers["notes"].items()]
    return Table(title="Scores", rows=rows, note="; ".join(["± is one standard error", *notes]) + ".")


def _differences(numbers: Numbers, tasks: Sequence[str]) -> Table:
    rows = []
    for task in tasks:
        row: dict[str, Any] = {"task": task}
        for name, against in numbers["against_teacher"].items():
            found = against[task]
            row[f"{name} - teacher"] = f"{found['difference']:+.1%} ({found['low']:+.1%} to {found['high']:+.1%})"
            row[f"{name}: kept"] = _percent(found["share"]) if found["share"] else "teacher at chance"
        rows.append(row)
    return Table(
        title="Against the teacher, item by item",
        rows=rows,
        note="Paired differences with 95% intervals. Kept: (student - chance) / (teacher - chance), where the teacher "
        f"is at least {CLEAR:g} standard errors above chance.",
    )


def _reproduce(numbers: Numbers) -> Table:
    return Table(
        title="The first model's numbers by lm-eval's own command",
        rows=[{"task": task, "command": command} for task, command in numbers["commands"].items()],
        note="The folder after --include_path holds lm-eval's definitions with the data used here.",
    )


def _missing(numbers: Numbers) -> Iterator[Finding]:
    for task, need in numbers["missing"].items():
        yield Finding(level="note", text=f"{task} was left out, its file is missing: {need}")


def _chance(numbers: Numbers, names: Sequence[str], tasks: Sequence[str]) -> Iterator[Finding]:
    """What cannot tell the models apart, since the first of them can do nothing of it."""
    rows = numbers["models"][names[0]]
    silent = [task for task in tasks if not _able(rows[task])]
    if len(silent) == len(tasks):
        worst = max(rows[task]["stderr"] or 0.0 for task in tasks)
        yield Finding(
            level="note",
            text=f"{names[0]} is within noise of chance on {_all(len(tasks))} (standard errors up to {worst:.1%}): "
            "at this size they exercise the harness and say nothing about a student",
        )
    elif silent:
        yield Finding(
            level="note",
            text=f"{names[0]} is within noise of chance on {', '.join(silent)}: no share is reported there",
        )


def _able(row: Mapping[str, Any]) -> bool:
    """Whether a model is clearly above chance."""
    error, above = row["stderr"], row["score"] - row["chance"]
    return bool(error is not None and above > 0 and above > CLEAR * error and not row["lower_is_better"])


def _students(numbers: Numbers) -> Iterator[Finding]:
    for name, against in numbers["against_teacher"].items():
        teacher = next(iter(numbers["models"].values()))
        able = [task for task in against if _able(teacher[task])]
        lost = [task for task in able if against[task]["high"] < 0]
        if lost:
            each = ", ".join(f"{task} {_range(against[task])}" for task in lost)
            worse = any(_kept_below(against[task], 0.9) for task in lost)
            yield Finding(
                level="bad" if worse else "note", student=name, text=f"{name} is below the teacher beyond noise: {each}"
            )
        elif able:
            yield Finding(
                level="good",
                student=name,
                text=f"{name} is not below the teacher beyond noise on {_any(len(able))} that the teacher can do",
            )


def _kept_below(found: Mapping[str, Any], share: float) -> bool:
    return found["share"] is not None and found["share"]["high"] < share


def _range(found: Mapping[str, Any]) -> str:
    return f"{found['difference']:+.1%} ({found['low']:+.1%} to {found['high']:+.1%})"


def _plot(numbers: Numbers, names: Sequence[str], tasks: Sequence[str]) -> Plot:
    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        colours = theme.colours(names)
        step = 0.7 / len(names)
        for i, name in enumerate(names):
            rows = [numbers["models"][name][task] for task in tasks]
            heights = [place + (i - (len(names) - 1) / 2) * step for place in range(len(tasks))]
            axis.errorbar(
                [row["score"] for row in rows], heights, xerr=[Z95 * (row["stderr"] or 0.0) for row in rows],
                fmt="o", color=colours[name], label=name, capsize=2, markersize=5,
            )  # fmt: skip
        chance = [numbers["models"][names[0]][task]["chance"] for task in tasks]
        axis.plot(chance, range(len(tasks)), "|", color="#999999", markersize=18, markeredgewidth=2, label="chance")
        axis.set_yticks(range(len(tasks)), tasks)
        axis.invert_yaxis()
        axis.grid(True, axis="both")
        axis.xaxis.set_major_formatter(theme.percent_label)
        theme.legend_below(figure)

    height = 1.2 + 0.32 * len(tasks) * max(1.0, len(names) / 2)
    caption = f"Scores of {', '.join(names)} with 95% intervals; the stroke is what guessing scores."
    return Plot(name="tasks", caption=caption, draw=draw, width=5.6, height=height)


def _score(row: Mapping[str, Any]) -> str:
    if row["lower_is_better"]:
        return f"{row['score']:.4g} ± {row['stderr'] or 0.0:.2g}"
    return _percent({"value": row["score"], "stderr": row["stderr"]})


def _percent(found: Mapping[str, Any]) -> str:
    error = found["stderr"]
    return f"{found['value']:.1%}" if error is None else f"{found['value'] * 100:.1f} ± {error * 100:.1f}%"


def _tasks(count: int) -> str:
    return f"{count} task{'s' if count != 1 else ''}"


def _all(count: int) -> str:
    return f"all {count} tasks" if count > 1 else "the one task"


def _any(count: int) -> str:
    return f"any of the {count} tasks" if count > 1 else "the one task"
