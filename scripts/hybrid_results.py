"""docs/results.md's tables (printed) and plots (docs/img/hybrid-*.svg) from the runs in benchmarks/hybrids/.

python scripts/hybrid_results.py > tables.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.metrics.plots import figure_files, new_figure

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "benchmarks" / "hybrids"
OUT = ROOT / "docs" / "img"
COLOURS = {"mamba2": "#1f6fb4", "mamba": "#e08214", "gated_delta_net": "#5aa469"}
STYLES = {"copy": "-", "calibrate": "--", "random": ":"}
NAMES = {"mamba2": "Mamba-2", "mamba": "Mamba", "gated_delta_net": "gated delta net"}
RATIOS = ("50", "25", "0")


def main() -> None:
    """Print every table and write every plot for which there are runs."""
    for table in ("stories", "embedded"):
        print(f"## {table}\n")
        print(ratio_table(load(table), recall=table == "embedded"), end="\n\n")
    runs = load("stories")
    for title, names in comparisons(runs).items():
        if names:
            print(f"## {title}\n\n{comparison_table(runs, names)}\n")
    for path in (*plot_ratios(), *plot_starts(runs)):
        print(f"wrote {path}", file=sys.stderr)


def load(table: str) -> dict[str, Any]:
    """The runs of a table by name."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted((RUNS / table).glob("*.json"))}


def gap(run: dict[str, Any]) -> float:
    """Held-out loss above the teacher's, nats per token."""
    return float(run["report"]["student_loss"] - run["report"]["teacher_loss"])


def kept(run: dict[str, Any]) -> str:
    """Kept layers of all, and which."""
    layers = [i for i, mixer in enumerate(run["plan"]) if mixer is None]
    return f"{len(layers)} of {len(run['plan'])} ({', '.join(map(str, layers)) or 'none'})"


def tokens(run: dict[str, Any]) -> int:
    """Training tokens over all stages."""
    return sum(stage["tokens"] for stage in run["report"]["stages"])


def ratio_table(runs: dict[str, Any], recall: bool) -> str:
    """One row per mixer and ratio."""
    head = ["mixer", "ratio", "kept", "tokens", "loss above the teacher", "KL", "same top token"]
    rows = []
    for name, run in runs.items():
        mixer, _, rest = name.partition("-")
        if mixer not in COLOURS or not rest:
            continue
        report = run["report"]
        row = [NAMES[mixer], f"{rest.split('-')[0]}%", kept(run), f"{tokens(run):,}", f"{gap(run):+.3f}"]
        row += [f"{report['student_kl']:.3f}", f"{report['student_top1']:.1%}"]
        if recall:
            row += [f"{b['accuracy']:.0%} of {b['items']}" for b in run["recall"]["by_distance"]]
        rows.append((list(COLOURS).index(mixer), -int(rest.split("-")[0]), row))
    if recall and runs:
        bins = next(iter(runs.values()))["recall"]["by_distance"]
        head += [f"recall at {b['start']}-{b['end']} tokens" for b in bins]
    return markdown(head, [row for *_, row in sorted(rows)])


def comparisons(runs: dict[str, Any]) -> dict[str, list[str]]:
    """The single-factor comparisons: their runs in order."""
    groups = {f"start of {NAMES[m]}": [f"start-{m}-{s}" for s in STYLES] for m in COLOURS}
    groups["loss"] = ["start-mamba2-copy", "loss-kl+ce", "loss-ce"]
    groups["schedule"] = ["schedule-at-once", "schedule-progressive", "schedule-stepwise"]
    groups["kept layers, one of five"] = ["schedule-at-once", "selected-25"]
    groups["kept layers, two of five"] = ["start-mamba2-copy", "selected-50"]
    return {title: [name for name in names if name in runs] for title, names in groups.items()}


def comparison_table(runs: dict[str, Any], names: Sequence[str]) -> str:
    """Loss at equal tokens; for starts also the tokens at which each reached the final loss of the first."""
    head, rows = ["run", "kept", "tokens", "at the swap", "loss above the teacher", "KL", "same top token"], []
    starts = bool(names) and all(name.startswith("start-") for name in names)
    for name in names:
        run, report = runs[name], runs[name]["report"]
        row = [f"`{name}`", kept(run), f"{tokens(run):,}", f"{report['swap_loss'] - report['teacher_loss']:+.3f}"]
        row += [f"{gap(run):+.3f}", f"{report['student_kl']:.3f}", f"{report['student_top1']:.1%}"]
        if starts:
            reached = tokens_to_reach(run, gap_curve(runs[names[0]])[-1][1])
            row.append("not reached" if reached is None else f"{reached:,}")
        rows.append(row)
    return markdown([*head, f"tokens to reach `{names[0]}`"] if starts else head, rows)


def gap_curve(run: dict[str, Any]) -> list[tuple[int, float]]:
    """(tokens, held-out objective) over a run's stages of distillation."""
    points, before = [], 0
    for stage in run["report"]["stages"]:
        steps = max(1, stage["details"]["steps"])
        points += [(before + round(stage["tokens"] * step / steps), loss) for step, loss in stage["details"]["heldout"]]
        before += stage["tokens"]
    return points


def tokens_to_reach(run: dict[str, Any], objective: float) -> int | None:
    """The first evaluation at which the held-out objective was at most this; None: never."""
    return next((at for at, loss in gap_curve(run) if loss <= objective), None)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = [f"| {' | '.join(head)} |", "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def plot_ratios() -> list[Path]:
    """Held-out loss above the teacher's against the share of attention kept, one panel per teacher."""
    tables = {name: load(name) for name in ("stories", "embedded")}
    with new_figure(OUT / "hybrid-ratios", width=8.4, panels=2) as (_figure, axes):
        for axis, (table, runs) in zip(axes, tables.items(), strict=True):
            for mixer, colour in COLOURS.items():
                points = [runs[f"{mixer}-{ratio}"] for ratio in RATIOS if f"{mixer}-{ratio}" in runs]
                if not points:
                    continue
                shares = [sum(x is None for x in run["plan"]) / len(run["plan"]) for run in points]
                axis.plot(
                    shares,
                    [gap(run) for run in points],
                    "o-",
                    color=colour,
                    label=f"{NAMES[mixer]}, {tokens(points[0]) // 1000}k tokens",
                )
            axis.axhline(0.05, color="#999999", linewidth=0.8, linestyle="--")
            axis.set(xlabel="share of layers kept as attention", ylabel="loss above the teacher, nats", ylim=(0, None))
            axis.set_title({"stories": "stories260k", "embedded": "embedded teacher"}[table])
            axis.legend(frameon=False)
    return figure_files(OUT, "hybrid-ratios")


def plot_starts(runs: dict[str, Any]) -> list[Path]:
    """Held-out KL against tokens for every start of every mixer."""
    with new_figure(OUT / "hybrid-starts", width=6.4) as (_figure, (axis,)):
        for mixer, colour in COLOURS.items():
            for start, style in STYLES.items():
                if (run := runs.get(f"start-{mixer}-{start}")) is not None:
                    at, losses = zip(*gap_curve(run), strict=True)
                    axis.plot([x / 1000 for x in at], losses, style, color=colour, label=f"{NAMES[mixer]}, {start}")
        axis.set(xlabel="training tokens, thousands", ylabel="held-out KL to the teacher, nats", yscale="log")
        ticks = (0.2, 0.5, 1.0, 2.0, 5.0)
        axis.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend(frameon=False)
    return figure_files(OUT, "hybrid-starts")


if __name__ == "__main__":
    main()
