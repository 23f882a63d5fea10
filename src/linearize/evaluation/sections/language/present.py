"""What people read of the language modelling section: tables, plots, findings, from the JSON numbers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linearize.evaluation.context import Finding, Numbers, Plot, SectionView, Stat, Table
from linearize.metrics.intervals import interval, plus_minus
from linearize.metrics.theme import COLOURS, colours, count_label, legend_below

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEEPS_MOST, KEEPS_LITTLE = 1.05, 1.5  # perplexity against the teacher's
SMALL = 0.02  # growth in nats per token that is no fault, whatever its ratio
FEW_TOKENS = 100
WON_BACK = 0.25  # share of the window's loss below which a linear branch is called idle
LOST_THERE = 0.405  # nats: half as much perplexity again as the teacher's
CLASSES = {"beyond": "beyond the window", "inside": "inside the window", "none": "no evidence"}
_ERRORS = "± is one standard error, over documents."


def present(numbers: Numbers) -> SectionView:
    """The section as people read it."""
    models = numbers["models"]
    plots = [_position_plot(numbers)] + ([_evidence_plot(numbers)] if _compared(numbers) else [])
    tables = [_loss_table(numbers), _agreement_table(numbers), *_part_tables(numbers), *_evidence_tables(numbers)]
    text = f"{numbers['tokens']:,} tokens of {numbers['documents']:,} documents, in rows of up to {numbers['length']:,}"
    return SectionView(
        summary=f"Held-out text: {text} tokens; {'all models' if len(models) > 1 else 'the model'} on the same tokens.",
        findings=[f for name in _compared(numbers) for f in _findings(numbers, name)],
        tables=[table for table in tables if table.rows],
        plots=plots,
    )


def headline(numbers: Numbers) -> Mapping[str, list[Stat]]:
    """Stats of the verdict, by student."""
    models = numbers["models"]
    teacher = next((m for m in models.values() if m["role"] == "teacher"), None)
    found = {}
    for name, model in models.items():
        if model["role"] != "student":
            continue
        detail = f"teacher {teacher['perplexity']['value']:.3g}" if teacher else "on held-out text"
        stats = [Stat(label="perplexity", value=f"{model['perplexity']['value']:.3g}", detail=detail)]
        if "kept" in model:
            kept = _percent(model["kept"]["value"])
            stats.append(Stat(label="probability kept", value=kept, detail="of what the teacher gives the true token"))
            same = _percent(model["top1"]["value"])
            stats.append(Stat(label="same next token", value=same, detail="most likely token as the teacher's"))
        found[name] = stats
    return found


def _compared(numbers: Numbers) -> list[str]:
    return [name for name, model in numbers["models"].items() if "gap" in model]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _pm(number: Mapping[str, Any] | None, digits: int = 1) -> str:
    return "-" if number is None else plus_minus(number["value"], number["error"], digits=digits)


def _span(part: Mapping[str, Any]) -> str:
    return f"{part['start']:,} to {part['end'] - 1:,}"


def _loss_table(numbers: Numbers) -> Table:
    rows = []
    for name, model in numbers["models"].items():
        row = {"model": name, "loss": _pm(model["loss"], 2), "perplexity": f"{model['perplexity']['value']:.4g}"}
        row["bits per byte"] = _pm(model["bits_per_byte"], 2)
        if _compared(numbers):
            row["above the teacher"] = _pm(model["gap"]) if "gap" in model else ""
        rows.append(row)
    note = (
        f"Loss in nats per token. {_ERRORS} Bits per byte: over the {numbers['bytes']:,} bytes of the predicted text; "
        "the token that ends a document has no bytes and counts in the loss alone."
    )
    return Table(title="Held-out loss", rows=rows, note=note)


def _agreement_table(numbers: Numbers) -> Table:
    rows = []
    for name in _compared(numbers):
        model = numbers["models"][name]
        kept = model["kept"]
        spread = f" ({_percent(kept['low'])} to {_percent(kept['high'])})" if kept["low"] is not None else ""
        row = {"student": name, "probability kept": _percent(kept["value"]) + spread, "KL": _pm(model["kl"])}
        rows.append(row | {"same top 1": _share(model["top1"]), "shared top 5": _share(model["top5"])})
    note = (
        "Probability kept: the student's probability of the true token by the teacher's, geometric mean, with its 95% "
        "interval (1 / the ratio of perplexities). KL(teacher||student) in nats per token. Shared top 5: how many of "
        "the teacher's five most likely tokens are among the student's five."
    )
    return Table(title="Agreement with the teacher", rows=rows, note=note)


def _share(number: Mapping[str, Any]) -> str:
    error = number["error"]
    return f"{_percent(number['value'])}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _part_tables(numbers: Numbers) -> list[Table]:
    position = [
        {"position": _span(p), **_losses(p, numbers["models"], _compared(numbers))} for p in numbers["positions"]
    ]
    length = [
        {"tokens long": _span(p), "documents": p["documents"], **_losses(p, numbers["models"], _compared(numbers))}
        for p in numbers["lengths"]
    ]
    return [
        Table(title="Loss by position in the document", rows=position, note=_gap_note(numbers)),
        Table(title="Loss by length of the document", rows=length, note=_gap_note(numbers)),
    ]


def _losses(
    part: Mapping[str, Any], names: Iterable[str], compared: Sequence[str], windows: Sequence[str] = ()
) -> dict[str, Any]:
    """Tokens, the loss of what is not compared, and how far each student is above the teacher."""
    cells: dict[str, Any] = {"tokens": part["tokens"]}
    for name in names:
        model = part["models"].get(name, {})
        if name in compared:
            cells[f"{name} above"] = _pm(model.get("gap"))
        else:
            cells[name] = _pm(model.get("loss"))
        if name in windows:
            cells[f"{name} above, window alone"] = _pm(model.get("window_gap"))
    return cells


def _gap_note(numbers: Numbers) -> str:
    return (
        f"Nats per token; `above`: loss less the teacher's on the same tokens. {_ERRORS}"
        if _compared(numbers)
        else _ERRORS
    )


def _evidence_tables(numbers: Numbers) -> list[Table]:
    tables = []
    for entry in numbers["evidence"]:
        parts = entry["classes"].values()
        names = [n for n in numbers["models"] if any(n in part["models"] for part in parts)]
        windows = [n for n in names if any("window_gap" in part["models"].get(n, {}) for part in parts)]
        rows = [
            {"evidence": CLASSES[kind], **_losses(part, names, _compared(numbers), windows)}
            for kind, part in entry["classes"].items()
        ]
        note = (
            "A token has evidence where it completes a pair of tokens seen before in the document; the last such place "
            f"is beyond the window when it is {entry['reach']} tokens or more before the predicting token. " + _ERRORS
        )
        tables.append(Table(title=f"Loss by where the evidence is (reach {entry['reach']})", rows=rows, note=note))
    return tables


def _findings(numbers: Numbers, name: str) -> list[Finding]:
    return [_loss_finding(numbers, name), *_growth_finding(numbers, name), *_evidence_finding(numbers, name)]


def _loss_finding(numbers: Numbers, name: str) -> Finding:
    model = numbers["models"][name]
    gap = model["gap"]
    low, high = interval(gap["value"], gap["error"] or 0.0)
    ratio, kept = 1 / model["kept"]["value"], _percent(model["kept"]["value"])
    text = (
        f"{name}: loss {_pm(gap)} nats per token above the teacher's, {ratio:.3g} times its perplexity ({kept} kept)."
    )
    small = ratio <= KEEPS_MOST or low <= 0 <= high
    return Finding(
        level="good" if small else "bad" if model["kept"]["value"] < 1 / KEEPS_LITTLE else "note",
        text=text,
        student=name,
    )


def _growth_finding(numbers: Numbers, name: str) -> list[Finding]:
    growth = numbers["growth"]
    if not growth:
        return []
    found, start, middle = growth["models"][name], growth["early"], growth["middle"]
    if found["growth"]["error"] is None:
        return []
    told = (
        f"{_pm(found['early'])} nats above the teacher at positions {start:,} to {middle - 1:,}, "
        f"{_pm(found['late'])} from {middle:,} on"
    )
    if interval(**_plain(found["growth"]))[0] <= 0:
        return [Finding(level="good", text=f"{name}: does not fall behind further on: {told}.", student=name)]
    if interval(**_plain(found["doubling"]))[0] > 0 and found["growth"]["value"] > SMALL:
        return [Finding(level="bad", text=f"{name}: falls behind further on in the text: {told}.", student=name)]
    return [Finding(level="note", text=f"{name}: a little weaker further on in the text: {told}.", student=name)]


def _plain(number: Mapping[str, Any]) -> dict[str, float]:
    return {"value": number["value"], "error": number["error"] or 0.0}


def _evidence_finding(numbers: Numbers, name: str) -> list[Finding]:
    """Bad where a window's student wins back next to nothing beyond it, or any other loses much more there."""
    entry = next(e for e in numbers["evidence"] if name in e["students"])
    compared, beyond, inside = entry["compared"][name], entry["classes"]["beyond"], entry["classes"]["inside"]
    reach = entry["reach"]
    if compared is None or beyond["tokens"] < FEW_TOKENS or compared["over_all"]["error"] is None:
        few = f"{beyond['tokens']} tokens whose evidence lies {reach} tokens or more back"
        return [Finding(level="note", text=f"{name}: {few}: too few to judge; give longer text.", student=name)]
    there, near = beyond["models"][name]["gap"], inside["models"][name]["gap"]
    told = (
        f"{_pm(there)} nats above the teacher on {beyond['tokens']:,} tokens whose evidence lies {reach} tokens or "
        f"more back, {_pm(near)} where it is nearer"
    )
    if (share := compared["share"]) is not None:
        won = f"the linear branch wins back {_share(share)} of what the window alone loses there"
        if interval(**_plain(share))[1] < WON_BACK:
            return [
                Finding(
                    level="bad", text=f"{name}: brings little from beyond its window: {won} ({told}).", student=name
                )
            ]
        told += f"; {won}"
    elif interval(**_plain(compared["over_all"]))[0] > 0 and interval(**_plain(there))[0] > LOST_THERE:
        return [Finding(level="bad", text=f"{name}: loses what lies far back in the text: {told}.", student=name)]
    if interval(**_plain(compared["over_inside"]))[0] > 0:
        return [Finding(level="note", text=f"{name}: recalls less from far back than from near: {told}.", student=name)]
    return [Finding(level="good", text=f"{name}: far evidence serves it as well as near one: {told}.", student=name)]


