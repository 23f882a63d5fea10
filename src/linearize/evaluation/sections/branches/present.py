"""The branches section as people read it: does each branch work, is context worth anything, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from linearize.evaluation.cache_checks import tolerance
from linearize.evaluation.context import Cell, Finding, Judgement, Plot, SectionView, Stat, Table
from linearize.evaluation.numbers import MeanNumbers
from linearize.evaluation.sections.branches.numbers import (
    Ablation,
    BranchesNumbers,
    ContextNumbers,
    Decoded,
    LayerCost,
    ModelBranches,
)
from linearize.metrics.theme import colours, count_label, legend_below, plain_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_SHARE = 0.1  # of what the window alone loses: below it a linear branch counts as bypassed
SUMMARY = (
    "A window + linear student is run with one branch off: what the window alone loses against the teacher, and "
    "how much of that the linear branch wins back on tokens beyond the window's reach. Every model is also given "
    "less and less context: one whose state does nothing stays flat where the teacher falls."
)


def present(numbers: BranchesNumbers) -> SectionView:
    """The section as people read it."""
    models = numbers.models
    contexts = {name: model.context for name, model in models.items() if model.context is not None}
    layers = {name: model.layers for name, model in models.items() if model.layers}
    tables = [_ablation_table(models), _layer_table(layers), _context_table(contexts)]
    plots = [_layer_plot(models, layers)] if layers else []
    plots += [_context_plot(models, contexts)] if contexts else []
    return SectionView(
        summary=SUMMARY,
        findings=[
            Finding.on(name, model.role, level, text)
            for name, model in models.items()
            for level, text in _judgements(model)
        ],
        tables=[table for table in tables if table.rows],
        plots=plots,
    )


def headline(numbers: BranchesNumbers) -> Mapping[str, Sequence[Stat]]:
    """What the linear branch wins back, or what context is worth; at most one stat per student."""
    stats: dict[str, Sequence[Stat]] = {}
    for name, model in numbers.models.items():
        if model.role != "student":
            continue
        losses, context = model.farthest, model.context
        if losses is not None and losses.share is not None:
            detail = "of what the window alone loses beyond its reach is won back"
            stats[name] = [Stat(label="linear branch", value=losses.share.percent, detail=detail)]
        elif losses is None and context is not None and context.share_of_gain is not None:
            detail = f"of what the teacher gains from more than {context.losses[0].size} tokens of context"
            stats[name] = [Stat(label="memory", value=context.share_of_gain.percent, detail=detail)]
    return stats


def _judgements(model: ModelBranches) -> Iterator[Judgement]:
    """Judge one model; a plain teacher is not judged."""
    if model.ablation is not None:
        yield _linear_branch(model.ablation)
        yield _window(model.ablation)
        if model.ablation.decoded is not None:
            yield _decoded(model.ablation.decoded)
        if idle := [str(layer.layer) for layer in model.layers if not layer.without_linear.clearly_positive]:
            layers = f"layer{'s' if len(idle) > 1 else ''} {', '.join(idle)} (of {len(model.layers)})"
            yield "note", f"in {layers} turning the linear branch off alone costs nothing beyond chance on this text"
    elif model.mixers:
        yield _memory(model)


def _linear_branch(ablation: Ablation) -> Judgement:
    reach, losses = ablation.reach, ablation.beyond
    if losses is None:
        return "note", (
            f"no text is longer than its window's reach of {reach} tokens, so the linear branch could not be judged; "
            "give longer documents or a larger length"
        )
    if losses.share is not None:
        words = f"{_with_interval(losses.share)} of what the window alone loses; {losses.text}"
        if _next_to_nothing(losses.share):
            return "bad", f"the linear branch is bypassed (2510.05901): beyond {reach} tokens it wins back {words}"
        return "good", f"beyond its window's reach of {reach} tokens the linear branch wins back {words}"
    if losses.teacher is not None:
        return "note", (
            f"beyond {reach} tokens the window alone loses nothing beyond chance on this text ({losses.text}): the "
            "linear branch has nothing to win back here; give text that needs more context"
        )
    words = f"beyond {reach} tokens the window alone is {losses.won.text} nats worse ({losses.text})"
    return ("good", words) if losses.won.clearly_positive else ("bad", f"the linear branch brings nothing: {words}")


def _with_interval(share: MeanNumbers) -> str:
    low, high = share.interval
    return f"{share.percent} (95%: {low:.0%} to {high:.0%})"


def _next_to_nothing(share: MeanNumbers) -> bool:
    return not share.clearly_positive or share.value < LEAST_SHARE


def _window(ablation: Ablation) -> Judgement:
    brings = ablation.all.window_brings
    words = f"without it the loss is {brings.text} nats higher, on all tokens"
    if brings.clearly_positive:
        return "good", f"the window works: {words}"
    return "bad", f"the window brings nothing: {words} ({ablation.all.text})"


def _decoded(decoded: Decoded) -> Judgement:
    losses = (
        f"loss {decoded.loss:.4f} through the cache, {decoded.expected_loss:.4f} in one pass, {decoded.flips} of "
        f"{decoded.tokens} argmaxes differ"
    )
    if decoded.within(tolerance(decoded.dtype)):
        return "good", f"both branches work through the cache as in one pass ({losses})"
    return "bad", f"decoding through the cache does not do what one pass does ({losses})"


def _memory(model: ModelBranches) -> Judgement:
    """Judge a student whose branches cannot run alone by what context is worth to it."""
    context = model.context
    if context is None:
        return "note", "the text is too short to measure what context is worth to it; give longer documents"
    words = f"more than {context.losses[0].size} tokens of context are worth {context.gain.text} nats to it"
    share = context.share_of_gain
    if share is None:
        return "note", f"{words}; the teacher gains nothing beyond chance on this text, or there is no teacher"
    words += f", {_with_interval(share)} of the teacher's gain"
    if set(model.mixers) <= {"sliding_window", "softmax"}:
        return "note", f"{words}; it has windows only"
    if _next_to_nothing(share):
        return "bad", f"its memory does next to nothing: {words}"
    return "good", f"its memory works: {words}"


def _ablation_table(models: Mapping[str, ModelBranches]) -> Table:
    rows: list[dict[str, Cell]] = []
    for name, model in models.items():
        if model.ablation is None:
            continue
        parts = {f" beyond {model.ablation.reach}": model.ablation.beyond, ", all": model.ablation.all}
        for which, losses in parts.items():
            if losses is not None:
                row: dict[str, Cell] = {
                    "model": name,
                    "tokens": f"{losses.tokens}{which}",
                    "teacher": "" if losses.teacher is None else losses.teacher.text,
                    "both": losses.both.text,
                    "window alone": losses.window.text,
                    "linear alone": losses.linear.text,
                    "won back": "" if losses.share is None else losses.share.percent,
                }
                rows.append(row)
    note = "Nats per token ± standard error over documents. Won back: (window alone - both) / (window alone - teacher)."
    return Table(title="One branch at a time", rows=rows, note=note)


def _layer_table(layers: Mapping[str, Sequence[LayerCost]]) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "model": name,
            "layer": cost.layer,
            "without its linear branch": _signed(cost.without_linear),
            "without its window": _signed(cost.without_window),
        }
        for name, costs in layers.items()
        for cost in costs
    ]
    note = "Change of the loss in nats per token ± standard error, on tokens beyond the window; all other layers whole."
    return Table(title="One branch of one layer off", rows=rows, note=note)


def _signed(mean: MeanNumbers) -> str:
    return mean.text if mean.text.startswith("-") else f"+{mean.text}"


def _context_table(contexts: Mapping[str, ContextNumbers]) -> Table:
    first = next(iter(contexts.values()), None)
    if first is None:
        return Table(title="", rows=[])
    rows: list[Mapping[str, Cell]] = [
        {"context": loss.label, **{name: context.losses[i].text for name, context in contexts.items()}}
        for i, loss in enumerate(first.losses)
    ]
    shares = {name: context.share_of_gain for name, context in contexts.items()}
    if any(share is not None for share in shares.values()):
        percent = {name: "" if share is None else share.percent for name, share in shares.items()}
        rows.append({"context": "share of the teacher's gain", **percent})
    note = (
        f"Nats per token ± standard error on the same {first.tokens} tokens, from position {first.from_position} on. "
        "With context N a token sees the last N / 2 to N tokens."
    )
    return Table(title="Loss against the context given", rows=rows, note=note)


def _layer_plot(models: Mapping[str, ModelBranches], layers: Mapping[str, Sequence[LayerCost]]) -> Plot:
    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axis = figure.subplots()
        palette = colours(models)
        for name, costs in layers.items():
            branches = {"linear": [cost.without_linear for cost in costs], "window": [c.without_window for c in costs]}
            for i, ((word, means), style) in enumerate(zip(branches.items(), ("o-", "o:"), strict=True)):
                axis.errorbar(
                    [cost.layer + 0.1 * i for cost in costs], [mean.value for mean in means],
                    yerr=[mean.error or 0 for mean in means], fmt=style, markersize=4, color=palette[name],
                    label=f"{name}, no {word}",
                )  # fmt: skip
        axis.axhline(0, color="#888888", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.margins(y=0.12)
        axis.yaxis.set_major_formatter(plain_label)
        axis.set(title="Cost of one layer's branch off", xlabel="layer", ylabel="nats per token more")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure)

    caption = "What it costs to turn one branch of one layer off, beyond the window; 0: the branch does nothing there."
    return Plot(name="branches_by_layer", caption=caption, draw=draw)


def _context_plot(models: Mapping[str, ModelBranches], contexts: Mapping[str, ContextNumbers]) -> Plot:
    sizes = [loss.size for loss in next(iter(contexts.values())).losses]
    places = [size or 2 * (sizes[-2] or 1) for size in sizes]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        palette = colours(models)
        for name, context in contexts.items():
            values, errors = [loss.value for loss in context.losses], [loss.error or 0 for loss in context.losses]
            axis.errorbar(places, values, yerr=errors, fmt="o-", markersize=4, color=palette[name], label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, ["all" if size is None else count_label(size) for size in sizes])
        axis.minorticks_off()
        axis.set(title="Loss against context", xlabel="tokens of context", ylabel="nats per token")
        legend_below(figure)

    caption = "The same tokens with less and more context in sight. Flat: nothing is remembered."
    return Plot(name="loss_by_context", caption=caption, draw=draw)
