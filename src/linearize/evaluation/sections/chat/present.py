"""The chat section as people read it, from its JSON numbers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linearize.evaluation.context import Cell, Finding, Numbers, Plot, SectionView, Stat, Table
from linearize.metrics.intervals import Z95, plus_minus, share_text
from linearize.metrics.theme import colours, percent_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {"mt_bench": "MT-Bench", "alpaca_eval": "AlpacaEval"}
LARGE_DROP = 0.1  # of the teacher's rating: beyond it, and beyond noise, is a fault
SURE = 0.5  # points: with a wider 95% interval "no drop" says nothing
MANY_UNRATED = 0.05
MORE_LOOPS = 0.02  # share of questions: no loops are called good only if more than this can be ruled out ...
LOOPS_RULED_OUT = 0.1
LENGTH_NOTE = (
    "Judges like long answers: read the win rate beside the lengths. The length-controlled win rate needs the official "
    "alpaca_eval package, which reads the files written here."
)
Models = Mapping[str, Mapping[str, Any]]


def present(numbers: Numbers) -> SectionView:
    """Summary, findings, tables, plot."""
    models: Models = numbers["models"]
    tables = [*_ratings(models), *_pairs(models), *_wins(models), *_looks(models), *_judge(numbers["judge"])]
    return SectionView(
        summary=_summary(numbers),
        findings=tuple(_findings(numbers)),
        tables=tuple(tables),
        plots=tuple(_plots(models)),
    )


def _summary(numbers: Numbers) -> str:
    parts = []
    if numbers["questions"]:
        parts.append(f"{numbers['questions']} questions of MT-Bench")
    if numbers["instructions"]:
        parts.append(f"{numbers['instructions']} instructions of AlpacaEval")
    judge = numbers["judge"]
    by = f"judged by {judge['model']}" if judge else "answers written, not judged (no --judge-url)"
    return f"{' and '.join(parts) or 'No questions'}, at most {numbers['max_new_tokens']} tokens an answer; {by}."


def _mean(found: Mapping[str, Any] | None) -> Cell:
    return None if found is None else plus_minus(found["mean"], found["error"])


def _share(found: Mapping[str, Any] | None) -> Cell:
    return None if found is None else share_text(found["value"], found["low"], found["high"])


def _ratings(models: Models) -> Iterator[Table]:
    scores = {name: m["mt_bench"]["scores"] for name, m in models.items() if "scores" in m.get("mt_bench", {})}
    if not scores:
        return
    first = next(iter(scores.values()))
    rows: list[dict[str, Cell]] = [
        {"questions": label, **{name: _mean(found[key]) for name, found in scores.items()}}
        for label, key in (("all", "overall"), ("first turn", "turn_1"), ("second turn", "turn_2"))
    ]
    categories = dict.fromkeys(c for found in scores.values() for c in found["categories"]) if first else {}
    rows += [
        {"questions": category, **{name: _mean(found["categories"].get(category)) for name, found in scores.items()}}
        for category in categories
    ]
    rows.append({"questions": "without a rating", **{name: found["unrated"] for name, found in scores.items()}})
    yield Table(title="MT-Bench ratings, 1 to 10", rows=rows, note="± one standard error over questions.")


def _pairs(models: Models) -> Iterator[Table]:
    rows: list[dict[str, Cell]] = [
        {
            "model": name, "wins": pair["wins"], "ties": pair["ties"], "losses": pair["losses"],
            "without a verdict": pair["unrated"], "win rate": _share(pair["win_rate"]),
        }
        for name, m in models.items() if (pair := m.get("mt_bench", {}).get("against_teacher"))
    ]  # fmt: skip
    if rows:
        note = (
            "Both orders are judged; orders that disagree are a tie, a tie is half a win. 95% intervals over questions."
        )
        yield Table(title="MT-Bench, each answer beside the teacher's", rows=rows, note=note)


def _wins(models: Models) -> Iterator[Table]:
    rows: list[dict[str, Cell]] = [
        {
            "model": name, "against": won["against"], "win rate": _share(won["win_rate"]),
            "characters": round(won["characters"]), "characters against": round(won["characters_against"]),
            "without a verdict": won["unrated"],
        }
        for name, m in models.items() if (won := m.get("alpaca_eval", {}).get("judged"))
    ]  # fmt: skip
    if rows:
        yield Table(title="AlpacaEval win rate", rows=rows, note=LENGTH_NOTE)


def _looks(models: Models) -> Iterator[Table]:
    for benchmark, title in TITLES.items():
        rows: list[dict[str, Cell]] = [
            {
                "model": name, "words": _mean(a["words"]), "repeated 4-grams": _mean(a["repeated"]),
                "looping": _share(a["looping"]), "empty": _share(a["empty"]),
                "stopped at the limit": _share(a["unended"]),
                "prompt cut": a["cut"]["successes"],
            }
            for name, m in models.items() if (a := m.get(benchmark, {}).get("answers"))
        ]  # fmt: skip
        if rows:
            note = (
                "Looping: half or more of an answer's 4-grams of words stood in it before. "
                "Intervals take answers as independent."
            )
            yield Table(title=f"{title} answers, unjudged", rows=rows, note=note)


def _judge(judge: Mapping[str, Any] | None) -> Iterator[Table]:
    if judge is None:
        return
    cost: Cell = judge["cost"] if judge["cost"] is not None else "unknown (no prices given)"
    if judge["cost"] is None and judge["unreported"] and judge["price_in"] is not None:
        cost = f"unknown ({judge['unreported']} replies without token counts)"
    row: dict[str, Cell] = {
        "judge": judge["model"], "replies": judge["requests"], "tokens in": judge["prompt_tokens"],
        "tokens out": judge["completion_tokens"], "cost": cost,
    }  # fmt: skip
    yield Table(title="What the judge took", rows=[row])


def _findings(numbers: Numbers) -> Iterator[Finding]:
    models: Models = numbers["models"]
    for student in numbers["students"]:
        for benchmark in TITLES:
            yield from _answer_findings(student, TITLES[benchmark], models[student].get(benchmark))
        yield from _rating_finding(student, models[student].get("mt_bench", {}), models)
    for name, m in models.items():
        yield from _unrated_finding(name, m.get("mt_bench", {}).get("scores"))
    for name, m in models.items():
        cut = sum(found["answers"]["cut"]["successes"] for found in m.values())
        if cut:
            yield Finding(
                level="note", text=f"{name}: prompts that did not fit the context and lost their beginning: {cut}."
            )
    if not numbers["template"] and models:
        yield Finding(level="note", text="The tokenizer has no chat template: a plain User/Assistant one was used.")
    for note in numbers["notes"]:
        yield Finding(level="note", text=note)


def _answer_findings(student: str, title: str, found: Mapping[str, Any] | None) -> Iterator[Finding]:
    if found is None or "looping_more" not in found["answers"]:
        return
    for key, what in (("looping", "runs in loops"), ("empty", "stays empty")):
        share, more = found["answers"][key], found["answers"][f"{key}_more"]
        told = f"{share_text(share['value'], share['low'], share['high'])} of its answers"
        against = f"{share_text(more['value'], more['low'], more['high'])} more questions than the teacher"
        if more["low"] > 0:
            yield Finding(level="bad", student=student, text=f"{student} {what} on {title}: {told}, on {against}.")
        elif more["value"] <= MORE_LOOPS and more["high"] < LOOPS_RULED_OUT:
            text = f"{student} {what} on {title} no more often than the teacher: {told}."
            yield Finding(level="good", student=student, text=text)


def _rating_finding(student: str, found: Mapping[str, Any], models: Models) -> Iterator[Finding]:
    difference = found.get("score_difference")
    if not difference or difference["error"] is None:
        return
    teacher = next(iter(models.values()))["mt_bench"]["scores"]["overall"]["mean"]
    value, half = difference["mean"], Z95 * difference["error"]
    spread = f"({value - half:+.2f} to {value + half:+.2f})"
    told = f"{student}: rating {value:+.2f} {spread} beside the teacher's {teacher:.2f}"
    if value + half < 0:
        level = "bad" if -value > LARGE_DROP * teacher else "note"
        yield Finding(level=level, student=student, text=f"{told}: a drop beyond noise.")  # type: ignore[arg-type]
    elif half <= SURE:
        yield Finding(level="good", student=student, text=f"{told}: no drop beyond noise.")
    else:
        yield Finding(level="note", student=student, text=f"{told}: too few questions to tell.")


def _unrated_finding(name: str, scores: Mapping[str, Any] | None) -> Iterator[Finding]:
    if scores is None:
        return
    rated = scores["overall"]["count"] if scores["overall"] else 0
    if scores["unrated"] > MANY_UNRATED * (rated + scores["unrated"]):
        text = f"{name}: the judge gave no rating to {scores['unrated']} of {rated + scores['unrated']} answers."
        yield Finding(level="note", text=f"{text} They count for nothing.")


def _plots(models: Models) -> Iterator[Plot]:
    scores = {n: m["mt_bench"]["scores"]["categories"] for n, m in models.items() if "scores" in m.get("mt_bench", {})}
    looks = {n: m["mt_bench"]["repeated"] for n, m in models.items() if "mt_bench" in m}
    if scores:
        caption = "Mean rating by category, 1 to 10; bars show 95% intervals."
        yield _bars("chat_ratings", caption, scores, None)
    elif looks:
        caption = "Share of an answer's 4-grams of words that stood in it before, by category; bars show 95% intervals."
        yield _bars("chat_repetition", caption, looks, percent_label)


def _bars(name: str, caption: str, values: Mapping[str, Mapping[str, Any]], label: Any) -> Plot:
    """Horizontal bars: a group for each category, in it a bar for each model."""
    categories = list(dict.fromkeys(category for found in values.values() for category in found))
    colour, width = colours(values), 0.8 / len(values)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for index, (model, found) in enumerate(values.items()):
            shown_here = [(row, found[c]) for row, c in enumerate(categories) if found.get(c) is not None]
            axis.barh(
                [row + (index + 0.5) * width - 0.4 for row, _ in shown_here],
                [entry["mean"] for _, entry in shown_here],
                height=width * 0.9,
                xerr=[Z95 * (entry["error"] or 0.0) for _, entry in shown_here],
                error_kw={"elinewidth": 1, "ecolor": "#888888"},
                color=colour[model],
                label=model,
            )
        axis.set_yticks(range(len(categories)), categories)
        axis.invert_yaxis()
        axis.grid(True, axis="x")
        axis.grid(False, axis="y")
        axis.set_xlim(left=0)
        if label is not None:
            axis.xaxis.set_major_formatter(label)
        _legend(figure, len(values))

    return Plot(name=name, caption=caption, draw=draw, height=1.2 + len(categories) * max(0.32, 0.16 * len(values)))


def _legend(figure: Figure, models: int) -> None:
    from linearize.metrics.theme import legend_below

    if models > 1:
        legend_below(figure)


def headline(numbers: Numbers) -> dict[str, Sequence[Stat]]:
    """For each student: its rating beside the teacher's and its win rate; without a judge how many answers loop."""
    models: Models = numbers["models"]
    return {student: tuple(_tiles(student, models))[:3] for student in numbers["students"]}


