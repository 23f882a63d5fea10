"""What the section Branches says to people, from its numbers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linearize.evaluation.cache_checks import Deviation, tolerance
from linearize.evaluation.context import Finding, Numbers, Plot, SectionView, Stat, Table
from linearize.metrics.intervals import interval, plus_minus
from linearize.metrics.theme import colours, count_label, legend_below, plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SHARE = 0.1  # of what the window alone loses: below it a linear branch counts as bypassed
Model = Mapping[str, Any]


def present(numbers: Numbers) -> SectionView:
    """Summary, findings, tables, plots."""
    models: Mapping[str, Model] = numbers["models"]
    found = [finding for name, model in models.items() for finding in findings(name, model)]
    tables = [_ablation_table(models), _layer_table(models), _context_table(models)]
    plots = [*_branch_plot(models), *_layer_plot(models), *_context_plot(models)]
    summary = (
        "A window + linear student is run with one branch off: what the window alone loses against the teacher, and "
        "how much of that the linear branch wins back on tokens beyond the window's reach. Every model is also given "
        "less and less context: one whose state does nothing stays flat where the teacher falls."
    )
    return SectionView(summary=summary, findings=found, tables=[table for table in tables if table.rows], plots=plots)


def headline(numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
    """At most one stat per student."""
    stats: dict[str, Sequence[Stat]] = {}
    for name, model in numbers["models"].items():
        if model["role"] != "student":
            continue
        losses, context = _beyond(model), model["context"]
        if losses and losses.get("share"):
            detail = "of what the window alone loses beyond its reach is won back"
            stats[name] = [Stat(label="linear branch", value=_percent(losses["share"]), detail=detail)]
        elif not losses and context and context["share_of_gain"]:
            detail = f"of what the teacher gains from more than {_least(context)} tokens of context"
            stats[name] = [Stat(label="memory", value=_percent(context["share_of_gain"]), detail=detail)]
    return stats


def findings(name: str, model: Model) -> Iterator[Finding]:
    """The judgements on one model; none on a plain teacher."""
    student = name if model["role"] == "student" else None
    if model["ablation"]:
        judged = [_linear_branch(name, model), _window(name, model), _decoded(name, model), _idle_layers(name, model)]
    elif model["mixers"]:
        judged = [_memory(name, model)]
    else:
        judged = []
    for level, text in filter(None, judged):
        yield Finding(level=level, text=f"{name}: {text}", student=student)  # type: ignore[arg-type]


def _linear_branch(name: str, model: Model) -> tuple[str, str]:
    reach, losses = model["ablation"]["reach"], model["ablation"]["beyond"]
    if losses is None:
        return "note", (
            f"no text is longer than its window's reach of {reach} tokens, so the linear branch could not be judged; "
            "give longer documents or a larger length"
        )
    share, told = losses.get("share"), _told(losses)
    if share is not None:
        low, high = _interval(share)
        rest = f"{_percent(share)} of what the window alone loses (95%: {low:.0%} to {high:.0%}); {told}"
        if low <= 0 or share["value"] < LEAST_SHARE:
            return "bad", f"the linear branch is bypassed (2510.05901): beyond {reach} tokens it wins back {rest}"
        return "good", f"beyond its window's reach of {reach} tokens the linear branch wins back {rest}"
    if "teacher" in losses:
        return "note", (
            f"beyond {reach} tokens the window alone loses nothing that is more than chance on this text ({told}): the "
            "linear branch has nothing to win back here; give text that needs more context"
        )
    if _interval(losses["won"])[0] <= 0:
        return "bad", (
            f"the linear branch brings nothing beyond {reach} tokens: the window alone is {_value(losses['won'])} nats "
            f"worse ({told})"
        )
    return "good", f"beyond {reach} tokens the window alone is {_value(losses['won'])} nats worse ({told})"


def _window(name: str, model: Model) -> tuple[str, str]:
    losses = model["ablation"]["all"]
    brings, told = losses["window_brings"], _told(losses)
    if _interval(brings)[0] <= 0:
        return "bad", (
            f"the window brings nothing: without it the loss is {_value(brings)} nats higher, on all tokens ({told})"
        )
    return "good", f"the window works: without it the loss is {_value(brings)} nats higher, on all tokens"


def _decoded(name: str, model: Model) -> tuple[str, str] | None:
    found = model["ablation"]["decoded"]
    if found is None:
        return None
    values = {key: value for key, value in found.items() if key != "dtype"}
    told = (
        f"loss {found['loss']:.4f} through the cache, {found['expected_loss']:.4f} in one pass, {found['flips']} of "
        f"{found['tokens']} argmaxes differ"
    )
    if Deviation(**values).within(tolerance(found["dtype"])):
        return "good", f"both branches work through the cache as in one pass ({told})"
    return "bad", f"decoding through the cache does not do what one pass does ({told})"


def _idle_layers(name: str, model: Model) -> tuple[str, str] | None:
    """Layers whose linear branch can be turned off for nothing."""
    idle = [str(layer["layer"]) for layer in model["layers"] if _interval(layer["without_linear"])[0] <= 0]
    if not idle:
        return None
    which = f"layer{'s' if len(idle) > 1 else ''} {', '.join(idle)}"
    return "note", (
        f"in {which} (of {len(model['layers'])}) turning the linear branch off alone costs nothing beyond chance "
        "on this text"
    )


def _memory(name: str, model: Model) -> tuple[str, str]:
    """For students whose branches cannot be told apart: is context worth anything to them?"""
    context = model["context"]
    if context is None:
        return "note", "the text is too short to tell what context is worth to it; give longer documents"
    gain, share = context["gain"], context["share_of_gain"]
    told = f"more than {_least(context)} tokens of context are worth {_value(gain)} nats to it"
    if share is None:
        return "note", f"{told}; the teacher gains nothing beyond chance on this text, or there is no teacher"
    low, high = _interval(share)
    told = f"{told}, {_percent(share)} of the teacher's gain (95%: {low:.0%} to {high:.0%})"
    if set(model["mixers"]) <= {"sliding_window", "softmax"}:
        return "note", f"{told}; it has windows only"
    if low <= 0 or share["value"] < LEAST_SHARE:
        return "bad", f"its memory does next to nothing: {told}"
    return "good", f"its memory works: {told}"


def _told(losses: Mapping[str, Any]) -> str:
    """`loss 2.1 with both, 2.3 window alone, ...`."""
    names = {"both": "with both", "window": "window alone", "linear": "linear alone", "teacher": "teacher"}
    return "loss " + ", ".join(f"{losses[key]['value']:.4f} {word}" for key, word in names.items() if key in losses)


def _beyond(model: Model) -> Mapping[str, Any] | None:
    """Losses beyond the window, else those on all tokens; None without an ablation."""
    ablation = model["ablation"]
    return None if ablation is None else ablation["beyond"] or ablation["all"]


def _interval(mean: Mapping[str, Any]) -> tuple[float, float]:
    """95%; without an error (one document) nothing is certain."""
    return interval(mean["value"], float("inf") if mean["error"] is None else mean["error"])


def _value(mean: Mapping[str, Any] | None) -> str:
    return "" if mean is None else plus_minus(mean["value"], mean["error"])


def _percent(mean: Mapping[str, Any] | None) -> str:
    if mean is None:
        return ""
    error = "" if mean["error"] is None else f" ± {mean['error']:.0%}"
    return f"{mean['value']:.0%}{error}"


def _least(context: Mapping[str, Any]) -> int:
    size: int = context["losses"][0]["size"]
    return size


def _ablation_table(models: Mapping[str, Model]) -> Table:
    rows = []
    for name, model in models.items():
        for where in ("beyond", "all"):
            if model["ablation"] and (losses := model["ablation"][where]):
                reach = model["ablation"]["reach"]
                rows.append(
                    {
                        "model": name,
                        "tokens": f"{losses['tokens']} beyond {reach}"
                        if where == "beyond"
                        else f"{losses['tokens']}, all",
                        "teacher": _value(losses.get("teacher")),
                        "both": _value(losses["both"]),
                        "window alone": _value(losses["window"]),
                        "linear alone": _value(losses["linear"]),
                        "won back": _percent(losses.get("share")),
                    }
                )
    note = "Nats per token ± standard error over documents. Won back: (window alone - both) / (window alone - teacher)."
    return Table(title="One branch at a time", rows=rows, note=note)


def _layer_table(models: Mapping[str, Model]) -> Table:
    rows = [
        {
            "model": name,
            "layer": layer["layer"],
            "without its linear branch": _signed(layer["without_linear"]),
            "without its window": _signed(layer["without_window"]),
        }
        for name, model in models.items()
        for layer in model["layers"]
    ]
    note = "Change of the loss in nats per token ± standard error, on tokens beyond the window; all other layers whole."
    return Table(title="One branch of one layer off", rows=rows, note=note)


def _signed(mean: Mapping[str, Any]) -> str:
    text = _value(mean)
    return text if text.startswith("-") else f"+{text}"


def _context_table(models: Mapping[str, Model]) -> Table:
    measured = {name: model["context"] for name, model in models.items() if model["context"]}
    if not measured:
        return Table(title="", rows=[])
    first = next(iter(measured.values()))
    rows: list[dict[str, str]] = [
        {"context": _size(loss["size"])} | {name: _value(c["losses"][i]) for name, c in measured.items()}
        for i, loss in enumerate(first["losses"])
    ]
    rows.append(
        {"context": "share of the teacher's gain"} | {n: _percent(c["share_of_gain"]) for n, c in measured.items()}
    )
    note = (
        f"Nats per token ± standard error on the same {first['tokens']} tokens, from position "
        f"{first['from_position']} on. With context N a token sees the last N / 2 to N tokens."
    )
    return Table(title="Loss against the context given", rows=rows, note=note)


def _size(size: int | None) -> str:
    return "whole document" if size is None else f"{size} tokens"


def _branch_plot(models: Mapping[str, Model]) -> Iterator[Plot]:
    ablated = {name: losses for name, model in models.items() if (losses := _beyond(model))}
    if not ablated:
        return

    def draw(figure: Figure) -> None:
        axis: Axes = figure.subplots()
        palette, width = colours(models), 0.8 / len(ablated)
        kinds = ("both", "window", "linear")
        for i, (name, losses) in enumerate(ablated.items()):
            places = [k + (i - (len(ablated) - 1) / 2) * width for k in range(len(kinds))]
            heights = [losses[kind]["value"] for kind in kinds]
            errors = [losses[kind]["error"] or 0 for kind in kinds]
            axis.bar(places, heights, width * 0.92, yerr=errors, color=palette[name], label=name)
        if teacher := next((losses["teacher"] for losses in ablated.values() if "teacher" in losses), None):
            axis.axhline(teacher["value"], color=palette.get("teacher", "#444444"), linestyle="--", label="teacher")
        axis.set_xticks(range(len(kinds)), ["both", "window\nalone", "linear\nalone"])
        axis.set(title="Loss beyond the window", ylabel="nats per token")
        legend_below(figure)

    told = "; ".join(f"{name}: {_told(losses)}" for name, losses in ablated.items())
    yield Plot(name="branches", caption=f"Loss with both branches and with one, beyond the window. {told}.", draw=draw)


def _layer_plot(models: Mapping[str, Model]) -> Iterator[Plot]:
    by_layer = {name: model["layers"] for name, model in models.items() if model["layers"]}
    if not by_layer:
        return

    def draw(figure: Figure) -> None:
        axis: Axes = figure.subplots()
        palette = colours(models)
        for name, layers in by_layer.items():
            for i, (key, style, word) in enumerate(
                (("without_linear", "-", "linear"), ("without_window", ":", "window"))
            ):
                places = [layer["layer"] + 0.1 * i for layer in layers]
                values = [layer[key]["value"] for layer in layers]
                errors = [layer[key]["error"] or 0 for layer in layers]
                label = f"{name}, no {word}"
                axis.errorbar(
                    places, values, yerr=errors, fmt=f"o{style}", markersize=4, color=palette[name], label=label
                )
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.margins(y=0.12)
        axis.yaxis.set_major_formatter(plain_label)
        axis.set(title="Cost of one layer's branch off", xlabel="layer", ylabel="nats per token more")
        _whole_ticks(axis)
        legend_below(figure)

    caption = "What it costs to turn one branch of one layer off, beyond the window; 0: the branch does nothing there."
    yield Plot(name="branches_by_layer", caption=caption, draw=draw)


def _context_plot(models: Mapping[str, Model]) -> Iterator[Plot]:
    measured = {name: model["context"] for name, model in models.items() if model["context"]}
    if not measured:
        return
    sizes = [loss["size"] for loss in next(iter(measured.values()))["losses"]]
    places = [size or 2 * sizes[-2] for size in sizes]

    def draw(figure: Figure) -> None:
        axis: Axes = figure.subplots()
        palette = colours(models)
        for name, context in measured.items():
            values = [loss["value"] for loss in context["losses"]]
            errors = [loss["error"] or 0 for loss in context["losses"]]
            axis.errorbar(places, values, yerr=errors, fmt="o-", markersize=4, color=palette[name], label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, ["all" if size is None else count_label(size) for size in sizes])
        axis.minorticks_off()
        axis.set(title="Loss against context", xlabel="tokens of context", ylabel="nats per token")
        legend_below(figure)

    ends = "; ".join(
        f"{name} from {c['losses'][0]['value']:.3f} to {c['losses'][-1]['value']:.3f}" for name, c in measured.items()
    )
    caption = f"The same tokens with less and more context in sight. {ends}. Flat: nothing is remembered."
    yield Plot(name="loss_by_context", caption=caption, draw=draw)


def _whole_ticks(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
