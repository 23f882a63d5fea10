"""The language section as people read it: losses, agreement, where a student falls behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from linearize.evaluation.context import Cell, Finding, Judgement, Plot, SectionView, Stat, Table
from linearize.evaluation.numbers import MeanNumbers
from linearize.evaluation.sections.language.numbers import (
    BinNumbers,
    EvidenceNumbers,
    LanguageNumbers,
    PartNumbers,
    RatioNumbers,
)
from linearize.metrics.intervals import Z95, plus_minus
from linearize.metrics.theme import colours, count_label, legend_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEEPS_MOST, KEEPS_LITTLE = 1.05, 1.5  # perplexity against the teacher's
SMALL = 0.02  # growth in nats per token that is no fault, whatever its ratio
LEAST_FAR_TOKENS = 100  # whose evidence is beyond the window
WON_BACK = 0.25  # share of the window's loss below which a linear branch is called idle
LOST_THERE = 0.405  # nats: half as much perplexity again as the teacher's
CLASSES = {"beyond": "beyond the window", "inside": "inside the window", "none": "no evidence"}
ERRORS = "± is one standard error, over documents."


def present(numbers: LanguageNumbers) -> SectionView:
    """The section as people read it."""
    models = "all models" if len(numbers.models) > 1 else "the model"
    summary = (
        f"Held-out text: {numbers.tokens:,} tokens of {numbers.documents:,} documents, in rows of up to "
        f"{numbers.length:,} tokens; {models} on the same tokens."
    )
    tables = [_loss_table(numbers), _agreement_table(numbers), *_part_tables(numbers), *_evidence_tables(numbers)]
    return SectionView(
        summary=summary,
        findings=[
            Finding.on(name, "student", level, f"{text}.")
            for name in numbers.compared
            for level, text in _judgements(numbers, name)
        ],
        tables=[table for table in tables if table.rows],
        plots=[_position_plot(numbers)],
    )


def headline(numbers: LanguageNumbers) -> Mapping[str, Sequence[Stat]]:
    """Perplexity, probability kept and same next token, by student."""
    teacher = next((model for model in numbers.models.values() if model.role == "teacher"), None)
    detail = f"teacher {teacher.perplexity.value:.3g}" if teacher else "on held-out text"
    stats = {
        name: [Stat(label="perplexity", value=f"{model.perplexity.value:.3g}", detail=detail)]
        for name, model in numbers.models.items()
        if model.role == "student"
    }
    for name, student in numbers.compared.items():
        kept, same = _percent(student.kept.value), _percent(student.top1.value)
        stats[name] += [
            Stat(label="probability kept", value=kept, detail="of what the teacher gives the true token"),
            Stat(label="same next token", value=same, detail="most likely token as the teacher's"),
        ]
    return stats


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _judgements(numbers: LanguageNumbers, name: str) -> Iterator[Judgement]:
    yield _loss(numbers, name)
    if name in numbers.growth.models and numbers.growth.models[name].growth.error is not None:
        yield _growth(numbers, name)
    yield _far_evidence(numbers, name)


def _loss(numbers: LanguageNumbers, name: str) -> Judgement:
    student = numbers.compared[name]
    gap, kept = student.gap, student.kept.value
    text = (
        f"loss {gap.text} nats per token above the teacher's, {1 / kept:.3g} times its perplexity ({_percent(kept)} "
        "kept)"
    )
    low, high = gap.interval
    within_noise = gap.error is not None and low <= 0 <= high
    if 1 / kept <= KEEPS_MOST or within_noise:
        return "good", text
    return "bad" if kept < 1 / KEEPS_LITTLE else "note", text


def _growth(numbers: LanguageNumbers, name: str) -> Judgement:
    """Bad where the gap doubles and more between early and late positions."""
    growth, start, middle = numbers.growth.models[name], numbers.growth.early, numbers.growth.middle
    gaps = (
        f"{growth.early.text} nats above the teacher at positions {start:,} to {middle - 1:,}, {growth.late.text} from "
        f"{middle:,} on"
    )
    if not growth.growth.clearly_positive:
        return "good", f"does not fall behind further on: {gaps}"
    if growth.doubling.clearly_positive and growth.growth.value > SMALL:
        return "bad", f"falls behind further on in the text: {gaps}"
    return "note", f"a little weaker further on in the text: {gaps}"


def _far_evidence(numbers: LanguageNumbers, name: str) -> Judgement:
    """Bad where a student with a window wins back next to nothing beyond it, or any other loses much more there."""
    entry = numbers.evidence_of(name)
    far, beyond = entry.compared[name], entry.classes["beyond"]
    if far is None or beyond.tokens < LEAST_FAR_TOKENS or far.over_all.error is None:
        few = f"{beyond.tokens} tokens whose evidence is {entry.reach} tokens or more back"
        return "note", f"{few} are too few to judge; give longer text"
    there, near = beyond.models[name].gap, entry.classes["inside"].models[name].gap
    assert there is not None and near is not None
    gaps = (
        f"{there.text} nats above the teacher on {beyond.tokens:,} tokens whose evidence is {entry.reach} tokens or "
        f"more back, {near.text} where it is nearer"
    )
    if far.share is not None:
        gaps += f"; the linear branch wins back {far.share.percent} of what the window alone loses there"
        if far.share.interval[1] < WON_BACK:
            return "bad", f"brings little from beyond its window: {gaps}"
    elif far.over_all.clearly_positive and there.interval[0] > LOST_THERE:
        return "bad", f"loses what is far back in the text: {gaps}"
    if far.over_inside.clearly_positive:
        return "note", f"recalls less from far back than from near: {gaps}"
    return "good", f"uses far evidence as well as near evidence: {gaps}"


def _loss_table(numbers: LanguageNumbers) -> Table:
    rows: list[dict[str, Cell]] = []
    for name, model in numbers.models.items():
        bits = model.bits_per_byte
        row: dict[str, Cell] = {
            "model": name,
            "loss": plus_minus(model.loss.value, model.loss.error, digits=2),
            "perplexity": f"{model.perplexity.value:.4g}",
            "bits per byte": "-" if bits is None else plus_minus(bits.value, bits.error, digits=2),
        }
        if numbers.compared:
            row["above the teacher"] = numbers.compared[name].gap.text if name in numbers.compared else ""
        rows.append(row)
    note = (
        f"Loss in nats per token. {ERRORS} Bits per byte: over the {numbers.bytes:,} bytes of the predicted text; "
        "the token that ends a document has no bytes and counts in the loss alone."
    )
    return Table(title="Held-out loss", rows=rows, note=note)


def _agreement_table(numbers: LanguageNumbers) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "student": name,
            "probability kept": _kept(student.kept),
            "KL": student.kl.text,
            "same top 1": student.top1.percent,
            "shared top 5": student.top5.percent,
        }
        for name, student in numbers.compared.items()
    ]
    note = (
        "Probability kept: the student's probability of the true token by the teacher's, geometric mean, with its 95% "
        "interval (1 / the ratio of perplexities). KL(teacher||student) in nats per token. Shared top 5: how many of "
        "the teacher's five most likely tokens are among the student's five."
    )
    return Table(title="Agreement with the teacher", rows=rows, note=note)


def _kept(kept: RatioNumbers) -> str:
    spread = "" if kept.low is None or kept.high is None else f" ({_percent(kept.low)} to {_percent(kept.high)})"
    return _percent(kept.value) + spread


def _part_tables(numbers: LanguageNumbers) -> list[Table]:
    positions = [{"position": part.span, **_losses(numbers, part)} for part in numbers.positions]
    lengths = [
        {"tokens long": part.span, "documents": part.documents, **_losses(numbers, part)} for part in numbers.lengths
    ]
    compared = "Nats per token; `above`: loss less the teacher's on the same tokens. " if numbers.compared else ""
    return [
        Table(title="Loss by position in the document", rows=positions, note=compared + ERRORS),
        Table(title="Loss by length of the document", rows=lengths, note=compared + ERRORS),
    ]


def _evidence_tables(numbers: LanguageNumbers) -> list[Table]:
    tables = []
    for entry in numbers.evidence:
        rows = [{"evidence": CLASSES[kind], **_losses(numbers, part, entry)} for kind, part in entry.classes.items()]
        note = (
            "A token has evidence where it completes a pair of tokens seen before in the document; the last such place "
            f"is beyond the window when it is {entry.reach} tokens or more before the predicting token. {ERRORS}"
        )
        tables.append(Table(title=f"Loss by where the evidence is (reach {entry.reach})", rows=rows, note=note))
    return tables


def _losses(numbers: LanguageNumbers, part: PartNumbers, entry: EvidenceNumbers | None = None) -> dict[str, Cell]:
    """Tokens, the loss of each model that is not compared, and how far each student is above the teacher; of the models
    of an entry, where one is named, and there also of windows alone."""
    parts = [part] if entry is None else list(entry.classes.values())
    cells: dict[str, Cell] = {"tokens": part.tokens}
    for name in numbers.models:
        own, all_own = part.models.get(name), [p.models[name] for p in parts if name in p.models]
        if not all_own:
            continue
        if name in numbers.compared:
            cells[f"{name} above"] = _text(own.gap if own else None)
        else:
            cells[name] = _text(own.loss if own else None)
        if entry is not None and any(losses.window_gap is not None for losses in all_own):
            cells[f"{name} above, window alone"] = _text(own.window_gap if own else None)
    return cells


def _text(mean: MeanNumbers | None) -> str:
    return "-" if mean is None else mean.text


def _position_plot(numbers: LanguageNumbers) -> Plot:
    compared = numbers.compared

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2 if compared else 1, 1, squeeze=False, sharex=True)[:, 0]
        palette = colours(numbers.models)
        for name in numbers.models:
            _line(axes[0], [(part, part.models[name].loss) for part in numbers.positions], name, palette[name])
            if name in compared:
                gaps = [(part, gap) for part in numbers.positions if (gap := part.models[name].gap) is not None]
                _line(axes[1], gaps, name, palette[name])
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


def _line(axis: Axes, means: Sequence[tuple[BinNumbers, MeanNumbers]], name: str, colour: str) -> None:
    """A model's numbers over the middle of each bin on a logarithmic axis; position p has seen p + 1 tokens."""
    at = [float(((part.start + 1) * part.end) ** 0.5) for part, _ in means]
    low, high = ([mean.value + sign * Z95 * (mean.error or 0.0) for _, mean in means] for sign in (-1, 1))
    axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(at, [mean.value for _, mean in means], marker="o", markersize=4, color=colour, label=name)