def _tiles(student: str, models: Models) -> Iterator[Stat]:
    own, first = models[student], next(iter(models.values()))
    bench = own.get("mt_bench", {})
    if (scores := bench.get("scores")) and scores["overall"]:
        teacher = first["mt_bench"]["scores"]["overall"] if "score_difference" in bench else None
        detail = f"of 10; the teacher {teacher['mean']:.2f}" if teacher else "of 10"
        yield Stat(label="MT-Bench rating", value=f"{scores['overall']['mean']:.2f}", detail=detail)
    if (pair := bench.get("against_teacher")) and pair["win_rate"]:
        yield Stat(
            label="MT-Bench wins", value=f"{pair['win_rate']['value']:.0%}", detail="against the teacher; 50% is par"
        )
    won = own.get("alpaca_eval", {}).get("judged")
    if won and won["win_rate"]:
        yield Stat(label="AlpacaEval wins", value=f"{won['win_rate']['value']:.0%}", detail=f"against {won['against']}")
    if bench and "scores" not in bench:
        more = bench["answers"].get("looping_more")
        detail = f"{more['value']:+.0%} of questions beside the teacher" if more else "of MT-Bench answers"
        yield Stat(label="Looping answers", value=f"{bench['answers']['looping']['value']:.0%}", detail=detail)