def _position_plot(numbers: Numbers) -> Plot:
    compared = _compared(numbers)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2 if compared else 1, 1, squeeze=False, sharex=True)[:, 0]
        palette = colours(numbers["models"])
        for name in numbers["models"]:
            _line(axes[0], numbers["positions"], name, "loss", palette[name])
            if name in compared:
                _line(axes[1], numbers["positions"], name, "gap", palette[name])
        for axis, title in zip(axes, ("Loss by position", "Above the teacher"), strict=False):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(count_label)
            axis.set(title=title, ylabel="nats per token")
        axes[-1].set_xlabel("tokens of the document seen")
        if compared:
            axes[1].axhline(0, color=palette.get("teacher", "black"), linewidth=1)
        legend_below(figure)

    caption = "Loss by how much of the document a model has seen" + (
        ", and how far each student is above the teacher; bands are 95% intervals."
        if compared
        else "; the band is a 95% interval."
    )
    return Plot(name="loss_by_position", caption=caption, draw=draw, width=4.8, height=5.4 if compared else 3.4)


def _line(axis: Any, bins: Sequence[Mapping[str, Any]], name: str, what: str, colour: str) -> None:
    """A model's numbers over the middle of each bin on a logarithmic axis; position p has seen p + 1 tokens."""
    at = [float(((b["start"] + 1) * b["end"]) ** 0.5) for b in bins]
    means = [b["models"][name][what] for b in bins]
    low, high = zip(*(interval(**_plain(mean)) for mean in means), strict=True)
    axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(at, [mean["value"] for mean in means], marker="o", markersize=4, color=colour, label=name)


def _evidence_plot(numbers: Numbers) -> Plot:
    students = _compared(numbers)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        palette = colours(numbers["models"])
        width = 0.8 / len(students)
        for i, name in enumerate(students):
            classes = next(e for e in numbers["evidence"] if name in e["students"])["classes"]
            for at, kind in enumerate(CLASSES):
                if (model := classes[kind]["models"].get(name)) is None:
                    continue
                place = at + (i - (len(students) - 1) / 2) * width
                error = 1.96 * (model["gap"]["error"] or 0.0)
                bar: dict[str, Any] = {"color": palette[name], "label": name if at == 0 else None}
                if "window_gap" in model:
                    label = "window alone" if (at, i) == (0, 0) else None
                    axis.plot(place, model["window_gap"]["value"], "D", color=COLOURS["window"], label=label)
                axis.bar(place, model["gap"]["value"], width=width * 0.92, yerr=error, capsize=3, **bar)
        axis.set_xticks(range(len(CLASSES)), [text.replace(" the ", "\nthe ") for text in CLASSES.values()])
        axis.axhline(0, color=palette.get("teacher", "black"), linewidth=1)
        axis.set(title="Loss above the teacher, by evidence", ylabel="nats per token")
        legend_below(figure)

    caption = (
        "How far each student is above the teacher on tokens that complete a pair seen before, beyond its window or "
        "inside, and on those that do not; lines are 95% intervals; diamonds: its window without the linear branch."
    )
    return Plot(name="loss_by_evidence", caption=caption, draw=draw, width=4.8, height=3.6)
